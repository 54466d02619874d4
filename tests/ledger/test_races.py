"""Many callers at once, take-over by a standby, back-pressure, and the service over gRPC."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from trueweight.ledger import service as service_module
from trueweight.ledger import writer as writer_module
from trueweight.ledger.court import with_key_events
from trueweight.protos.errors import OverCapacity, PermissionDenied, TrueweightError, Unavailable
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_world import Leg

from .test_money import claim_of

CREDIT = 10**9


async def test_64_callers_and_a_balance_for_exactly_half(bench):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 32 * CREDIT))
    holds = [world.hold("acme", CREDIT) for _ in range(64)]
    results = await asyncio.gather(*(bench.do("router", hold) for hold in holds))
    codes = [r[0].code for r in results]
    assert (codes.count(""), codes.count("INSUFFICIENT_FUNDS")) == (32, 32)
    assert await bench.available("client:acme") == 0


async def until_applied(ledgers, caller, operation):
    """Sends an operation to whoever writes until somebody answers, as a client would."""
    for _ in range(400):
        for ledger in ledgers:
            with contextlib.suppress(TrueweightError):
                return (await ledger.as_caller(caller).apply([operation]))[0]
        await asyncio.sleep(0.02)
    raise AssertionError("nobody took over within 8 s")


async def test_exactly_half_succeed_also_during_a_take_over(bench, start):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 32 * CREDIT))
    standby = await start(world, bench.url, wait_ms=0)
    assert not standby.is_writer
    with pytest.raises(Unavailable):
        await standby.as_caller(world.identity("router")).apply([world.hold("acme", 1)])
    router, pair = world.identity("router"), [bench.ledger, standby]
    holds = [world.hold("acme", CREDIT) for _ in range(64)]
    tasks = [asyncio.create_task(until_applied(pair, router, hold)) for hold in holds[:32]]
    await asyncio.sleep(0)
    closing = asyncio.create_task(bench.ledger.close())
    tasks += [asyncio.create_task(until_applied(pair, router, hold)) for hold in holds[32:]]
    results = await asyncio.wait_for(asyncio.gather(*tasks), 20)
    await closing
    applied = [r for r in results if r.status in (pb.Result.APPLIED, pb.Result.REPLAYED)]
    assert len(applied) == 32
    assert standby.is_writer
    bench.ledger = standby
    assert await bench.available("client:acme") == 0
    again = await standby.as_caller(router).apply(holds)
    assert sum(r.status == pb.Result.REPLAYED for r in again) == 32


async def test_two_processes_start_at_once_on_an_empty_database(world, start, databases):
    url = databases.copy()
    pair = await asyncio.gather(start(world, url, 1_500), start(world, url, 1_500))
    assert sum(ledger.is_writer for ledger in pair) == 1
    for ledger in pair:
        await ledger.close()


async def test_two_names_of_one_file_have_one_writer(world, start, tmp_path):
    """What one writer remembers another would change: a claim could be voided."""
    (tmp_path / "link.db").symlink_to(tmp_path / "books.db")
    first = await start(world, f"sqlite:///{tmp_path / 'books.db'}")
    second = await start(world, f"sqlite:///{tmp_path / 'link.db'}", wait_ms=1000)
    assert (first.is_writer, second.is_writer) == (True, False)
    for ledger in (first, second):
        await ledger.close()


async def test_a_standby_takes_over_within_5_seconds(bench, start):
    standby = await start(bench.world, bench.url, wait_ms=0)
    await bench.ledger.close()
    started = asyncio.get_running_loop().time()
    deposit = bench.world.deposit("acme", CREDIT)
    await until_applied([standby], bench.world.identity("admin"), deposit)
    assert asyncio.get_running_loop().time() - started < 5
    bench.ledger = standby
    assert await bench.available("client:acme") == CREDIT


async def test_the_standby_knows_node_keys_published_before_it_took_over(bench, start):
    world = bench.world
    standby = await start(world, bench.url, wait_ms=0)
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", CREDIT))
    await bench.ledger.close()
    hold = world.hold("acme", CREDIT)
    router = world.identity("router")
    await until_applied([standby], router, hold)
    result = await until_applied([standby], router, world.capture(hold.id, Leg(world.node[0])))
    assert result.status == pb.Result.APPLIED
    bench.ledger = standby


async def test_a_standby_refuses_no_claim_of_a_node_it_has_not_heard_of_yet(
    bench, start, monkeypatch
):
    """A node takes a refusal for the ledger's last word."""
    monkeypatch.setattr(service_module, "_FOLLOW_KEYS_MS", 1e13)
    world, node = bench.world, bench.world.node[0].identity
    standby = await start(world, bench.url, wait_ms=0)
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", CREDIT))
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    assert world.node[0].key_id not in standby.court.ring.keys
    with pytest.raises(Unavailable):
        await standby.as_caller(node).apply([claim_of(world, hold.id, Leg(world.node[0]))])


async def test_what_was_checked_before_a_take_over_is_checked_again(bench, monkeypatch):
    """By keys that its predecessor had heard of and this writer not yet."""
    world, ledger = bench.world, bench.ledger
    stale = ledger.court
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", CREDIT))
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    prepare, courts = ledger._checkers.prepare, []

    async def prepare_before(operations, caller, court):
        if not courts:
            court, ledger._writer._term = stale, ledger._writer._term + 1
        courts.append(court)
        return await prepare(operations, caller, court)

    monkeypatch.setattr(ledger._checkers, "prepare", prepare_before)
    await bench.must("router", world.capture(hold.id, Leg(world.node[0])))
    assert len(courts) == 2 and courts[0] is stale


async def test_who_takes_over_checks_new_keys_only(bench, start, monkeypatch):
    """All that there ever were take seconds where many strangers have brought theirs."""
    world, checked = bench.world, []
    await bench.as_("router").publish(world.node[0].key_event)
    standby = await start(world, bench.url, wait_ms=0)
    await bench.as_("router").publish(world.node[1].key_event)

    def counting(court, leaves):
        checked.extend(leaf.body for leaf in leaves)
        return with_key_events(court, leaves)

    monkeypatch.setattr(service_module, "with_key_events", counting)
    await bench.ledger.close()
    await until_applied([standby], world.identity("admin"), world.deposit("acme", 1))
    assert [body for body in checked if b"key-event" in body] == [world.node[1].key_event]
    bench.ledger = standby


async def test_a_full_queue_says_so_and_recovers(bench, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 10_000 * CREDIT))
    monkeypatch.setattr(writer_module, "MAX_QUEUED", 50)
    calls = [bench.do("router", *[world.hold("acme", 1) for _ in range(40)]) for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, OverCapacity)]
    assert refused and len(refused) < 20
    assert all(isinstance(r, list | OverCapacity) for r in results)
    await bench.must("router", world.hold("acme", 1))


async def test_a_full_queue_is_the_same_error_over_grpc_and_ends_no_stream(
    bench, remote, monkeypatch
):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 10_000 * CREDIT))
    monkeypatch.setattr(writer_module, "MAX_QUEUED", 50)
    router = remote("router")

    def hold_many():
        return [world.hold("acme", 1) for _ in range(60)]

    with pytest.raises(OverCapacity) as local:
        await bench.do("router", *hold_many())
    with pytest.raises(OverCapacity) as far:
        await router.apply(hold_many())
    assert far.value.hint and str(far.value) == str(local.value)
    assert far.value.retryable and far.value.hint == local.value.hint
    # Small calls of the same stream go on between large ones that are refused, and nothing is lost.
    calls = [
        router.apply(hold_many() if at % 4 == 0 else [world.hold("acme", 1)]) for at in range(40)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(r, list | OverCapacity) for r in results), results
    assert sum(isinstance(r, OverCapacity) for r in results) >= 10
    done = sum(len(r) for r in results if isinstance(r, list))
    assert await bench.available("client:acme") == 10_000 * CREDIT - done
    assert (await router.apply([world.hold("acme", 1)]))[0].status == pb.Result.APPLIED


async def test_a_caller_over_grpc_gets_through_once_the_queue_has_room(bench, remote, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", CREDIT))
    monkeypatch.setattr(writer_module, "MAX_QUEUED", 0)
    router, hold = remote("router"), world.hold("acme", 1)
    asyncio.get_running_loop().call_later(0.5, monkeypatch.undo)
    refused = 0
    while True:
        try:
            (result,) = await router.apply([hold])
            break
        except OverCapacity:
            refused += 1
            await asyncio.sleep(0.05)
    # Each refusal is for one batch, and the next goes out later each time: nothing is hammered.
    assert result.status == pb.Result.APPLIED and 2 <= refused <= 15


async def test_a_node_that_is_no_writer_still_reads(bench, start):
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    standby = await start(bench.world, bench.url, wait_ms=0)
    reader = standby.as_caller(bench.world.identity("router"))
    assert (await reader.balances(["client:acme"]))[0].available_nano == str(CREDIT)
    seen = []

    async def follow():
        async for entry in reader.follow_log(0):
            seen.append(entry.index)

    task = asyncio.create_task(follow())
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    for _ in range(60):
        if len(seen) == 2:
            break
        await asyncio.sleep(0.05)
    task.cancel()
    assert seen == [0, 1]


async def test_the_whole_life_of_a_request_over_grpc(bench, remote):
    world = bench.world
    admin, router = remote("admin"), remote("router")
    assert (await admin.apply([world.deposit("acme", 100 * CREDIT)]))[0].status == pb.Result.APPLIED
    for node in world.node:
        await router.publish(node.key_event)
    holds = [world.hold("acme", CREDIT) for _ in range(50)]
    results = await asyncio.gather(*(router.apply([h]) for h in holds))
    assert all(r[0].status == pb.Result.APPLIED for r in results)
    captures = [world.capture(h.id, Leg(world.node[i % 3])) for i, h in enumerate(holds)]
    results = await asyncio.gather(*(router.apply([c]) for c in captures))
    assert all(r[0].status == pb.Result.APPLIED for r in results)
    assert (await router.hold(holds[0].id)).state == pb.HoldRecord.CAPTURED
    assert (await router.transfers("client:acme")).transfers
    everyone = await admin.balances([])
    assert sum(int(a.available_nano) for a in everyone) == 0
    seen = []
    async for entry in router.follow_log(0, ("bill",)):
        seen.append(entry)
        if len(seen) == 50:
            break
    for _ in range(40):
        with contextlib.suppress(TrueweightError):
            request = pb.InclusionProofRequest(index=seen[-1].index)
            if (await router.inclusion(request)).entry == seen[-1]:
                break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("no checkpoint covered the leaf in 4 s")


async def test_attack_scopes_hold_over_grpc(bench, remote):
    world = bench.world
    node = remote("node")
    (result,) = await node.apply([world.deposit("acme", CREDIT)])
    assert result.code == "PERMISSION_DENIED"
    with pytest.raises(PermissionDenied):
        await node.balances(["client:acme"])
    with pytest.raises(PermissionDenied):
        await node.balances([])
    assert not (await node.read_log(0)).entries


async def test_a_lost_answer_and_a_retry_is_one_operation(bench, remote):
    world = bench.world
    admin = remote("admin")
    deposit = world.deposit("acme", CREDIT)
    task = asyncio.create_task(admin.apply([deposit]))
    await asyncio.sleep(0.01)
    task.cancel()
    (result,) = await remote("admin").apply([deposit])
    assert result.status in (pb.Result.APPLIED, pb.Result.REPLAYED)
    assert await bench.available("client:acme") == CREDIT

"""Requests that wait for a place: what that costs, and who gets it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trueweight.protos.market_terms import SYNTHETIC
from trueweight.protos.v1.market_pb2 import Offer, OfferedModel
from trueweight.protos.v1.node_pb2 import Load
from trueweight.router import fleet as fleet_module
from trueweight.router import patience, waiting
from trueweight.router.choosing import Work, choose, eligible
from trueweight.router.exposure import Exposure
from trueweight.router.fleet import Fleet
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.router.lifecycle import RequestRun
from trueweight.router.offers import AllowList
from trueweight.router.openai_requests import Preferences
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import World

ONE, OTHER = b"1" * 32, b"2" * 32
WORK = Work(100, 100)


class HandClock(SystemClock):
    """Stands still, so that no test depends on how fast it runs."""

    now_ms = 1_000.0

    def monotonic_ms(self):
        return self.now_ms


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def fleet(clock):
    world = World(verifiers=1)
    judges = Judges(world.market, Keys(world.market_id, world.market.ring))
    return Fleet(clock, AllowList(synthetic=True), judges=judges, exposure=Exposure(judges))


@pytest.fixture
def add(fleet, clock):
    """``add(name, manifest)``: a node with one place."""

    def make(name, manifest=ONE):
        model = OfferedModel(
            manifest_digest=manifest,
            max_context_tokens=4096,
            ask_input_nano_per_mtok=1,
            ask_output_nano_per_mtok=1,
        )
        offer = Offer(node_id=name, models=[model], capacity=1, lease_ms=600_000)
        engine = offer.fingerprint
        engine.engine, engine.dtype, engine.quantization = SYNTHETIC, "float32", "none"
        engine.kv_dtype, engine.sampler_id, engine.sampler_precision = "auto", "tw-gumbel-1", "fp32"
        record = fleet.remember(offer)
        record.session = SimpleNamespace(
            is_open=True, load=Load(), last_heard_ms=clock.now_ms, draining=False
        )
        fleet.wake(record)
        return record

    return make


@pytest.fixture
def looked(fleet, monkeypatch):
    """How often all nodes were looked at anew, by manifest."""
    looks = []

    def look(manifest, real=fleet._look):
        looks.append(manifest)
        return real(manifest)

    monkeypatch.setattr(fleet, "_look", look)
    return looks


def free(fleet, manifest=ONE):
    return choose(eligible(fleet.views(manifest), WORK), WORK, lambda: 0.5)


async def wait_for_place(fleet, manifest=ONE, work=WORK):
    """As a request does it; the id of the node."""
    plan = SimpleNamespace(
        model=SimpleNamespace(manifest_digest=manifest),
        prompt=(1,) * work.prompt_tokens,
        max_tokens=work.max_tokens,
        preferences=work.preferences,
    )
    run = SimpleNamespace(
        plan=plan,
        answers=SimpleNamespace(is_gone=False),
        _services=SimpleNamespace(fleet=fleet, clock=fleet._clock, draw=lambda: 0.5),
        _work=lambda tried, most: work,
    )
    choice = await RequestRun._choose(run, None, frozenset(), 60_000.0)
    return choice.node.node_id


async def test_attack_many_waiting_requests_do_not_look_at_all_nodes_each(fleet, add, looked):
    records = [add(f"n{i}") for i in range(20)]
    for record in records:
        record.in_flight = 1
    crowd = [asyncio.create_task(wait_for_place(fleet)) for _ in range(300)]
    await asyncio.sleep(0.3)
    assert len(looked) == 1, "nothing has changed and time stands still"
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    assert not fleet.line._waiting and not fleet.line._count


async def test_many_who_wait_look_less_often_each(fleet, add, monkeypatch):
    monkeypatch.setattr(waiting, "_POLL_EACH_MS", 1_000_000.0)
    add("n").in_flight = 1
    slow = asyncio.create_task(wait_for_place(fleet))
    await asyncio.sleep(0)
    before = fleet.line._waiting[ONE][0]
    await asyncio.sleep(0.25)
    assert fleet.line._waiting[ONE][0] is before
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


@pytest.mark.parametrize("woken", [False, True])
async def test_a_wait_ends_and_leaves_nothing(fleet, add, monkeypatch, woken):
    monkeypatch.setattr(waiting, "_POLL_MS", 10.0)
    record = add("n")
    waits = asyncio.create_task(fleet.line.wait(ONE, 1, 60_000))
    await asyncio.sleep(0)
    if woken:
        fleet.wake(record)
    assert (await waits > 0) == woken
    assert not fleet.line._waiting and not fleet.line._count


@pytest.fixture
def no_polling(monkeypatch):
    monkeypatch.setattr(waiting, "_POLL_MS", 60_000.0)


@pytest.mark.usefixtures("no_polling")
async def test_attack_those_who_wait_for_one_model_hold_up_nobody_elses(fleet, add):
    """A free place wakes who waits for it, however many wait longer for another model."""
    add("full").in_flight = 1
    other = add("other", OTHER)
    crowd = [asyncio.create_task(wait_for_place(fleet)) for _ in range(100)]
    with fleet.place(other, 1):
        waits = asyncio.create_task(wait_for_place(fleet, OTHER))
        await asyncio.sleep(0.05)
        assert not waits.done()
    assert await asyncio.wait_for(waits, 5) == "other"
    assert not any(task.done() for task in crowd)
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


@pytest.mark.usefixtures("no_polling")
async def test_places_are_given_in_the_order_of_waiting(fleet, add):
    record, served = add("n"), []

    async def request(number):
        await wait_for_place(fleet)
        with fleet.place(record, 1):
            served.append(number)
            await asyncio.sleep(0)

    with fleet.place(record, 1):
        requests = []
        for number in range(20):
            requests.append(asyncio.create_task(request(number)))
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*requests), 5)
    assert served == list(range(20))


@pytest.mark.usefixtures("no_polling")
async def test_a_place_that_the_first_may_not_have_goes_to_the_next(fleet, add):
    """Those before keep their places in the line."""
    wanted, other = add("wanted"), add("other")
    only = replace(WORK, preferences=Preferences(only=("wanted",)))
    with fleet.place(wanted, 1):
        with fleet.place(other, 1):
            choosy = [asyncio.create_task(wait_for_place(fleet, work=only)) for _ in range(3)]
            await asyncio.sleep(0)
            anybody = asyncio.create_task(wait_for_place(fleet))
            await asyncio.sleep(0.02)
        assert await asyncio.wait_for(anybody, 5) == "other"
        await asyncio.sleep(0.02)
        assert [number for number, _ in fleet.line._waiting[ONE]] == [1, 2, 3]
    assert await asyncio.wait_for(asyncio.gather(*choosy), 5) == ["wanted"] * 3


async def test_what_matters_is_seen_at_once(fleet, add, clock):
    record = add("n")
    assert free(fleet)
    with fleet.place(record, 1):
        assert not free(fleet)
    assert free(fleet)
    fleet.suspend("n")
    assert not free(fleet)
    fleet.lift("n")
    assert free(fleet)
    add("later")
    assert len(fleet.views(ONE)) == 2
    # What nodes say of their load, and silence, within a moment.
    record.session.load.waiting = 99
    clock.now_ms += fleet_module._VIEWS_HOLD_MS
    assert fleet.views(ONE)[0].waiting == 99


async def test_full_nodes_are_asked_until_the_time_is_over(monkeypatch):
    """After every refusal of so many, and at the end, there is a pause; each is longer."""
    pauses = []

    class Clock(HandClock):
        async def sleep_ms(self, ms):
            pauses.append(ms)
            self.now_ms += ms

    monkeypatch.setattr(patience, "_REFUSALS_AT_ONCE", 3)
    clock = Clock()
    waits = patience.Patience(clock, clock.now_ms + 20_000)
    for _ in range(7):
        await waits.refused()
    assert pauses == [100, 200]
    while not waits.is_over:
        await waits.pause()
    assert sum(pauses) == 20_000 and max(pauses) == 6_000

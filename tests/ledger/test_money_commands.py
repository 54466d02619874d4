"""The treasurer's commands against a running ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from trueweight.ledger import command_support, money_commands, reinstate_command
from trueweight.ledger.commands import ledger as commands
from trueweight.protos.envelope import digest_of
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg

CREDIT = 10**9


class Across:
    """A ledger that lives in another thread's loop."""

    def __init__(self, port, loop):
        self._port, self._loop = port, loop

    def __getattr__(self, name):
        method = getattr(self._port, name)

        def call(*arguments):
            running = asyncio.run_coroutine_threadsafe(method(*arguments), self._loop)
            return asyncio.wrap_future(running)

        return call


class Commands:
    """Runs a command as its ``signer``; exit code and JSON."""

    def __init__(self, signer):
        self.signer = signer

    async def raw(self, *arguments):
        given = [*arguments, "--json"]
        if "--database" not in arguments:
            given += ["--market", "m", "--keys", "k"]
        return await asyncio.to_thread(CliRunner().invoke, commands, given)

    async def __call__(self, *arguments):
        result = await self.raw(*arguments)
        if result.exit_code:
            return result.exit_code, result.exception
        return 0, json.loads(result.output)


@pytest.fixture
async def run(bench, monkeypatch):
    """Commands of the administrator."""
    loop = asyncio.get_running_loop()
    made = Commands(bench.world.signers["admin"])

    @contextlib.asynccontextmanager
    async def connected(*_):
        yield Across(bench.ledger.as_caller(made.signer.identity), loop)

    monkeypatch.setattr(command_support, "connected", connected)
    monkeypatch.setattr(command_support, "load_market", lambda _: bench.world.market)
    monkeypatch.setattr(command_support, "load_signer", lambda _: made.signer)
    return made


@pytest.fixture
async def earned(bench):
    """A node with released earnings, and its capture."""
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", CREDIT))
    hold = world.hold("acme", CREDIT)
    leg = Leg(world.node[0], output=4000, billed_output=4000)
    capture = world.capture(hold.id, leg)
    await bench.must("router", hold, capture)
    bench.advance(world.window_ms)
    body = pb.Release(node_id=world.node[0].identity, below_log_index=10**9)
    await bench.must("admin", pb.Operation(id=world.new_id(), release=body))
    return capture


async def test_a_payout_is_pending_until_the_rail_answers(bench, earned, run):
    node = bench.world.node[0].identity
    before = await bench.available(f"node-available:{node}")
    _, started = await run("payout", node, "0.0005", "--reference", "july-1")
    assert await bench.available(f"node-available:{node}") == before - 500_000
    code, failed = await run("settle", started["id"], "--failed")
    assert (code, failed["status"]) == (0, "applied")
    assert await bench.available(f"node-available:{node}") == before
    _, again = await run("payout", node, "0.0005", "--reference", "july-2")
    _, paid = await run("settle", again["id"], "--paid", "--reference", "wire-7")
    assert paid["credits"] == "0.0005"
    code, replayed = await run("settle", again["id"], "--paid", "--reference", "wire-7")
    assert (code, replayed["status"]) == (0, "replayed")
    code, error = await run("settle", again["id"], "--failed")
    assert code and "already" in str(error)
    code, error = await run("settle", "xyz", "--paid")
    assert code and "32 hexadecimal" in str(error)


async def test_fault_a_payout_whose_answer_was_lost_is_paid_once(bench, earned, run):
    node = bench.world.node[0].identity
    before = await bench.available(f"node-available:{node}")
    arguments = ("payout", node, "0.0005", "--rail", "bank", "--reference", "july-17")
    _, first = await run(*arguments)
    code, second = await run(*arguments)
    assert (code, second["status"], second["id"]) == (0, "replayed", first["id"])
    assert await bench.available(f"node-available:{node}") == before - 500_000
    code, error = await run("payout", node, "0.0006", *arguments[3:])
    assert code and error.code == "ID_CONFLICT"
    assert await bench.available(f"node-available:{node}") == before - 500_000


async def test_fault_a_nodes_own_payout_whose_answer_was_lost_is_paid_once(bench, earned, run):
    run.signer = bench.world.node[0]
    node = run.signer.identity
    before = await bench.available(f"node-available:{node}")
    arguments = ("payout", node, "0.0005", "--reference", "july-17")
    _, first = await run(*arguments)
    code, second = await run(*arguments)
    assert (code, second["status"], second["id"]) == (0, "replayed", first["id"])
    assert await bench.available(f"node-available:{node}") == before - 500_000
    # The operator's payout of the same name is another one.
    run.signer = bench.world.signers["admin"]
    _, other = await run(*arguments)
    assert other["status"] == "applied"


def test_fault_a_payout_without_a_reference_could_be_paid_twice_and_is_refused():
    for command in ("payout", "withdraw-bond"):
        arguments = [command, "node", "1", "--market", "m", "--keys", "k"]
        result = CliRunner().invoke(commands, arguments)
        assert result.exit_code == 2
        assert "Missing option '--reference'" in result.output


async def test_fault_a_payout_that_is_settled_at_once_is_settled_once(bench, earned, run):
    node = bench.world.node[0].identity
    before = await bench.available(f"node-available:{node}")
    for number in (1, 2):
        arguments = ("payout", node, "0.0001", "--reference", f"july-{number}", "--settle")
        for _ in range(2):
            result = await run.raw(*arguments)
            assert result.exit_code == 0, result.exception
        assert result.output.count("replayed") == 2
    assert await bench.available(f"node-available:{node}") == before - 200_000


async def test_fault_a_bond_withdrawal_whose_answer_was_lost_is_paid_once(bench, run, monkeypatch):
    world, node = bench.world, bench.world.node[0].identity
    monkeypatch.setattr(money_commands, "load_market", lambda _: world.market)
    monkeypatch.setattr(SystemClock, "now_unix_ms", lambda _: world.now)
    await bench.must("admin", world.bond(node, CREDIT))
    arguments = ("withdraw-bond", node, "0.25", "--reference", "exit-1")
    _, first = await run(*arguments)
    code, second = await run(*arguments)
    assert (code, second["status"], second["id"]) == (0, "replayed", first["id"])
    assert await bench.available(f"node-bond:{node}") == CREDIT * 3 // 4
    code, error = await run("settle", first["id"], "--paid")
    assert code and "may not be paid out yet" in str(error)
    bench.advance(world.window_ms + 2 * 86_400_000)
    # A later day's default is another body: it is refused, never paid again.
    code, error = await run(*arguments)
    assert code and error.code == "ID_CONFLICT"
    code, paid = await run("settle", first["id"], "--paid", "--reference", "wire-9")
    assert (code, paid["credits"]) == (0, "0.25")
    assert await bench.available(f"node-bond:{node}") == CREDIT * 3 // 4


async def test_a_bond_withdrawal_may_name_its_day(bench, run):
    world, node = bench.world, bench.world.node[0].identity
    await bench.must("admin", world.bond(node, CREDIT))
    then = datetime.fromtimestamp((world.now + world.window_ms) / 1000, UTC) + timedelta(days=3)
    given = ("--reference", "exit-1", "--not-before", then.strftime("%Y-%m-%d"))
    assert (await run("withdraw-bond", node, "1", *given))[1]["status"] == "applied"
    far = ("--reference", "exit-2", "--not-before", "2999-01-01")
    code, error = await run("withdraw-bond", node, "1", *far)
    assert code and "not_before" in str(error)


async def payouts(bench, *rails):
    """Pending payouts of the node's earnings, one on each rail; their ids."""
    world = bench.world
    body = {"node_id": world.node[0].identity, "amount_nano": 1000}
    started = [
        pb.Operation(id=world.new_id(), payout_start=pb.PayoutStart(rail=rail, **body))
        for rail in rails
    ]
    await bench.must("admin", *started)
    return [operation.id for operation in started]


def answer(bench, payout_id, reference, paid=True):
    body = pb.PayoutSettle(payout_id=payout_id, paid=paid, reference=reference)
    return pb.Operation(id=bench.world.new_id(), payout_settle=body)


async def test_attack_one_reference_of_a_rail_settles_one_payout_only(bench, earned):
    ids = await payouts(bench, "bank", "bank", "bank", "card", "bank", "bank")
    (first,) = await bench.do("admin", answer(bench, ids[0], "wire-7"))
    assert first.status == pb.Result.APPLIED
    for paid in (True, False):
        (second,) = await bench.do("admin", answer(bench, ids[1], "wire-7", paid))
        assert (second.code, "another payout" in second.message) == ("CONFLICT", True)
    # Another reference, another rail, or none: as before.
    await bench.must("admin", answer(bench, ids[1], "wire-8"))
    await bench.must("admin", answer(bench, ids[3], "wire-7"))
    await bench.must("admin", answer(bench, ids[4], "", False), answer(bench, ids[5], "", False))
    # In one group with each other, and with the payouts that they settle.
    node = bench.world.node[0].identity
    start = pb.PayoutStart(node_id=node, amount_nano=1000, rail="bank")
    new = pb.Operation(id=bench.world.new_id(), payout_start=start)
    both = (answer(bench, ids[2], "wire-9"), answer(bench, new.id, "wire-9"))
    assert [r.code for r in await bench.do("admin", new, *both)] == ["", "", "CONFLICT"]
    late = pb.Operation(id=bench.world.new_id(), payout_start=start)
    results = await bench.do("admin", late, answer(bench, late.id, "wire-8"))
    assert [r.code for r in results] == ["", "CONFLICT"]
    await bench.must("admin", answer(bench, new.id, "wire-10"), answer(bench, late.id, "wire-11"))


async def test_a_deposit_and_a_payout_of_a_rail_may_have_the_same_reference(bench, earned):
    await bench.must("admin", bench.world.deposit("acme", CREDIT, "17"))
    (one,) = await payouts(bench, "bank")
    await bench.must("admin", answer(bench, one, "17"))


def test_a_variable_left_in_the_environment_settles_nothing(monkeypatch):
    for name in ("PAID", "FAILED"):
        monkeypatch.setenv(f"TRUEWEIGHT_LEDGER_SETTLE_{name}", "1")
    arguments = ["settle", "00" * 16, "--market", "m", "--keys", "k"]
    result = CliRunner().invoke(commands, arguments, auto_envvar_prefix="TRUEWEIGHT_LEDGER")
    assert result.exit_code == 2
    assert "Missing option '--paid'" in result.output


async def test_a_limit_holds_from_the_next_hold_on(bench, earned, run):
    world = bench.world
    await run("limit", "key-1", "0.1")
    results = await bench.do(
        "router",
        world.hold("acme", CREDIT // 10, api_key="key-1"),
        world.hold("acme", 1, api_key="key-1"),
    )
    assert [r.code for r in results] == ["", "LIMIT_EXCEEDED"]


async def test_a_budget_for_a_day_is_free_again_the_next_day(bench, earned, run):
    world = bench.world
    await run("limit", "key-1", "0.1", "--per", "day")
    holds = [world.hold("acme", CREDIT // 10, api_key="key-1") for _ in range(2)]
    assert [r.code for r in await bench.do("router", *holds)] == ["", "LIMIT_EXCEEDED"]
    bench.advance(86_400_000)
    again = world.hold("acme", CREDIT // 10, api_key="key-1")
    assert [r.code for r in await bench.do("router", again)] == [""]


async def test_every_audit_is_rewarded_once_however_often_the_command_runs(bench, earned, run):
    world, node = bench.world, bench.world.node[0]
    hold = world.hold("acme", CREDIT // 2)
    second = world.capture(hold.id, Leg(node))
    await bench.must("router", hold, second)
    for capture in (earned, second):
        digest = digest_of(capture.capture.receipts[0])
        await bench.must("verifier", world.request(digest))
        for outcome in (audit_pb2.Verdict.SCORED, audit_pb2.Verdict.UNCALIBRATED):
            await bench.as_("verifier").publish(world.verdict(digest, node.identity, outcome))
    pool = await bench.available("pool:market")
    assert await run("reward", "0.000001") == (0, {"verdicts": 2, "credits": "0.000002"})
    for price in ("0.000001", "0.000002"):
        assert await run("reward", price) == (0, {"verdicts": 0, "credits": "0"})
    verifier = world.identity("verifier")
    assert await bench.available(f"verifier:{verifier}") == 2000
    assert await bench.available("pool:market") == pool - 2000
    # He has it paid out by himself.
    run.signer = world.signers["verifier"]
    code, paid = await run("payout", f"verifier:{verifier}", "0.000002", "--reference", "june")
    assert (code, paid["status"]) == (0, "applied")
    assert await bench.available(f"verifier:{verifier}") == 0
    for account in ("fee:market", "client:acme"):
        code, error = await run("payout", account, "0.000001", "--reference", account)
        assert code and error.code == "PERMISSION_DENIED"


async def test_the_market_is_paid_out_and_clients_get_back_what_they_did_not_spend(
    bench, earned, run
):
    for account in ("fee:market", "client:acme"):
        before = await bench.available(account)
        code, paid = await run("payout", account, "0.000001", "--reference", account)
        assert (code, paid["status"]) == (0, "applied")
        assert await bench.available(account) == before - 1000
    for account in (
        "treasury:market",
        "pool:market",
        f"node-locked:{bench.world.node[0].identity}",
    ):
        code, error = await run("payout", account, "0.000001", "--reference", account)
        assert code and error.code == "INVALID_REQUEST"


async def test_a_deposit_and_a_bond_may_have_one_reference(bench, earned, run):
    node = bench.world.node[0].identity
    for arguments in (("deposit", "client:acme"), ("bond", node)):
        code, done = await run(*arguments, "1", "--rail", "card", "--reference", "invoice-7")
        assert code == 0 or done.code == "CONFLICT", done


async def test_what_remains_owed_is_listed_and_paid_once(bench, earned, run):
    world, node = bench.world, bench.world.node[0].identity
    digest = digest_of(earned.capture.receipts[0])
    # Its earnings were released before, and its bond is a little less.
    share = await bench.available(f"node-available:{node}")
    await bench.must("admin", world.bond(node, share - 1000))
    await bench.must("verifier", world.request(digest), world.refund(digest, node))
    code, rows = await run("debts", "--database", bench.url)
    assert code == 0
    assert [(row["creditor"], row["owed"]) for row in rows] == [("client:acme", "1000")]
    arguments = ("pay-debt", rows[0]["operation"], "client:acme")
    code, error = await run(*arguments)
    assert code and error.code == "INSUFFICIENT_FUNDS"
    # Fees come in.
    hold = world.hold("acme", CREDIT // 2)
    await bench.must("router", hold, world.capture(hold.id, Leg(world.node[1])))
    had = await bench.available("client:acme")
    assert (await run(*arguments))[1]["status"] == "applied"
    assert (await run(*arguments))[1]["status"] == "replayed"
    assert await bench.available("client:acme") == had + 1000
    assert await run("debts", "--database", bench.url) == (0, [])
    body = pb.PayDebt(operation_id=bytes.fromhex(rows[0]["operation"]), creditor="client:acme")
    (again,) = await bench.do("admin", pb.Operation(id=world.new_id(), pay_debt=body))
    assert again.code == "CONFLICT"
    code, error = await run("pay-debt", "00" * 16, "client:acme")
    assert code and error.code == "NOT_FOUND"


async def test_a_conviction_is_taken_back_by_a_command(bench, run, monkeypatch):
    world, node = bench.world, bench.world.node[0]
    monkeypatch.setattr(reinstate_command, "load_market", lambda _: world.market)
    monkeypatch.setattr(reinstate_command, "load_signer", lambda _: world.market_signer)
    await bench.publish_nodes()
    await bench.must("admin", world.bond(node.identity, CREDIT))
    arguments = ("reinstate", node.identity, "--reason", "appeal")
    code, error = await run(*arguments)
    assert code and "not convicted" in str(error)
    await bench.must("verifier", await bench.proven_guilty(node, reward_ppm=0))
    code, facts = await run(*arguments, "--pay-back", "1")
    assert (code, facts["status"], facts["credits"]) == (0, "applied", "1")
    assert await bench.available(f"node-bond:{node.identity}") == CREDIT

"""The treasurer's commands against a running ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from click.testing import CliRunner

from trueweight.ledger import command_support, reinstate_command
from trueweight.ledger.commands import ledger as commands
from trueweight.protos.envelope import digest_of
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
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


@pytest.fixture
async def run(bench, monkeypatch):
    """Runs a command as the administrator; exit code and JSON."""
    loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def connected(*_):
        yield Across(bench.as_("admin"), loop)

    monkeypatch.setattr(command_support, "connected", connected)

    async def invoke(*arguments):
        given = [*arguments, "--json"]
        if "--database" not in arguments:
            given += ["--market", "m", "--keys", "k"]
        result = await asyncio.to_thread(CliRunner().invoke, commands, given)
        if result.exit_code:
            return result.exit_code, result.exception
        return 0, json.loads(result.output)

    return invoke


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
    _, started = await run("payout", node, "0.0005")
    assert await bench.available(f"node-available:{node}") == before - 500_000
    code, failed = await run("settle", started["id"], "--failed")
    assert (code, failed["status"]) == (0, "applied")
    assert await bench.available(f"node-available:{node}") == before
    _, again = await run("payout", node, "0.0005")
    _, paid = await run("settle", again["id"], "--paid", "--reference", "wire-7")
    assert paid["credits"] == "0.0005"
    code, replayed = await run("settle", again["id"], "--paid", "--reference", "wire-7")
    assert (code, replayed["status"]) == (0, "replayed")
    code, error = await run("settle", again["id"], "--failed")
    assert code and "already" in str(error)
    code, error = await run("settle", "xyz", "--paid")
    assert code and "32 hexadecimal" in str(error)


async def test_a_limit_holds_from_the_next_hold_on(bench, earned, run):
    world = bench.world
    await run("limit", "key-1", "0.1")
    results = await bench.do(
        "router",
        world.hold("acme", CREDIT // 10, api_key="key-1"),
        world.hold("acme", 1, api_key="key-1"),
    )
    assert [r.code for r in results] == ["", "LIMIT_EXCEEDED"]


async def test_every_verdict_is_rewarded_once_however_often_the_command_runs(bench, earned, run):
    world = bench.world
    digest = digest_of(earned.capture.receipts[0])
    for outcome in (audit_pb2.Verdict.SCORED, audit_pb2.Verdict.UNCALIBRATED):
        verdict = world.verdict(digest, world.node[0].identity, outcome)
        await bench.as_("verifier").publish(verdict)
    pool = await bench.available("pool:market")
    assert await run("reward", "0.000001") == (0, {"verdicts": 2, "credits": "0.000002"})
    assert await run("reward", "0.000001") == (0, {"verdicts": 0, "credits": "0"})
    assert await bench.available(f"verifier:{world.identity('verifier')}") == 2000
    assert await bench.available("pool:market") == pool - 2000


async def test_what_remains_owed_is_listed(bench, earned, run):
    world, node = bench.world, bench.world.node[0].identity
    digest = digest_of(earned.capture.receipts[0])
    await bench.must("verifier", world.request(digest), world.refund(digest, node))
    code, rows = await run("debts", "--database", bench.url)
    # Its earnings were released before: nobody but the market's shares could pay.
    assert code == 0
    assert [row["creditor"] for row in rows] == ["client:acme"]
    owed = int(rows[0]["owed"])
    charge = CREDIT - await bench.available("client:acme")
    assert owed == charge > 0


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

"""Kill -9 between any two steps: the same verdicts, each published exactly once."""

import asyncio
from collections import Counter

import pytest

from trueweight.protos.blind_verdicts import opening_of
from trueweight.protos.v1.audit_pb2 import (
    AuditRequest,
    Calibration,
    Conviction,
    EpochOpen,
    MarginCommitment,
    Verdict,
)
from trueweight.protos.v1.market_pb2 import Suspension
from trueweight.verifier.app import Connections, VerifierApp

HONEST = [0.0] * 40
WRONG = [3.0] * 50
# Upper bound of outside calls in the scenario below; the last test proves it is one.
STEPS = 40


class Mortal:
    """Everything the verifier talks to, until call number ``last``; then nobody answers any more.

    ``after``: the call still takes effect, but its answer is lost.
    """

    def __init__(self, world, last: int, *, after: bool) -> None:
        self.world, self.last, self.after = world, last, after
        self.calls = 0
        self.dead = asyncio.Event()

    async def _step(self, effect):
        self.calls += 1
        if self.dead.is_set():
            await asyncio.Event().wait()
        if self.calls < self.last:
            return await effect()
        if self.after:
            await effect()
        self.dead.set()
        return await asyncio.Event().wait()

    async def apply(self, operations):
        return await self._step(lambda: self.world.ledger.apply(operations))

    async def balances(self, accounts):
        return await self.world.ledger.balances(accounts)

    async def read_log(self, *args):
        return await self.world.ledger.read_log(*args)

    async def follow_log(self, *args):
        async for entry in self.world.ledger.follow_log(*args):
            yield entry

    async def open(self, *args):
        return await self._step(lambda: self.world.open(*args))

    async def score(self, *args):
        return await self._step(lambda: self.world.score(*args))

    async def close(self):
        pass


def mortal_app(world, mortal) -> VerifierApp:
    return VerifierApp(
        world.market,
        world.verifiers[0],
        Connections(mortal, mortal, mortal),
        data_directory=world.directory / "verifier-0",
        measured=(world.measured(),),
        clock=world.clock,
    )


async def live_until_killed(world, mortal, kit):
    """One life: traffic arrives once the epoch is open; ends at the kill or when all is done."""
    app = mortal_app(world, mortal)
    service = app.service

    def over():
        if service.ready.is_set() and not world.transcripts:
            traffic(world)
        seen = service.view.next_index >= len(world.ledger.entries)
        return mortal.dead.is_set() or (bool(world.transcripts) and seen and service.idle)

    await kit.drive(world, app, over)


def traffic(world):
    for _ in range(2):
        world.serve("good", HONEST)
    for _ in range(4):
        world.serve("bad", WRONG)


def leaves(world):
    """How often each statement is in the log, by what it is about."""
    ledger = world.ledger
    return Counter(
        [("calibration", m.version) for m in ledger.of_kind("calibration", Calibration)]
        + [("epoch", m.epoch) for m in ledger.of_kind("epoch-open", EpochOpen)]
        + [("request", m.receipt_digest) for m in ledger.of_kind("audit-request", AuditRequest)]
        + [
            ("verdict", m.receipt_digest, m.outcome, m.sum_x_nano)
            for m in ledger.of_kind("verdict", Verdict)
        ]
        + [("conviction", m.node_id) for m in ledger.of_kind("conviction", Conviction)]
        + [("suspension", m.node_id) for m in ledger.of_kind("suspension", Suspension)]
    )


def check_complete(world):
    found = leaves(world)
    assert set(found.values()) == {1}, "something was published twice"
    kinds = Counter(key[0] for key in found)
    assert kinds == {
        "calibration": 1,
        "epoch": 1,
        "request": 6,
        "verdict": 6,
        "conviction": 1,
        "suspension": 1,
    }
    outcomes = Counter(key[2] for key in found if key[0] == "verdict")
    assert outcomes == {Verdict.SCORED: 2, Verdict.REFUND: 4}
    assert len(world.ledger.refunds) == 4 and len(world.ledger.convicted) == 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("last", range(1, STEPS, 2))
async def test_killed_at_any_call_it_finishes_the_same_work_once(world, kit, last, after):
    world.add_node("good"), world.add_node("bad")
    await live_until_killed(world, Mortal(world, last, after=after), kit)
    await live_until_killed(world, Mortal(world, 10_000, after=False), kit)
    check_complete(world)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("last", range(14, 34, 3))
async def test_killed_between_commitment_and_verdict_it_publishes_the_committed_one(
    make_world, kit, last, after
):
    world = make_world(verifier_count=2)
    world.add_node("good"), world.add_node("bad")
    await live_until_killed(world, Mortal(world, last, after=after), kit)
    for digest, transcript in world.transcripts.items():  # the engine rounds differently now
        key = tuple(transcript.output_token_ids)
        assert digest and key in world.margins
        world.margins[key] = [m + 0.001 for m in world.margins[key]]
    await live_until_killed(world, Mortal(world, 10_000, after=False), kit)
    assert set(leaves(world).values()) == {1}
    commitments = world.ledger.of_kind("margin-commitment", MarginCommitment)
    verdicts = {v.receipt_digest: v for v in world.ledger.of_kind("verdict", Verdict)}
    assert len(commitments) == len(verdicts) == 6
    assert all(opening_of(verdicts[c.receipt_digest]) == c.commitment for c in commitments)
    assert not list((world.directory / "verifier-0" / "outbox").iterdir())


async def test_killed_again_and_again_it_still_gets_there(world, kit):
    world.add_node("good"), world.add_node("bad")
    lives = 0
    for lives in range(60):
        mortal = Mortal(world, 9 + lives % 3, after=bool(lives % 2))
        await live_until_killed(world, mortal, kit)
        if not mortal.dead.is_set():
            break
    check_complete(world)
    assert lives >= 3


async def test_the_steps_cover_a_whole_life(world, kit):
    world.add_node("good"), world.add_node("bad")
    mortal = Mortal(world, 10_000, after=False)
    await live_until_killed(world, mortal, kit)
    check_complete(world)
    assert mortal.calls < STEPS

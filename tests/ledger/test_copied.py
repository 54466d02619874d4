"""The ledger tells a copied verdict from a blind one, exactly as every fold of the log does."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trueweight.ledger import dockets
from trueweight.ledger.backend import open_backend
from trueweight.ledger.schema import make_engine, migrate, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.blind_verdicts import BLIND_WINDOW_MS, is_copied
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.runtime.clock import ManualClock
from trueweight.simulation.ledger_guilt import (
    audited_by,
    convict_by,
    conviction_of,
    guilt_of,
    verdict_on,
)
from trueweight.simulation.ledger_world import START_UNIX_MS, World
from trueweight.verifier.duplicates import commit
from trueweight.verifier.state import LogView

from .conftest import Bench, fsck
from .test_crash import books_of

CREDIT = 10**9
FIRST, SECOND = "verifier", "verifier1"
BLINDS = (b"b" * 16, b"c" * 16)


@pytest.fixture
async def market(clock, start, database):
    """Opens a market of several verifiers, whose node has a bond and served what the first and the
    last of them will audit."""

    async def run(convictions_needed, verifiers=2):
        world = World(verifiers=verifiers, convictions_needed=convictions_needed)
        last = f"verifier{verifiers - 1}"
        bench = Bench(world, clock, await start(world, database), database)
        await bench.publish_nodes()
        node = world.node[0]
        await bench.must("admin", world.bond(node.identity, CREDIT), world.deposit("acme", 100))
        one = guilt_of(world, node, "acme", FIRST)
        two = audited_by(world, node, one.holds, one.captures, last)
        await bench.must(FIRST, one.calibration)
        await bench.must(last, two.calibration)
        await bench.must("router", *one.holds)
        await bench.must("router", *one.captures)
        await bench.must(FIRST, *one.requests)
        await bench.must(last, *two.requests)
        return bench, one, two

    yield run
    for ledger in start.started:
        await ledger.close()


@pytest.fixture
def market_of_two(market):
    return lambda: market(2)


async def conviction(bench, by):
    """What its audits come to if all of them count."""
    receipts = [leaf.index for leaf in await bench.leaves("receipt")]
    return conviction_of(bench.world, bench.world.node[0], receipts, by)


async def published(bench, by):
    said = await conviction(bench, by)
    await bench.as_(by).publish(seal(said, bench.world.signers[by]))


async def convicts(bench, by):
    """The code with which the ledger answers a verifier that convicts."""
    said = await conviction(bench, by)
    (result,) = await bench.do(by, convict_by(bench.world, said, by=by))
    return result.code


async def bond_of(bench):
    return await bench.available(f"node-bond:{bench.world.node[0].identity}")


async def folded(bench):
    """The log as a verifier sees it."""
    view = LogView(bench.world.market)
    view.registry.manifests[b"m" * 32] = Manifest()
    for entry in await bench.leaves():
        view.apply(entry)
    return view


def commitments_to_something_else(bench, guilt, by):
    """To its verdicts as they would be with margins of zero."""
    for operation in guilt.verdicts:
        verdict = audit_pb2.Verdict.FromString(parse_envelope(operation.publish.envelope).payload)
        verdict.sum_x_nano = 0
        message = commit(verdict, verdict.commitment_blind)
        yield bench.world.publish(seal(message, bench.world.signers[by]))


@pytest.mark.parametrize(
    "how", ["it commits to nothing", "it commits when it has seen", "it commits to something else"]
)
async def test_attack_a_copier_seconds_a_conviction_at_k_2(market_of_two, how):
    """Only one verifier has examined the node; the other says what the first has said."""
    bench, honest, copier = await market_of_two()
    await bench.must(FIRST, *honest.commitments)
    if how == "it commits to something else":
        await bench.must(SECOND, *commitments_to_something_else(bench, copier, SECOND))
    bench.advance(BLIND_WINDOW_MS + 1)
    await bench.must(FIRST, *honest.verdicts)
    if how == "it commits when it has seen":
        await bench.must(SECOND, *copier.commitments)
    await bench.must(SECOND, *copier.verdicts)
    assert await convicts(bench, SECOND) == "CONFLICT"
    await published(bench, SECOND)
    assert await convicts(bench, FIRST) == "CONFLICT"
    assert await bond_of(bench) == CREDIT
    view = await folded(bench)
    assert {v.leaf.message.verifier_id for v in view.verdicts.values() if v.copied} == {
        bench.world.identity(SECOND)
    }
    assert bench.fsck().problems == []


async def test_two_verifiers_that_commit_first_convict_at_k_2(market_of_two):
    bench, one, two = await market_of_two()
    await bench.must(FIRST, *one.commitments)
    await bench.must(SECOND, *two.commitments)
    bench.advance(BLIND_WINDOW_MS + 1)
    await bench.must(FIRST, *one.verdicts)
    await bench.must(SECOND, *two.verdicts)
    await published(bench, FIRST)
    assert await convicts(bench, SECOND) == ""
    assert await bond_of(bench) == 0
    assert bench.fsck().problems == []


@pytest.mark.parametrize("late_ms", [0, 1])
async def test_attack_publishing_early_shuts_nobody_out_within_the_window(market_of_two, late_ms):
    """A commitment counts until the window's last millisecond, whoever judged before."""
    bench, one, two = await market_of_two()
    await bench.must(FIRST, *one.verdicts)
    bench.advance(BLIND_WINDOW_MS + late_ms)
    await bench.must(SECOND, *two.commitments, *two.verdicts)
    await published(bench, FIRST)
    assert await convicts(bench, SECOND) == ("CONFLICT" if late_ms else "")
    assert bench.fsck().problems == []


async def test_a_late_commitment_counts_if_nobody_judged_before_it(market_of_two):
    bench, one, two = await market_of_two()
    bench.advance(BLIND_WINDOW_MS + 1)
    await bench.must(SECOND, *two.commitments)
    await bench.must(FIRST, *one.verdicts)
    await bench.must(SECOND, *two.verdicts)
    await published(bench, FIRST)
    assert await convicts(bench, SECOND) == ""


async def test_attack_a_second_commitment_replaces_the_first(market_of_two):
    bench, _, copier = await market_of_two()
    await bench.must(SECOND, *commitments_to_something_else(bench, copier, SECOND))
    await bench.must(SECOND, *copier.commitments)
    await bench.must(SECOND, *copier.verdicts)
    assert await convicts(bench, SECOND) == "CONFLICT"
    assert bench.fsck().problems == []


async def test_attack_one_that_judged_before_it_asked_judges_again(market_of_two):
    """The first verdict of a verifier on a receipt is the one that counts, or none."""
    bench, one, _ = await market_of_two()
    world, node = bench.world, bench.world.node[0]
    more = guilt_of(world, node, "acme", FIRST)
    await bench.must("router", *more.holds)
    await bench.must("router", *more.captures)
    await bench.must(FIRST, *more.verdicts)
    await bench.must(FIRST, *more.requests)
    for operation in (*one.verdicts, *more.verdicts):
        verdict = audit_pb2.Verdict.FromString(parse_envelope(operation.publish.envelope).payload)
        verdict.issued_at_unix_ms = 1
        verdict.sum_x_nano *= operation in more.verdicts
        await bench.must(FIRST, world.publish(seal(verdict, world.signers[FIRST])))
    case = cases(bench)[FIRST, node.identity]
    line = (await folded(bench)).node(node.identity).lines[world.identity(FIRST)]
    assert case.evidence == line.evidence and line.evidence.scored == 3 and line.waiting == 3
    assert bench.fsck().problems == []


async def test_nobody_copied_from_a_verifier_that_the_market_has_no_more(
    market, start, clock, database
):
    """Who reads the log by the market's new file does not see what that one said."""
    bench, late, former = await market(1, verifiers=3)
    await bench.must("verifier2", *former.verdicts)
    bench.advance(BLIND_WINDOW_MS + 1)
    await bench.must(FIRST, *late.verdicts)
    assert await convicts(bench, FIRST) == "CONFLICT"
    await bench.ledger.close()
    world = World(verifiers=2, now=bench.world.now)
    bench = Bench(world, clock, await start(world, database), database)
    view = await folded(bench)
    assert not any(verdict.copied for verdict in view.verdicts.values())
    assert await convicts(bench, FIRST) == ""


@pytest.mark.parametrize("field", ["receipt_digest", "commitment"])
async def test_attack_a_commitment_that_its_table_cannot_keep(market_of_two, field):
    bench, _, copier = await market_of_two()
    envelope = parse_envelope(copier.commitments[0].publish.envelope)
    message = audit_pb2.MarginCommitment.FromString(envelope.payload)
    for value in (b"", b"x" * 31, b"x" * 10_000):
        setattr(message, field, value)
        sealed = bench.world.publish(seal(message, bench.world.signers[SECOND]))
        (result,) = await bench.do(SECOND, sealed)
        assert result.code == "INVALID_REQUEST"


# -- any order of steps, against the verifiers' fold ------------------------------------------

VERIFIERS = ("verifier", "verifier1", "verifier2")
RECEIPTS = 3
STEP = st.one_of(
    st.tuples(
        st.sampled_from(["ask", "commit", "commit", "judge", "judge"]),
        st.sampled_from(VERIFIERS),
        st.integers(0, RECEIPTS - 1),
        st.sampled_from([0, 0, 0, 1]),  # to or by which of two verdicts
    ),
    st.tuples(st.sampled_from(["wait", "capture"]), st.integers(0, RECEIPTS - 1)),
)


class Play:
    """Takes steps at a ledger, several in one call."""

    def __init__(self, bench):
        self.bench, world = bench, bench.world
        node = world.node[0]
        self.guilt = guilt_of(world, node, "acme")
        self.calibrations = {
            by: audited_by(world, node, [], [], by).calibration for by in VERIFIERS
        }

    async def open(self):
        world = self.bench.world
        await self.bench.publish_nodes()
        await self.bench.must("admin", world.deposit("acme", 100))
        await self.bench.must("router", *self.guilt.holds)
        for by, calibration in self.calibrations.items():
            await self.bench.must(by, calibration)

    async def take(self, steps):
        for kind, *what in steps:
            if kind == "wait":
                self.bench.advance(20_000 * (what[0] + 1))
            elif kind == "capture":
                # Refused if it was captured before, or its hold has expired.
                await self.bench.do("router", self.guilt.captures[what[0]])
        calls = {}
        for kind, *what in steps:
            if kind not in ("wait", "capture"):
                calls.setdefault(what[0], []).append(self.operation(kind, *what))
        # All at once: they meet in one group, or one is judged while another is committed.
        answers = await asyncio.gather(*(self.bench.do(by, *ops) for by, ops in calls.items()))
        assert not [result.message for results in answers for result in results if result.code]

    def operation(self, kind, by, receipt, which):
        world, capture = self.bench.world, self.guilt.captures[receipt]
        if kind == "ask":
            return world.request(digest_of(capture.capture.receipts[0]), by)
        calibration = digest_of(self.calibrations[by].publish.envelope)
        verdict = verdict_on(world, capture, world.node[0], calibration, by)
        verdict.sum_x_nano -= which
        verdict.commitment_blind = BLINDS[which]
        message = commit(verdict, verdict.commitment_blind) if kind == "commit" else verdict
        return world.publish(seal(message, world.signers[by]))


def cases(bench):
    """By verifier and node: the case as the ledger adds it up, read from its database."""
    world, backend, found = bench.world, open_backend(normal_url(bench.url)), {}
    names = {world.identity(name): name for name in world.signers if name.startswith(FIRST)}
    for node in world.node:
        read = dockets.read_cases(backend, {}, tuple(names), (node.identity, 0))
        found |= {(names[verifier], node.identity): case for verifier, case in read.items()}
    backend.close()
    return found


def copied_rows(url, verifiers):
    """(verifier, receipt) -> copied, of each verifier's first verdicts, as the ledger decides."""
    backend, found = open_backend(normal_url(url)), {}
    for verifier in verifiers:
        others = frozenset(verifiers) - {verifier}
        for (node,) in backend.query("SELECT DISTINCT node_id FROM verdict"):
            for judged in dockets._verdicts(backend, (verifier, node), others, 0):
                if judged.row.is_first:
                    copied = is_copied(judged.row.bound_since, judged.first_of_others)
                    found[judged.row.key] = copied
    backend.close()
    return found


async def play(url, batches):
    clock = ManualClock(START_UNIX_MS)
    world = World(verifiers=len(VERIFIERS), convictions_needed=2)
    ledger = Ledger(world.market, world.signers["ledger"], url, clock)
    await ledger.start()
    bench = Bench(world, clock, ledger, url)
    game = Play(bench)
    await game.open()
    # Else hardly anything is about a receipt that is there, or was asked for.
    asked = [("ask", by, receipt, 0) for by in VERIFIERS for receipt in (0, 1)]
    await game.take([("capture", 0), ("capture", 1), *asked])
    for steps in batches:
        await game.take(steps)
    view = await folded(bench)
    await ledger.close()
    return bench, view


def check_agreement(databases, url, batches, seen):
    bench, view = asyncio.run(play(url, batches))
    verifiers = [bench.world.identity(name) for name in VERIFIERS]
    theirs = {key: leaf.copied for key, leaf in view.verdicts.items()}
    assert copied_rows(url, verifiers) == theirs
    seen["copied"] += sum(theirs.values())
    seen["blind"] += len(theirs) - sum(theirs.values())
    for (name, node), case in cases(bench).items():
        line = view.node(node).lines.get(bench.world.identity(name))
        if line is not None:
            assert case.evidence == line.evidence
            assert list(case.counted) == list(line.counted)
            seen["evidence"] += line.evidence.scored
        else:
            assert not case.counted
    assert fsck(url, bench.world).problems == []
    seen["games"] += 1
    if seen["games"] % 3 == 0:
        check_migration(databases, bench, url)


def check_migration(databases, bench, url):
    old = books_of("0008", url, databases)
    assert blind_rows(url) == blind_rows(old, migrated=True)
    assert fsck(old, bench.world).problems == []


def blind_rows(url, migrated=False):
    engine = make_engine(normal_url(url))
    if migrated:
        migrate(engine)
    with engine.connect() as connection:
        found = [
            connection.execute(sa.text(f"SELECT * FROM {table} ORDER BY log_index")).fetchall()  # noqa: S608
            for table in ("margin_commitment", "verdict")
        ]
    engine.dispose()
    return found


def test_ledger_and_verifiers_agree_on_what_was_copied(databases, migrated):
    """Any order of requests, commitments, verdicts and captures; then the same books without what
    the ledger keeps of it, migrated."""
    seen = Counter()

    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(batches=st.lists(st.lists(STEP, min_size=3, max_size=8), min_size=6, max_size=10))
    def agree(batches):
        check_agreement(databases, databases.copy(migrated), batches, seen)

    agree()
    assert min(seen[what] for what in ("copied", "blind", "evidence")) > 10, seen

# ruff: noqa: E501  (one statement per line reads as a table)
"""The public log: indices, proofs, checkpoints, following; and fsck finding every tampering."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.ledger import fsck as fsck_module
from trueweight.ledger import restitution
from trueweight.ledger.archive import archive
from trueweight.ledger.fsck_books import check_books
from trueweight.ledger.leaves import MAX_MOVEMENTS, encode_batches, encode_movement
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.ledger.tiles import Edge, TileReader
from trueweight.ledger.values import REASON_NO, REASONS, Restitution
from trueweight.protos import merkle
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.identity import public_bytes
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg, World, make_signer

from . import test_restitution
from .conftest import Bench, fsck
from .test_money import claim_of, release
from .test_restitution import CLIENTS, SERVED

CREDIT = 10**9
HOUR_MS = 3_600_000


async def test_whoever_stops_following_just_as_the_log_grows_is_let_go(bench):
    """Or a router that restarts at that moment never ends."""
    ledger = bench.ledger

    async def follow():
        async for _ in bench.as_("").follow_log(0):
            pass

    for turns in range(5):
        following = asyncio.ensure_future(follow())
        await asyncio.sleep(0.1)
        ledger._grown.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following}, timeout=2)
        assert following.cancelled(), f"after {turns} turns of the loop"
        ledger._grown = asyncio.Event()


async def some_traffic(bench, requests=3):
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", 10 * CREDIT))
    for number in range(requests):
        hold = world.hold("acme", CREDIT)
        await bench.must("router", hold)
        await bench.must("router", world.capture(hold.id, Leg(world.node[number % 3])))


async def checkpoint_of(bench, size=None):
    for _ in range(100):
        with contextlib.suppress(NotFound):
            found = await bench.as_("").checkpoint()
            if size is None or found.size >= size:
                return found
        await asyncio.sleep(0.05)
    pytest.fail("no checkpoint within 5 s")


async def test_publish_returns_its_index_at_once_and_is_idempotent(bench):
    envelope = bench.world.node[0].key_event
    started = asyncio.get_running_loop().time()
    index = await bench.as_("router").publish(envelope)
    assert asyncio.get_running_loop().time() - started < 0.5
    assert await bench.as_("router").publish(envelope) == index
    (other_id,) = await bench.do("router", bench.world.publish(envelope))
    assert (other_id.log_index, other_id.log_index_known) == (index, True)
    (entry,) = await bench.leaves("key-event")
    assert (entry.index, entry.body) == (index, envelope)


async def test_reading_pages_and_kinds(bench):
    await some_traffic(bench)
    everything = await bench.leaves()
    assert [e.index for e in everything] == list(range(len(everything)))
    reader = bench.as_("")
    place, seen = 0, []
    while True:
        page = await reader.read_log(place, 2, ("receipt", "bill"))
        seen += [(e.index, e.kind) for e in page.entries]
        place = page.next_index
        if place >= page.tree_size:
            break
    assert seen == [(e.index, e.kind) for e in everything if e.kind in ("receipt", "bill")]
    assert not (await reader.read_log(0, 10, ("nonsense",))).entries
    assert not (await reader.read_log(10**6, 10)).entries


async def test_following_gives_old_leaves_then_new_ones(bench):
    await some_traffic(bench, 1)
    seen = []

    async def follow():
        async for entry in bench.as_("").follow_log(0, ("receipt", "verdict")):
            seen.append(entry.kind)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.2)
    assert seen == ["receipt"]
    await bench.as_("verifier").publish(bench.world.verdict(b"r" * 32, "n"))
    for _ in range(40):
        if len(seen) == 2:
            break
        await asyncio.sleep(0.05)
    task.cancel()
    assert seen == ["receipt", "verdict"]


async def test_every_leaf_is_proven_and_old_roots_are_consistent_with_new(bench):
    await some_traffic(bench, 2)
    old = await checkpoint_of(bench)
    await some_traffic_again(bench)
    size = (await bench.as_("").read_log(0, 1)).tree_size
    new = await checkpoint_of(bench, size)
    origin = log_origin(bench.world.market_id)
    key = public_bytes(bench.world.signers["ledger"].key)
    state = open_note(new.note, origin, key)
    assert (state.size, state.root) == (new.size, new.root)
    proof = await bench.as_("").consistency(old.size, new.size)
    merkle.verify_consistency(old.size, old.root, new.size, new.root, list(proof.path))
    for entry in await bench.leaves():
        request = pb.InclusionProofRequest(index=entry.index, tree_size=new.size)
        answer = await bench.as_("").inclusion(request)
        leaf = merkle.leaf_hash(entry.body)
        merkle.verify_inclusion(leaf, entry.index, new.size, list(answer.proof.path), new.root)
        by_hash = await bench.as_("router").inclusion(pb.InclusionProofRequest(leaf_hash=leaf))
        assert by_hash.entry == entry
        if entry.kind != "transfer":
            by = pb.InclusionProofRequest(message_digest=digest_of(entry.body))
            assert (await bench.as_("").inclusion(by)).entry == entry
    with pytest.raises(NotFound):
        await bench.as_("").inclusion(pb.InclusionProofRequest(message_digest=b"x" * 32))
    with pytest.raises(InvalidRequest):
        await bench.as_("").inclusion(pb.InclusionProofRequest(index=0, tree_size=10**6))


async def some_traffic_again(bench):
    hold = bench.world.hold("acme", CREDIT)
    await bench.must("router", hold)
    await bench.must("router", bench.world.capture(hold.id, Leg(bench.world.node[0])))


async def test_the_log_goes_on_after_a_restart(bench, start):
    await some_traffic(bench)
    await bench.ledger.close()
    size = (await checkpoint_after_close(bench)).size
    bench.ledger = await start(bench.world, bench.url)
    await some_traffic_again(bench)
    entries = await bench.leaves()
    assert [e.index for e in entries] == list(range(len(entries)))
    assert len(entries) > size


async def checkpoint_after_close(bench):
    from trueweight.ledger.reader import Reader

    reader = Reader(make_engine(normal_url(bench.url)))
    try:
        return reader.checkpoint()
    finally:
        reader.close()


HASHES = [merkle.leaf_hash(str(i).encode()) for i in range(70_000)]


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 511, 512, 1000, 65_535, 65_536, 66_000])
def test_tiles_give_the_rfc_root_and_every_proof(size):
    edge, tiles = Edge().extend(HASHES[:size])
    assert edge.root() == (merkle.root(HASHES[:size]) if size <= 1000 else reference_root(size))
    stored = {(t.level, t.number): t.hashes for t in tiles}
    reader = TileReader(
        lambda level, number: stored.get((level, number)),
        lambda first, count: HASHES[first : first + count],
    )
    assert reader.edge(size) == edge
    for index in {0, size // 3, size // 2, size - 1} - {-1} if size else ():
        path = merkle.inclusion_path(index, size, reader.fetch)
        merkle.verify_inclusion(HASHES[index], index, size, path, edge.root())


def reference_root(size):
    """RFC 6962 section 2.1, as written."""

    def mth(start, end):
        if end - start == 1:
            return HASHES[start]
        k = 1 << (end - start - 1).bit_length() - 1
        return merkle.node_hash(mth(start, start + k), mth(start + k, end))

    return mth(0, size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=6))
def test_extending_in_any_steps_gives_the_same_tree(steps):
    edge, done = Edge(), 0
    for step in steps:
        edge, _ = edge.extend(HASHES[done : done + step])
        done += step
    assert edge == Edge().extend(HASHES[:done])[0]


NAMES = st.from_regex(r"(client|node-locked|fee):[a-z0-9._:-]{1,100}", fullmatch=True)


MOVEMENTS = st.builds(
    pb.Movement,
    debit_account=NAMES,
    credit_account=NAMES,
    amount_nano=st.integers(0, 2**63 - 1),
    phase=st.integers(1, 5),
    pending_id=st.binary(min_size=16, max_size=20) | st.just(b""),
    reason=st.sampled_from(REASONS),
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(min_size=16, max_size=16),
    st.integers(1, 2**62),
    st.integers(1, 2**62),
    st.lists(MOVEMENTS, min_size=1, max_size=5),
    st.sampled_from((1, 100)),
)
def test_hand_written_leaves_are_what_protobuf_writes(operation, sequence, time, some, repeat):
    movements = some * repeat
    encoded = [
        encode_movement(
            m.debit_account, m.credit_account, m.amount_nano, m.phase, m.pending_id, m.reason
        )
        for m in movements
    ]
    leaves = encode_batches(operation, sequence, time, encoded)
    assert len(leaves) == -(-len(movements) // MAX_MOVEMENTS)
    for place, leaf in enumerate(leaves):
        start = place * MAX_MOVEMENTS
        batch = pb.TransferBatch(
            operation_id=operation,
            first_sequence=sequence + start,
            first_ordinal=start,
            currency="CREDIT",
            created_at_unix_ms=time,
            movements=movements[start : start + MAX_MOVEMENTS],
        )
        assert leaf == batch.SerializeToString()


# -- tampering --------------------------------------------------------------------------------

TAMPERINGS = {
    "a balance is raised": "UPDATE account SET credits_posted = credits_posted + 1 WHERE kind = 1",
    "a transfer's amount is changed": "UPDATE transfer SET amount = amount + 1 WHERE sequence = 4",
    "a transfer is dropped": "DELETE FROM transfer WHERE sequence = 3",
    "the last transfer is dropped": "DELETE FROM transfer WHERE sequence = (SELECT MAX(sequence) FROM transfer)",
    "a transfer goes to somebody else": "UPDATE transfer SET credit = (SELECT no FROM account WHERE kind = 5) WHERE sequence = 6",
    "what a key has spent is forgotten": "DELETE FROM spending",
    "a captured hold is called void": "UPDATE pending SET state = 3 WHERE state = 2",
    "a leg is dropped": "DELETE FROM leg",
    "a leg names another leaf": "UPDATE leg SET log_index = log_index + 1",
    "a transfer hides from a statement": "UPDATE transfer SET reason = 6 WHERE reason = 1",
    "a leg earned more": "UPDATE leg SET node = node + 1, charge = charge + 1",
    "leaves are removed at the end": "DELETE FROM bundle WHERE first_index = (SELECT MAX(first_index) FROM bundle)",
    "leaves are removed in the middle": "DELETE FROM bundle WHERE first_index = 3",
    "a leaf's index entry is dropped": "DELETE FROM evidence WHERE log_index = 1",
    "a checkpoint is for another size": "UPDATE checkpoint SET size = size + 100",
    "an operation is forgotten": "DELETE FROM operation",
    "an account is of another kind": "UPDATE account SET kind = 9 WHERE id = 'treasury:market'",
    "a captured hold was higher": "UPDATE pending SET amount = amount + 1 WHERE state = 2 AND kind = 1",
    "a hold went elsewhere": "UPDATE pending SET credit = 'clearing:zeta' WHERE state = 2 AND kind = 1",
    "a payout is a withdrawal": "UPDATE pending SET kind = 3 WHERE kind = 2",
    "a fee is the pool's": "UPDATE leg SET fee = fee + 1, pool = pool - 1 WHERE refunded = 0 AND pool > 0",
    "a claim's fee is the pool's": "UPDATE leg SET fee = fee + 1, pool = pool - 1 WHERE receipt_digest IN (SELECT c.receipt_digest FROM claim c JOIN pending p ON p.id = c.hold_id WHERE p.state = 4)",
    "a receipt has more tokens": "UPDATE leg SET output_tokens = output_tokens + 1",
    "a checkpoint was signed earlier": "UPDATE checkpoint SET issued_at = issued_at - 1",
    "an account has another currency": "UPDATE account SET currency = 'EURO' WHERE kind = 1",
    "a verdict says more": "UPDATE verdict SET sum_x_nano = sum_x_nano + 1",
    "a verdict is forgotten": "DELETE FROM verdict",
    "a verdict was bound earlier": "UPDATE verdict SET bound_since = 0",
    "a verdict is not its verifier's first": "UPDATE verdict SET is_first = 0",
    "a commitment is forgotten": "DELETE FROM margin_commitment",
    "a commitment came earlier": "UPDATE margin_commitment SET merged_at = merged_at - 1",
    "a commitment is another's": "UPDATE margin_commitment SET verifier_id = 'other'",
    "a commitment is to something else": "UPDATE margin_commitment SET commitment = receipt_digest",
    "a commitment comes from nowhere": "INSERT INTO margin_commitment SELECT log_index + 1, 'other', receipt_digest, merged_at, commitment FROM margin_commitment",
    "an epoch is forgotten": "DELETE FROM audit_step WHERE kind = 1",
    "a calibration is another's": "UPDATE audit_step SET verifier_id = 'other' WHERE kind = 2",
    "a request was for an appeal": "UPDATE audit_request SET for_appeal = 1",
    "a kinds mask hides a leaf": "UPDATE bundle SET kinds = 1 WHERE kinds <> 1",
    "a receipt may be refunded again": "UPDATE leg SET refunded = 0 WHERE refunded > 0",
    "a refund is forgotten": "UPDATE leg SET refunded = 0, refunded_node = 0 WHERE refunded > 0",
    "a node may keep what it gave back": "UPDATE leg SET refunded_node = 0 WHERE refunded_node > 0",
    "a receipt is refunded for nothing": "UPDATE leg SET refunded = charge, refunded_node = node + subsidy WHERE charge > 0 AND refunded = 0",
    "a receipt is refunded in part": "UPDATE leg SET refunded = 1 WHERE refunded > 0",
    "a receipt is another client's": "UPDATE leg SET client = 'client:zeta' WHERE refunded = 0",
    "a receipt was captured earlier": "UPDATE leg SET captured_at = captured_at - 1",
    "releases are forgotten": "UPDATE node SET released = 0 WHERE released > 0 AND reinstated = 0",
    "what was forfeited may be released": "UPDATE node SET released = released - 1 WHERE reinstated > 0",
    "more was released than was earned": "UPDATE node SET released = released + 1000000000 WHERE reinstated > 0",
    "a conviction is forgotten": "UPDATE node SET convicted = 0 WHERE convicted = 1",
    "a node is convicted by nobody": "UPDATE node SET convicted = 1 WHERE convicted = 0",
    "a reinstatement is forgotten": "UPDATE node SET reinstated = 0 WHERE reinstated > 0",
    "a debt is forgotten": "DELETE FROM debt",
    "a debt grows": "UPDATE debt SET amount = amount + 1",
    "a debt is a node's": "INSERT INTO debt SELECT operation_id, 'node-locked:x', 1 FROM debt",
    "a debt comes from nowhere": "UPDATE debt SET operation_id = CAST('x' AS {bytes}) WHERE operation_id IN (SELECT operation_id FROM debt LIMIT 1)",
    "a claim is higher": "UPDATE claim SET charge = charge + 1",
    "a claim is forgotten": "DELETE FROM claim",
    "a claim is another node's": "UPDATE claim SET node_id = 'other'",
    "a claim is for another assignment": "UPDATE claim SET assignment_digest = receipt_digest",
    "a claim has more tokens": "UPDATE claim SET output_tokens = output_tokens + 1",
    "a claim is on another hold": "UPDATE claim SET hold_id = receipt_digest",
    "a deposit may come again": "DELETE FROM reference WHERE kind = 'rail:card'",
    "a deposit's reference is another rail's": "UPDATE reference SET kind = 'rail:bank' WHERE kind = 'rail:card'",
    "a deposit's reference is of another operation": "UPDATE reference SET operation_id = (SELECT operation_id FROM transfer WHERE phase = 2 AND sequence < 4) WHERE kind = 'rail:card'",
    "a reference is of no operation": "UPDATE reference SET operation_id = CAST('x' AS {bytes}) WHERE kind = 'conviction'",
    "a verdict may be rewarded again": "UPDATE reference SET key = key || '00' WHERE kind = 'reward'",
    "a reward's reference is another verifier's": "UPDATE reference SET key = 'x' || key WHERE kind = 'reward'",
    "a payout's reference is of another operation": "UPDATE reference SET operation_id = (SELECT operation_id FROM transfer WHERE sequence = 1) WHERE kind LIKE 'payout:%'",
    "a conviction may be published again": "DELETE FROM reference WHERE kind = 'conviction'",
    "a conviction counts for later receipts": "INSERT INTO reference SELECT key || ':' || '1', kind, operation_id FROM reference WHERE kind = 'conviction'",
    "a reference of an unknown kind": "INSERT INTO reference SELECT key, 'other', operation_id FROM reference",
    "a transfer came later than its operation": "UPDATE transfer SET created_at = created_at + 1 WHERE ordinal = 1",
    "the books are another market's": "UPDATE meta SET value = 'mallory' WHERE key = 'market'",
    "the books are nobody's": "DELETE FROM meta WHERE key = 'market'",
    "transfers may leave the books": "INSERT INTO meta VALUES ('archived_sequence', '2')",
    "all is in another currency": "UPDATE account SET currency = 'EURO'",
    "what adds up to nothing is in another currency": "UPDATE account SET currency = 'EURO' WHERE credits_posted = debits_posted AND credits_pending = debits_pending",
    "a period starts later": "UPDATE spending SET period_from = period_from + 1 WHERE period_ms > 0",
    "a period has started long ago": "UPDATE spending SET period_from = 0 WHERE period_ms > 0",
    "a period is shorter": "UPDATE spending SET period_ms = 1 WHERE period_ms > 0",
    "a period starts in no budget": "UPDATE spending SET period_ms = 0 WHERE period_ms > 0",
    "a period has no number": "UPDATE spending SET period_no = 0, period_spent = 0 WHERE period_ms > 0",
    "a budget allows nothing": "UPDATE spending SET period_limit = 0 WHERE period_ms > 0",
    "a key without a budget has one": "UPDATE spending SET period_limit = 1 WHERE period_ms = 0",
    "a hold is of a period to come": "UPDATE pending SET period_no = period_no + 1 WHERE period_no > 0",
    "a billed claim is higher": "UPDATE claim SET charge = charge + 1 WHERE {billed}",
    "a billed claim is lower": "UPDATE claim SET charge = charge - 1 WHERE {billed}",
    "a billed claim's tokens are forgotten": "UPDATE claim SET output_tokens = NULL WHERE {billed}",
    "a billed claim is forgotten half": "UPDATE claim SET manifest_digest = NULL WHERE {billed}",
    "a billed claim is for other weights": "UPDATE claim SET manifest_digest = receipt_digest WHERE {billed}",
    "a paid claim's tokens are forgotten": "UPDATE claim SET output_tokens = NULL, manifest_digest = NULL WHERE NOT ({billed})",
    "a receipt's tokens are forgotten": "UPDATE leg SET output_tokens = NULL, manifest_digest = NULL WHERE log_index = (SELECT MAX(log_index) FROM leg)",
    "all receipts' tokens are forgotten": "UPDATE leg SET output_tokens = NULL, manifest_digest = NULL",
    "the weights of a receipt are forgotten": "UPDATE leg SET manifest_digest = NULL WHERE log_index = (SELECT MAX(log_index) FROM leg)",
    "a debt is a deposit's": "UPDATE debt SET operation_id = (SELECT operation_id FROM transfer WHERE reason = 1 LIMIT 1) WHERE operation_id = (SELECT MIN(operation_id) FROM debt)",
    "a conviction's reference is a deposit's": "UPDATE reference SET operation_id = (SELECT operation_id FROM transfer WHERE reason = 1 LIMIT 1) WHERE kind = 'conviction'",
    "a conviction's reference is a publication's": "UPDATE reference SET operation_id = (SELECT id FROM operation WHERE log_index = 0) WHERE kind = 'conviction'",
    "one conviction took both references": "UPDATE reference SET operation_id = (SELECT MAX(operation_id) FROM reference WHERE kind = 'conviction') WHERE kind = 'conviction'",
    "a reward is for a key event": "UPDATE reference SET key = '{verifier}:' || (SELECT {digest} FROM evidence e JOIN bundle b ON b.first_index = e.log_index WHERE b.kinds = 8 LIMIT 1) WHERE kind = 'reward'",
    "a node gave back less": "UPDATE leg SET refunded_node = refunded_node - 1 WHERE refunded_node > 0",
    "a node gave back more than it got": "UPDATE leg SET refunded_node = node + subsidy + 1 WHERE refunded_node > 0",
    "a node may be paid back what was not taken": "UPDATE node SET forfeited = -1 WHERE forfeited > 0",
    "a node has released what it has not": "INSERT INTO node SELECT 'nobody', 1, 0, 0, 0",
}  # fmt: skip
# What a row may say besides, in the language of each database.
WORDS = {
    "sqlite": {
        "{bytes}": "BLOB",
        "{digest}": "lower(hex(e.digest))",
        "{long}": "zeroblob(1000)",
        "{empty}": "x''",
    },
    "postgresql": {
        "{bytes}": "BYTEA",
        "{digest}": "encode(e.digest, 'hex')",
        "{long}": "decode(repeat('00', 1000), 'hex')",
        "{empty}": "''::bytea",
    },
}
BILLED = "hold_id IN (SELECT id FROM pending WHERE state = 2)"


def tamper(url, *statements):
    """Changes the database behind the ledger's back, triggers and checks out of the way."""
    engine = make_engine(normal_url(url))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            names = connection.execute(
                sa.text("SELECT name FROM sqlite_master WHERE type='trigger'")
            )
            for (name,) in names.fetchall():
                connection.execute(sa.text(f"DROP TRIGGER {name}"))
            connection.execute(sa.text("PRAGMA ignore_check_constraints = 1"))
        else:
            connection.execute(sa.text("SET session_replication_role = replica"))
            checks = connection.execute(
                sa.text(
                    "SELECT conrelid::regclass, conname FROM pg_constraint "
                    "WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
                )
            )
            for table, name in checks.fetchall():
                connection.execute(sa.text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
        for statement, values in statements:
            changed = connection.execute(sa.text(statement), values)
            assert changed.rowcount > 0, "the tampering hit nothing"
    engine.dispose()


class HandClock(SystemClock):
    """Real time, and what the test puts before it."""

    ahead_ms = 0

    def now_unix_ms(self):
        return super().now_unix_ms() + self.ahead_ms

    def advance_ms(self, ms):
        self.ahead_ms += ms


@pytest.fixture(scope="module")
def finished_books(databases, migrated):
    """Books in which everything has happened that leaves a row behind, closed."""

    async def fill():
        clock = HandClock()
        world = World(now=clock.now_unix_ms(), nodes=4)
        url = databases.copy(migrated)
        ledger = Ledger(world.market, world.signers["ledger"], url, clock)
        await ledger.start()
        bench = Bench(world, clock, ledger, url)
        await some_traffic(bench)
        await settled_otherwise(bench)
        await bench.as_("verifier").publish(world.verdict(b"r" * 32, world.node[0].identity))
        (receipt, *_) = await bench.leaves("receipt")
        who = {"market_id": world.market_id, "verifier_id": world.identity("verifier")}
        for message in (
            audit_pb2.AuditRequest(**who, receipt_digest=digest_of(receipt.body)),
            audit_pb2.MarginCommitment(
                **who, receipt_digest=digest_of(receipt.body), commitment=b"c" * 32
            ),
            audit_pb2.EpochOpen(**who, epoch=1),
            audit_pb2.Calibration(**who, manifest_digest=b"m" * 32, version=1),
        ):
            await bench.as_("verifier").publish(seal(message, world.signers["verifier"]))
        await ledger.close()
        return url, world

    url, world = asyncio.run(fill())
    assert fsck(url, world).problems == []
    return url


async def settled_otherwise(bench):
    """Claims, refunds, releases, payouts, convictions and a reinstatement."""
    world, (honest, claimant, *cheats) = bench.world, bench.world.node
    await bench.must("admin", *(world.bond(n.identity, CREDIT) for n in world.node))
    await bench.must("admin", world.limit("key", 5 * CREDIT, HOUR_MS), world.limit("idle", CREDIT))
    holds = [world.hold("acme", CREDIT) for _ in range(2)]
    await bench.must("router", *holds)
    claims = [claim_of(world, hold.id, Leg(claimant)) for hold in holds]
    bench.advance(50_000)
    await bench.must(claimant.identity, *claims)
    # One of the claims is paid by the router all the same.
    billed = claims[0].claim
    pair = [(billed.assignment, billed.receipt)]
    capture = world.capture_served(billed.hold_id, b"r" * 16, [Leg(claimant)], pair)
    await bench.must("router", capture)
    bench.advance(11_000)
    await bench.must("router", pb.Operation(id=world.new_id(), expire=pb.Expire(limit=10)))
    receipts = [digest_of(leaf.body) for leaf in await bench.leaves("receipt")]
    for digest, node, outcome in (
        (receipts[0], honest, audit_pb2.Verdict.MISSING_TRANSCRIPT),
        (receipts[1], claimant, audit_pb2.Verdict.REFUND),
    ):
        await bench.must("verifier", world.request(digest))
        await bench.must("verifier", world.refund(digest, node.identity, outcome))
    await convicted_both(bench, *cheats)
    await some_traffic_again(bench)
    hold = world.hold("acme", CREDIT, api_key="key")
    await bench.must("router", hold, world.capture(hold.id, Leg(cheats[1])))
    bench.advance(world.window_ms + 1)
    for node in (claimant, honest, cheats[1]):
        await bench.must("verifier", release(world, node.identity))
    # What it earned is released: its bond pays, though all of it is about to be withdrawn.
    leaving = world.withdraw(claimant.identity, CREDIT, world.now + HOUR_MS)
    await bench.must(claimant.identity, leaving)
    digest = receipts[3]
    await bench.must("verifier", world.request(digest), world.refund(digest, claimant.identity))
    start = pb.PayoutStart(node_id=claimant.identity, amount_nano=1, rail="bank")
    payout = pb.Operation(id=world.new_id(), payout_start=start)
    settle = pb.PayoutSettle(payout_id=payout.id, paid=True, reference="transfer-1")
    (verdict, *_) = await bench.leaves("verdict")
    reward = pb.Reward(
        verifier_id=world.identity("verifier"),
        verdict_digest=digest_of(verdict.body),
        amount_nano=1,
    )
    await bench.must(
        "admin",
        payout,
        pb.Operation(id=world.new_id(), payout_settle=settle),
        pb.Operation(id=world.new_id(), reward=reward),
    )


async def convicted_both(bench, *nodes):
    """Convicts both; the second is reinstated."""
    world = bench.world
    for node in nodes:
        convict = await bench.proven_guilty(node)
        hold = world.hold("acme", CREDIT)
        # Undone pro rata by the conviction, which cannot pay for all of it.
        await bench.must("router", hold, world.capture(hold.id, Leg(node)))
        await bench.must("verifier", convict)
    await bench.must("admin", world.reinstate(nodes[1].identity, 1))


@pytest.fixture
def closed_books(databases, finished_books):
    return databases.copy(finished_books)


def in_words(statement, url, world):
    """A statement as the database of these books says it."""
    words = WORDS["sqlite" if url.startswith("sqlite") else "postgresql"]
    words = words | {
        "{billed}": BILLED,
        "{verifier}": world.identity("verifier"),
        "{letters}": f"'{'x' * 1000}'",
        "{reasons}": str(len(REASONS)),
    }
    for word, meaning in words.items():
        statement = statement.replace(word, meaning)
    return statement


@pytest.mark.parametrize("what", TAMPERINGS)
def test_fsck_finds_that(closed_books, world, what):
    tamper(closed_books, (in_words(TAMPERINGS[what], closed_books, world), {}))
    assert not fsck(closed_books, world).clean


SINGLE_REFUNDS = """
SELECT operation_id FROM transfer WHERE reason = :refund AND operation_id NOT IN
(SELECT operation_id FROM transfer WHERE reason IN (:forfeit, :earning))
GROUP BY operation_id ORDER BY MIN(sequence)
"""
REFUNDED = """
SELECT l.receipt_digest, l.refunded_node FROM verdict v
JOIN leg l ON l.receipt_digest = v.receipt_digest AND l.refunded > 0
WHERE v.outcome <> :scored ORDER BY v.log_index
"""
REFERENCE = (
    "INSERT INTO reference (kind, key, operation_id) VALUES ('refund', :key, :operation) "
    "ON CONFLICT (key, kind) DO UPDATE SET operation_id = excluded.operation_id"
)
WHOLE = "UPDATE leg SET refunded_node = node + subsidy WHERE receipt_digest = :digest"


def refunds_of(url):
    """Statements that give each single refund its reference, as ledgers do now; and the receipt
    whose refund a bond has paid."""
    engine = make_engine(normal_url(url))
    with engine.connect() as connection:
        numbers = {name: REASON_NO[name] for name in ("refund", "forfeit", "earning")}
        operations = connection.execute(sa.text(SINGLE_REFUNDS), numbers).scalars().all()
        scored = {"scored": int(audit_pb2.Verdict.SCORED)}
        receipts = connection.execute(sa.text(REFUNDED), scored).fetchall()
    engine.dispose()
    references = [
        (REFERENCE, {"key": bytes(digest).hex(), "operation": bytes(operation)})
        for operation, (digest, _) in zip(operations, receipts, strict=True)
    ]
    *_, (digest, taken_back) = receipts
    assert not taken_back
    return references, bytes(digest)


def test_what_a_bond_has_paid_was_not_taken_from_locked_earnings(closed_books, world):
    references, digest = refunds_of(closed_books)
    tamper(closed_books, *references)
    assert fsck(closed_books, world).problems == []
    tamper(closed_books, (WHOLE, {"digest": digest}))
    (problem,) = fsck(closed_books, world).problems
    assert "more locked" in problem


def test_older_ledgers_marked_what_a_bond_has_paid_as_taken_from_its_node(closed_books):
    """Their refunds took no references; what they keep locked for ever is no finding."""
    references, digest = refunds_of(closed_books)
    forget = ("DELETE FROM reference WHERE kind = 'refund'", {})
    tamper(closed_books, *references, forget, (WHOLE, {"digest": digest}))
    engine = make_engine(normal_url(closed_books))
    # (Their leaves do not say which references they took.)
    found = [p for p in check_books(engine).problems if "differs from the transfers" not in p]
    assert found == []
    for more, said in ((CREDIT, "more"), (-2 * CREDIT, "less")):
        change = "UPDATE node SET released = released + :more WHERE convicted = 0"
        tamper(closed_books, (change, {"more": more}))
        assert any(f"{said} locked" in p for p in check_books(engine).problems)
    engine.dispose()


@pytest.mark.parametrize("how", ["another", "x", "00", "upper"])
def test_a_refunds_reference_is_of_a_receipt_that_is_marked(closed_books, world, how):
    references, digest = refunds_of(closed_books)
    key = {"another": (b"r" * 32).hex(), "upper": digest.hex().upper()}.get(how, how)
    rename = "UPDATE reference SET key = :new WHERE kind = 'refund' AND key = :old"
    tamper(closed_books, *references, (rename, {"new": key, "old": digest.hex()}))
    assert not fsck(closed_books, world).clean


# Refunds in steps: of one conviction the charges are added up, of another half of the receipts are
# refunded, of the third all are, and the fourth was taken back since.
COUNTING, PAYING, FINISHED, TAKEN_BACK = "counting", "paying", "finished", "taken back"
RESTITUTIONS = {
    "more is added up": "UPDATE restitution SET total = total + 1 WHERE node_id = '{counting}'",
    "less is added up": "UPDATE restitution SET total = total - 1 WHERE node_id = '{counting}'",
    "something is refunded before all is added up": "UPDATE restitution SET seen = 1 WHERE node_id = '{counting}'",
    "a receipt is left out of the sum": "UPDATE restitution SET next_index = next_index + 4 WHERE node_id = '{counting}'",
    "adding up begins anew": "UPDATE restitution SET next_index = first_index WHERE node_id = '{counting}'",
    "adding up is over": "UPDATE restitution SET is_counting = 0 WHERE node_id = '{counting}'",
    "adding up is something else": "UPDATE restitution SET is_counting = 2 WHERE node_id = '{counting}'",
    "a receipt was refunded meanwhile": "UPDATE leg SET refunded = charge WHERE node_id = '{counting}' AND charge > 0",
    "shares are smaller": "UPDATE restitution SET total = total + 1 WHERE node_id = '{paying}'",
    "less was refunded": "UPDATE restitution SET seen = seen - 1 WHERE node_id = '{paying}'",
    "both are higher": "UPDATE restitution SET seen = seen + 1, total = total + 1 WHERE node_id = '{paying}'",
    "more was set aside": "UPDATE restitution SET budget = budget + 1 WHERE node_id = '{paying}'",
    "a receipt is left out": "UPDATE restitution SET next_index = next_index + 4 WHERE node_id = '{paying}'",
    "refunds go on in the middle of nothing": "UPDATE restitution SET next_index = next_index + 1 WHERE node_id = '{paying}'",
    "refunds end early": "UPDATE restitution SET next_index = end_index WHERE node_id = '{paying}'",
    "all is added up again": "UPDATE restitution SET is_counting = 1 WHERE node_id = '{paying}'",
    "it begins earlier": "UPDATE restitution SET first_index = first_index - 1 WHERE node_id = '{paying}'",
    "it ends later": "UPDATE restitution SET end_index = end_index + 2 WHERE node_id = '{paying}'",
    "refunds under way are forgotten": "DELETE FROM restitution WHERE node_id = '{paying}'",
    "the sum was higher": "UPDATE restitution SET total = total + 1 WHERE node_id = '{finished}'",
    "the budget was higher": "UPDATE restitution SET budget = budget + 1 WHERE node_id = '{finished}'",
    "finished refunds go on": "UPDATE restitution SET next_index = first_index WHERE node_id = '{finished}'",
    "finished refunds go on without receipts": "UPDATE restitution SET next_index = end_index - 1 WHERE node_id = '{finished}'",
    "what was finished began earlier": "UPDATE restitution SET first_index = 0 WHERE node_id = '{finished}'",
    "what was finished ended later": "UPDATE restitution SET end_index = end_index + 3, next_index = next_index + 3 WHERE node_id = '{finished}'",
    "finished refunds are forgotten": "DELETE FROM restitution WHERE node_id = '{finished}'",
    "finished refunds are another node's": "UPDATE restitution SET node_id = '{taken back}' WHERE node_id = '{finished}'",
    "refunds are a deposit's": "UPDATE restitution SET operation_id = (SELECT operation_id FROM transfer WHERE sequence = 1) WHERE node_id = '{finished}'",
    "a receipt is refunded once more": "UPDATE leg SET refunded = 0, refunded_node = 0 WHERE node_id = '{finished}' AND log_index = (SELECT MIN(log_index) FROM leg WHERE node_id = '{finished}' AND refunded > 0)",
    "what was taken back is forgotten": "DELETE FROM restitution WHERE node_id = '{taken back}'",
    "what was taken back had another budget": "UPDATE restitution SET budget = budget - 1 WHERE node_id = '{taken back}'",
    "what was taken back goes on": "UPDATE restitution SET is_counting = 1 WHERE node_id = '{taken back}'",
    "a node that is free again has released less": "UPDATE node SET released = released - 1 WHERE node_id = '{taken back}'",
    "clients are owed by a step without shares": "UPDATE debt SET operation_id = (SELECT operation_id FROM transfer WHERE sequence = 1) WHERE operation_id = (SELECT MAX(operation_id) FROM debt)",
}  # fmt: skip


def turn_to(market, place):
    """Whatever the market does next is about another of its nodes."""
    nodes = market.world.node
    nodes[0], nodes[place] = nodes[place], nodes[0]
    market.node = nodes[0].identity


def convicted(market, bond):
    """Of what it has served, most is refunded by its conviction, one receipt was before."""
    market.must("admin", market.world.bond(market.node, bond))
    market.serve(1)
    convict = market.accuse()
    market.serve(SERVED)
    market.must("admin", market.refund(market.captures[-2]))
    market.must("verifier", convict)


@pytest.fixture(scope="module")
def refunding_books(databases, migrated):
    return books_with_refunds(databases.copy(migrated))


def books_with_refunds(url):
    """Books with refunds of convictions in every state, and who is in which."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restitution, "REFUNDED", 3)
        patch.setattr(restitution, "COUNTED", 4)
        patch.setattr(test_restitution, "World", partial(World, nodes=4))
        market, nodes = test_restitution.Market(url), {}
        for client in (*CLIENTS, "audited"):
            market.must("admin", market.world.deposit(client, 100 * CREDIT))
        for place, name in enumerate((TAKEN_BACK, FINISHED, PAYING, COUNTING)):
            turn_to(market, place)
            nodes[name] = market.node
            convicted(market, CREDIT if name == TAKEN_BACK else 5_000)
            if name in (TAKEN_BACK, FINISHED):
                market.finish()
            if name == TAKEN_BACK:
                market.must("admin", market.world.reinstate(market.node, by="admin"))
                market.serve(2)
                market.must("admin", market.refund(market.captures[-1]))
            if name == PAYING:
                while market.books._cache.restitutions[market.node].is_counting:
                    market.chore()
                # First come receipts that were free.
                market.chore()
                market.chore()
                market.books._given_up.add(market.node)
            if name == COUNTING:
                market.chore()
        market.books.checkpoint(market.world.now)
        market.books.close()
    assert states_of(url) == {
        nodes[TAKEN_BACK]: "all of it is paid",
        nodes[FINISHED]: "all that there is is paid",
        nodes[PAYING]: "a part is paid",
        nodes[COUNTING]: "a part is counted",
    }
    assert fsck(url, market.world).problems == []
    return url, {f"{{{name}}}": node for name, node in nodes.items()}


def states_of(url):
    engine, found = make_engine(normal_url(url)), {}
    with engine.connect() as connection:
        rows = sa.text(f"SELECT {', '.join(Restitution._fields)} FROM restitution")  # noqa: S608
        for row in connection.execute(rows):
            known = Restitution(*row)
            if known.is_counting and known.total:
                found[known.node_id] = "a part is counted"
            elif 0 < known.seen < known.total:
                found[known.node_id] = "a part is paid"
            elif not known.is_open:
                is_all = known.budget > known.total
                found[known.node_id] = f"all {'of it' if is_all else 'that there is'} is paid"
    engine.dispose()
    return found


def of_nodes(statement, nodes):
    for word, node in nodes.items():
        statement = statement.replace(word, node)
    return statement, {}


@pytest.mark.parametrize("what", RESTITUTIONS)
def test_fsck_finds_of_refunds_that(databases, refunding_books, world, what):
    template, nodes = refunding_books
    url = databases.copy(template)
    tamper(url, of_nodes(RESTITUTIONS[what], nodes))
    assert not fsck(url, world).clean


ARCHIVED = {
    "a hold's operation is forgotten": "DELETE FROM operation WHERE id = (SELECT MIN(id) FROM pending)",
    "more may leave the books": "UPDATE meta SET value = value || '0' WHERE key = 'archived_sequence'",
    "it is another market's": "UPDATE meta SET value = 'mallory' WHERE key = 'market'",
    "a debt is a deposit's": "UPDATE debt SET operation_id = (SELECT operation_id FROM reference WHERE kind = 'rail:card' LIMIT 1) WHERE operation_id = (SELECT MAX(operation_id) FROM debt)",
    "finished refunds are forgotten": RESTITUTIONS["finished refunds are forgotten"],
    "what was taken back is forgotten": RESTITUTIONS["what was taken back is forgotten"],
}  # fmt: skip


@pytest.mark.parametrize("what", ARCHIVED)
def test_fsck_finds_of_archived_books_that(databases, refunding_books, world, tmp_path, what):
    template, nodes = refunding_books
    url, directory = databases.copy(template), tmp_path / "archive"
    engine = make_engine(normal_url(url))
    assert archive(engine, directory, 2**62).transfers > 100
    engine.dispose()
    assert fsck(url, world, directory).problems == []
    tamper(url, of_nodes(ARCHIVED[what], nodes))
    assert not fsck(url, world, directory).clean


# What a database takes, and no ledger writes. Some only SQLite takes.
HOSTILE = {
    "a reason that there is not": "UPDATE transfer SET reason = 1000 WHERE sequence = 4",
    "the reason before the first": "UPDATE transfer SET reason = 0 WHERE sequence = 4",
    "a negative reason": "UPDATE transfer SET reason = reason - {reasons} WHERE sequence = 4",
    "a phase that there is not": "UPDATE transfer SET phase = 9 WHERE sequence = 4",
    "a negative phase": "UPDATE transfer SET phase = phase - 6",
    "a negative amount": "UPDATE transfer SET amount = -amount",
    "a negative amount that looks alike": "UPDATE transfer SET amount = amount - 16384 WHERE amount BETWEEN 1 AND 16383",
    "an amount beyond all others": "UPDATE transfer SET amount = 9223372036854775807",
    "an ordinal beyond all others": "UPDATE transfer SET ordinal = 2147483647",
    "a negative ordinal": "UPDATE transfer SET ordinal = -1 WHERE phase = 2",
    "a sequence beyond all others": "UPDATE transfer SET sequence = 9223372036854775807 WHERE sequence = 4",
    "a negative time": "UPDATE transfer SET created_at = -1",
    "an operation with a long id": "UPDATE transfer SET operation_id = {long} WHERE sequence = 1",
    "an operation without an id": "UPDATE transfer SET operation_id = {empty} WHERE sequence = 1",
    "a pending transfer with a long id": "UPDATE transfer SET pending_id = {long} WHERE phase = 4",
    "an account that does not exist": "UPDATE transfer SET debit = 9223372036854775807",
    "an account with a long name": "UPDATE account SET id = id || {letters}",
    "an account without a name": "UPDATE account SET id = '' WHERE no = 1",
    "an account in other letters": "UPDATE account SET id = 'клиент:я' WHERE no = 1",
    "an account of no kind": "UPDATE account SET kind = -1",
    "a receipt worth more than anything": "UPDATE leg SET charge = 9223372036854775807",
    "a node's part worth more than anything": "UPDATE leg SET node = 9223372036854775807, subsidy = 9223372036854775807",
    "receipts that are nowhere": "UPDATE leg SET log_index = -9223372036854775807",
    "bundles of less than nothing": "UPDATE bundle SET leaves = -1",
    "bundles of very many": "UPDATE bundle SET leaves = 2147483647",
    "bundles without leaves": "UPDATE bundle SET body = {empty}",
    "tiles without hashes": "INSERT INTO tile VALUES (0, 0, {empty})",
    "checkpoints of less than nothing": "UPDATE checkpoint SET size = -size, root = {empty}, note = ''",
    "a claim on less than nothing": "UPDATE claim SET charge = -1",
    "claims without a receipt": "UPDATE claim SET receipt = {empty}",
    "references that are no digests": "UPDATE reference SET kind = 'refund', key = key || 'я'",
    "debts that were paid to nobody": "INSERT INTO reference SELECT '00:x', 'debt', operation_id FROM reference WHERE kind = 'reward'",
    "a debt with a key that is none": "INSERT INTO reference SELECT 'я', 'debt', operation_id FROM reference WHERE kind = 'reward'",
    "periods of less than nothing": "UPDATE spending SET period_ms = -1, period_from = -1, period_no = -1",
    "an archive of less than nothing": "INSERT INTO meta VALUES ('archived_sequence', 'x')",
    "an archive without end": "INSERT INTO meta VALUES ('archived_below', 'x')",
    "a node convicted twice": "UPDATE node SET convicted = 2, released = -9223372036854775807",
    "a node reinstated before": "UPDATE node SET reinstated = -5, forfeited = 9223372036854775807",
}  # fmt: skip
HOSTILE_TO_SQLITE = {
    "a text for an amount": "UPDATE transfer SET amount = 'x' WHERE sequence = 4",
    "a broken amount": "UPDATE transfer SET amount = 5.5 WHERE sequence = 4",
    "an endless amount": "UPDATE transfer SET amount = 1e999 WHERE sequence = 4",
    "a text for an id": "UPDATE transfer SET operation_id = 'x' WHERE sequence = 4",
    "a text for a time": "UPDATE transfer SET created_at = 'x' WHERE sequence = 4",
    "bytes for a reason": "UPDATE transfer SET reason = x'00' WHERE sequence = 4",
    "a number for an account": "UPDATE account SET id = x'00' WHERE no = 1",
    "an account that is no text": "UPDATE account SET id = CAST(x'ff' AS TEXT) WHERE no = 1",
    "a text for a balance": "UPDATE account SET credits_posted = 'x' WHERE no = 1",
    "a text for a hold": "UPDATE pending SET amount = 'x'",
    "a text for a hold's id": "UPDATE pending SET id = 'x' WHERE id = (SELECT MIN(id) FROM pending)",
    "a node that is no text": "UPDATE leg SET node_id = CAST(x'ff' AS TEXT)",
    "a text for a charge": "UPDATE leg SET charge = 'x'",
    "a text for a leaf": "UPDATE leg SET log_index = 'x'",
    "a text for tokens": "UPDATE leg SET output_tokens = 'x'",
    "a number for a receipt": "UPDATE claim SET receipt = 'x'",
    "a text for what was released": "UPDATE node SET released = 'x'",
    "a text for what is owed": "UPDATE debt SET amount = 'x'",
    "a text for what was spent": "UPDATE spending SET spent = 'x'",
    "a text for a period": "UPDATE spending SET period_from = 'x'",
    "bytes for a key": "UPDATE reference SET key = x'ff' WHERE kind = 'reward'",
    "a text for a root": "UPDATE checkpoint SET root = 'x'",
    "bytes for a note": "UPDATE checkpoint SET note = x'ff'",
    "a text for a bundle": "UPDATE bundle SET body = 'x'",
    "a text for a count of leaves": "UPDATE bundle SET leaves = 'x'",
    "a text for a tile": "INSERT INTO tile VALUES (0, 0, 'x')",
    "a text for an operation": "UPDATE operation SET log_index = 'x'",
    "a text for a margin": "UPDATE verdict SET sum_x_nano = 'x'",
    "a text for a request": "UPDATE audit_request SET receipt_digest = 'x' WHERE log_index = (SELECT MIN(log_index) FROM audit_request)",
}  # fmt: skip


@pytest.mark.parametrize("what", [*HOSTILE, *HOSTILE_TO_SQLITE])
def test_whatever_rows_hold_is_a_finding_and_not_an_error(closed_books, world, what):
    if what in HOSTILE_TO_SQLITE and not closed_books.startswith("sqlite"):
        pytest.skip("PostgreSQL does not take it")
    statement = (HOSTILE | HOSTILE_TO_SQLITE)[what]
    tamper(closed_books, (in_words(statement, closed_books, world), {}))
    assert not fsck(closed_books, world).clean


def test_two_processes_find_what_one_finds(closed_books, world, monkeypatch):
    tamper(closed_books, (TAMPERINGS["a balance is raised"], {}))
    tamper(closed_books, (TAMPERINGS["a kinds mask hides a leaf"], {}))
    one = fsck(closed_books, world)
    monkeypatch.setattr(fsck_module, "_WORTH_A_PROCESS", 1)
    two = fsck(closed_books, world)
    assert (one.problems, one.counts) == (two.problems, two.counts) and len(one.problems) > 1


@pytest.mark.parametrize("worth", [1, 10**9])
def test_fsck_tells_how_far_both_halves_are(closed_books, world, monkeypatch, worth):
    monkeypatch.setattr(fsck_module, "_WORTH_A_PROCESS", worth)
    monkeypatch.setattr(fsck_module, "_LOOK_S", 0.001)
    told = {}
    engine = make_engine(normal_url(closed_books))
    found = fsck_module.check(
        engine, world.market_id, progress=lambda what, *far: told.update({what: far})
    )
    engine.dispose()
    assert found.problems == [] and told.keys() == {"transfers", "leaves"}
    assert told["leaves"] == (found.counts["leaves"],) * 2
    assert told["transfers"][1] == found.counts["transfers"]


def test_fsck_finds_a_consistent_forgery_by_the_checkpoints_signature(closed_books, world):
    forged = World()
    forged.signers = {**world.signers, "ledger": make_signer("mallory", world.market_id)}
    forged.market = type(world.market)(
        world.market_id,
        world.market.descriptor,
        world.market.ring.with_key(
            forged.signers["ledger"].identity,
            public_bytes(forged.signers["ledger"].key),
            1,
        ),
    )
    found = fsck(closed_books, forged)
    assert any("not signed by the ledger" in p for p in found.problems)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE account SET debits_posted = credits_posted + 1 WHERE kind = 1",
        "UPDATE account SET credits_pending = -1 WHERE kind = 1",
        "UPDATE transfer SET amount = 1 WHERE sequence = 1",
        "DELETE FROM transfer WHERE sequence = 1",
        "UPDATE pending SET state = 3 WHERE state = 2",
        "DELETE FROM pending WHERE state = 2",
        "UPDATE bundle SET leaves = 0 WHERE first_index = 0",
        "DELETE FROM operation",
        "INSERT INTO transfer SELECT sequence + 1000, operation_id, ordinal + 9, debit, credit, "
        "amount, phase, pending_id, reason, created_at FROM transfer WHERE phase = 3",
        "DELETE FROM leg",
        "UPDATE leg SET node_id = 'other'",
        "UPDATE leg SET captured_at = captured_at - 1",
        "UPDATE leg SET output_tokens = NULL",
        "UPDATE leg SET refunded = 0 WHERE refunded > 0",
        "UPDATE leg SET refunded_node = refunded_node - 1 WHERE refunded_node > 0",
        "DELETE FROM evidence",
        "UPDATE evidence SET log_index = log_index + 1",
        "DELETE FROM claim",
        "UPDATE claim SET charge = charge - 1",
        "DELETE FROM account",
        "UPDATE account SET kind = 9 WHERE kind = 1",
        "UPDATE account SET id = id || 'x'",
        "UPDATE account SET no = no + 1000",
        "UPDATE account SET currency = 'EURO'",
        "DELETE FROM verdict",
        "UPDATE verdict SET bound_since = 0",
        "DELETE FROM margin_commitment",
        "UPDATE margin_commitment SET merged_at = merged_at - 1",
        "INSERT INTO margin_commitment SELECT log_index + 1, verifier_id, receipt_digest, "
        "merged_at, commitment FROM margin_commitment",
        "INSERT INTO verdict SELECT log_index + 1, verifier_id, node_id, receipt_digest, "
        "calibration_digest, parameter_class, sum_x_nano, tokens, outcome, is_first, bound_since "
        "FROM verdict",
    ],
)
def test_the_database_itself_forbids(closed_books, statement):
    engine = make_engine(normal_url(closed_books))
    with pytest.raises(sa.exc.DBAPIError), engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()

"""Evidence that convicts a node in ledger tests: audits at the worst margins, and their wealth.

The audited legs are free for the client, so that they change no balance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.conviction import Evidence, NodeEvidence, change_point_index
from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.identity import Signer
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_world import Leg, World
from trueweight.verifier.duplicates import commit

AUDITS, TOKENS = 3, 256
MU0_NANO = 200_000
CLASS = "plain"
BLIND = b"b" * 16


@dataclass(frozen=True)
class Guilt:
    """Operations that must be applied in this order, each list by the role before it."""

    calibration: pb.Operation
    holds: Sequence[pb.Operation]
    captures: Sequence[pb.Operation]
    requests: Sequence[pb.Operation]
    # They may be left out where nobody else judges the same receipts.
    commitments: Sequence[pb.Operation]
    verdicts: Sequence[pb.Operation]


def guilt_of(world: World, node: Signer, client: str, by: str = "verifier") -> Guilt:
    """Enough to convict a node. The client needs one credit for each of the holds."""
    holds = [world.hold(client, 1) for _ in range(AUDITS)]
    free = Leg(node, output=TOKENS, billed_input=0, billed_output=0)
    captures = [world.capture(hold.id, free) for hold in holds]
    return audited_by(world, node, holds, captures, by)


def audited_by(
    world: World,
    node: Signer,
    holds: Sequence[pb.Operation],
    captures: Sequence[pb.Operation],
    by: str,
) -> Guilt:
    """The same receipts as another verifier audits them."""
    signer = world.signers[by]
    calibration = seal(_calibration(world, by), signer)
    verdicts = [verdict_on(world, c, node, digest_of(calibration), by) for c in captures]
    commitments = [seal(commit(verdict, BLIND), signer) for verdict in verdicts]
    return Guilt(
        world.publish(calibration),
        holds,
        captures,
        [world.request(verdict.receipt_digest, by) for verdict in verdicts],
        [world.publish(commitment) for commitment in commitments],
        [world.publish(seal(verdict, signer)) for verdict in verdicts],
    )


def conviction_of(
    world: World,
    node: Signer,
    receipt_indices: Sequence[int],
    by: str = "verifier",
    zeros: Sequence[tuple[int, int]] = (),
) -> audit_pb2.Conviction:
    """What these audits add up to, with the receipts at these indices of the log. Before them come
    audits that count as zero: index and tokens of their receipts."""
    own, counted = NodeEvidence(), []
    found_before = [Evidence(i + 1, i, 0, n, MU0_NANO, "", "client:x", False) for i, n in zeros]
    found_since = [
        Evidence(index + 1, index, TOKENS * 10**9, TOKENS, MU0_NANO, "", "client:x")
        for index in receipt_indices
    ]
    for found in (*found_before, *found_since):
        own = own.add(found)
        counted.append(found)
        if own.crossed_by is not None:
            break
    return audit_pb2.Conviction(
        market_id=world.market_id,
        verifier_id=world.identity(by),
        node_id=node.identity,
        first_verdict_index=1,
        last_verdict_index=9,
        verdicts=own.wealth.r,
        audited_tokens=own.wealth.tokens,
        wealth_log10_milli=own.wealth.log10_milli,
        threshold_log10_milli=6000,
        change_point_index=change_point_index(counted),
    )


def convict_by(
    world: World, conviction: audit_pb2.Conviction, reward_ppm: int = 100_000, by: str = "verifier"
) -> pb.Operation:
    """The operation that applies a conviction."""
    envelope = seal(conviction, world.signers[by])
    body = pb.Convict(conviction=envelope, reward_ppm=reward_ppm)
    return pb.Operation(id=world.new_id(), convict=body)


def _calibration(world: World, by: str) -> audit_pb2.Calibration:
    entry = audit_pb2.CalibrationEntry(
        parameter_class=CLASS,
        mu0_nano=MU0_NANO,
        upper_bound_nano=MU0_NANO // 2,
        requests=100,
        tokens=10_000,
        refund_above_nano=100_000_000,
    )
    return audit_pb2.Calibration(
        market_id=world.market_id,
        manifest_digest=b"m" * 32,
        version=1,
        entries=[entry],
        verifier_id=world.identity(by),
    )


def verdict_on(
    world: World, capture: pb.Operation, node: Signer, calibration_digest: bytes, by: str
) -> audit_pb2.Verdict:
    """One on a capture's only leg, that holds the worst margins against the node."""
    return audit_pb2.Verdict(
        market_id=world.market_id,
        verifier_id=world.identity(by),
        node_id=node.identity,
        assignment_digest=digest_of(capture.capture.assignments[0]),
        receipt_digest=digest_of(capture.capture.receipts[0]),
        calibration_digest=calibration_digest,
        parameter_class=CLASS,
        sum_x_nano=TOKENS * 10**9,
        scored_tokens=TOKENS,
        outcome=audit_pb2.Verdict.SCORED,
        commitment_blind=BLIND,
    )

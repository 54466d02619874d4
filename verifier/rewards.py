"""What verifiers are paid for an epoch, from public data. Pure.

A verifier sets neither the price nor the quantity: the market's administrator pays so much per
audit that was owed, done in time, not void and not contradicted, once the epoch's secret is
revealed. One missing, unasked, copied or contradicted audit costs the pay of the whole epoch, and
so do void ones that others could score, so that silence, laziness and framing cost more than the
single audit.
"""

from __future__ import annotations

from dataclasses import dataclass

from trueweight.protos.ids import derived_id
from trueweight.protos.v1.ledger_pb2 import Operation, Reward
from trueweight.verifier.owed import DONE, MISSING, PENDING, EpochAccount
from trueweight.verifier.state import LogView


@dataclass(frozen=True, slots=True)
class Payable:
    """Verdicts of one verifier that are paid for, or why none is."""

    verifier_id: str
    verdict_digests: tuple[bytes, ...]
    why_not: str = ""


def payable(view: LogView, account: EpochAccount) -> Payable:
    """What one verifier earned in one epoch."""
    faults = {
        "the secret is not revealed": not account.revealed,
        "audits are missing": account.count(MISSING),
        "audits are still to come": account.count(PENDING),
        "it judged what it did not owe": account.unasked,
        "it copied": account.copied,
        "it called void what others scored": account.is_refuted,
        "another verifier found what noise cannot explain; see the bundles": account.contradicted,
    }
    for why_not, applies in faults.items():
        if applies:
            return Payable(account.verifier_id, (), why_not)
    done = {audit.verdict_index for audit in account.audits if audit.status == DONE}
    digests = [v.leaf.digest for v in view.verdicts.values() if v.leaf.index in done]
    return Payable(account.verifier_id, tuple(digests))


def reward(verifier_id: str, verdict_digest: bytes, amount_nano: int) -> Operation:
    """The payment for one audit; the ledger makes it once, whatever the amount of a repeat."""
    body = Reward(verifier_id=verifier_id, amount_nano=amount_nano, verdict_digest=verdict_digest)
    return Operation(id=derived_id("reward", verifier_id.encode(), verdict_digest), reward=body)

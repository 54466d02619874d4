"""Which receipts are owed an audit, decided from public data and one epoch's secret. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trueweight.protos.audit import is_owed
from trueweight.protos.v1.audit_pb2 import EpochOpen

PPM = 1_000_000
MAX_RATES = 10_000
# The bill of a captured receipt is merged with it; a receipt without one (a node's own claim)
# is waited for this long and then has weight 1.
BILL_GRACE_MS = 10_000


@dataclass(frozen=True, slots=True)
class ReceiptLeaf:
    """A receipt as the log shows it. ``charge_nano`` is None until its bill was seen."""

    index: int
    merged_at_unix_ms: int
    receipt_digest: bytes
    assignment_digest: bytes
    node_id: str
    output_tokens: int
    charge_nano: int | None = None
    router_id: str = ""
    # Account that paid, or empty if the log does not tell.
    client: str = ""


@dataclass(frozen=True, slots=True)
class EpochLeaf:
    """A logged EpochOpen (its rates taken out) and where its rates start to hold."""

    index: int
    message: EpochOpen
    rates_ppm: Mapping[str, int] = field(repr=False)

    def rate_ppm(self, node_id: str) -> int:
        """The frozen rate of a node; newcomers have the default."""
        return min(self.rates_ppm.get(node_id, self.message.default_rate_ppm), PPM)

    @property
    def needs_charge(self) -> bool:
        """True if rates are weighted by the charge."""
        return self.message.charge_reference_nano > 0


def epoch_leaf(index: int, message: EpochOpen) -> EpochLeaf:
    """The leaf with its rates as a table; the first rate of a node counts."""
    bare = EpochOpen()
    bare.CopyFrom(message)
    rates: dict[str, int] = {}
    for rate in bare.rates[:MAX_RATES]:
        rates.setdefault(rate.node_id, rate.rate_ppm)
    del bare.rates[:]
    return EpochLeaf(index, bare, rates)


def epoch_of(epochs: Sequence[EpochLeaf], receipt_index: int) -> EpochLeaf | None:
    """The epoch that a leaf falls into: the last one opened before it."""
    for epoch in reversed(epochs):
        if epoch.index < receipt_index:
            return epoch
    return None


def owes(
    epoch: EpochLeaf, secret: bytes, receipt: ReceiptLeaf, *, asked_by_another: bool = False
) -> bool:
    """True if the epoch's verifier owes this receipt an audit: by its own rate or, if another
    verifier asked for it in time, as a second opinion. Who asked cannot tell which it will be.

    A receipt without a known bill has full weight: rather one audit too many than a node that
    escapes by claiming for itself.
    """
    reference = epoch.message.charge_reference_nano
    charge = receipt.charge_nano if receipt.charge_nano is not None else reference
    rate, digest = epoch.rate_ppm(receipt.node_id), receipt.assignment_digest
    if is_owed(secret, digest, rate, charge, reference):
        return True
    return asked_by_another and is_owed(secret, digest, epoch.message.duplicate_rate_ppm, 0, 0)


def is_decidable(epoch: EpochLeaf, receipt: ReceiptLeaf, now_unix_ms: int) -> bool:
    """False while the receipt's bill, and so its weight, may still come."""
    if not epoch.needs_charge or receipt.charge_nano is not None:
        return True
    return now_unix_ms - receipt.merged_at_unix_ms >= BILL_GRACE_MS

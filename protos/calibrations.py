"""Logged calibrations, and which of them a verdict must cite: for verifiers and ledger alike. Pure.

A calibration binds nobody but its signer: it applies to that verifier's own verdicts on these
weights, from receipts logged after it on, until the same verifier's next version. So whoever
publishes an absurd one convicts, clears or freezes by his own word only, which counts as one of k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trueweight.protos.evidence import MU0_FLOOR_NANO, NANO
from trueweight.protos.money import PPM
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry, CalibrationPair

# Versions of one verifier for one manifest, and entries of one calibration.
MAX_VERSIONS = 256
MAX_ENTRIES = 256
# Of one entry. All pairs of all classes together fit into what the ledger takes as one message.
MAX_PAIRS = 64
MAX_PAIR_NAME_BYTES = 200


def is_usable(entry: CalibrationEntry) -> bool:
    """False for entries that no honest measurement gives (hostile or damaged)."""
    return not fault_of(entry)


def fault_of(entry: CalibrationEntry) -> str:
    """Why no honest measurement gives this entry; empty if one may."""
    in_range = (
        MU0_FLOOR_NANO <= entry.mu0_nano < NANO
        and entry.mu0_nano >= 2 * entry.upper_bound_nano
        and entry.ignored_below_nano < NANO
        and entry.refund_above_nano > 0
        and entry.requests > 0
    )
    if not in_range:
        return "a number of the class is out of range"
    return _fault_of_pairs(entry) if entry.pairs else ""


def _fault_of_pairs(entry: CalibrationEntry) -> str:
    """Why the entry is not what its pairs come to; empty if it is."""
    pairs = entry.pairs
    if len(pairs) > MAX_PAIRS:
        return f"it states more than {MAX_PAIRS} pairs"
    for pair in pairs:
        if fault := _fault_of_pair(pair):
            return f"pair {pair.pair[:MAX_PAIR_NAME_BYTES]!r}: {fault}"
    by_name = {pair.pair: pair for pair in pairs}
    if len(by_name) != len(pairs):
        return "it states a pair twice"
    worst = by_name.get(entry.worst_pair)
    if worst is None:
        return "its worst pair is not among those that it states"
    if entry.upper_bound_nano != max(pair.upper_bound_nano for pair in pairs):
        return "its upper bound is not the largest of its pairs"
    if (entry.upper_bound_nano, entry.mean_nano) != (worst.upper_bound_nano, worst.mean_nano):
        return "its mean and upper bound are not those of its worst pair"
    requests, tokens = (sum(p.requests for p in pairs), sum(p.tokens for p in pairs))
    if (entry.requests, entry.tokens) != (requests, tokens):
        return "its requests and tokens are not the sums of its pairs"
    # Each pair's share is rounded up.
    allowed_ppb = (PPM - entry.confidence_ppm) * (NANO // PPM) + len(pairs)
    if sum(pair.error_ppb for pair in pairs) > allowed_ppb:
        return "the errors of its pairs add up to more than its confidence leaves"
    return ""


def _fault_of_pair(pair: CalibrationPair) -> str:
    size = len(pair.pair.encode())
    if not (0 < size <= MAX_PAIR_NAME_BYTES and pair.pair.isprintable()):
        return f"a name is printable text of 1 to {MAX_PAIR_NAME_BYTES} bytes"
    in_range = (
        0 < pair.requests <= pair.tokens
        and pair.mean_nano <= pair.upper_bound_nano <= NANO
        and 0 < pair.error_ppb < NANO
    )
    return "" if in_range else "a number is out of range"


@dataclass(frozen=True, slots=True)
class CalibrationLeaf:
    """A logged calibration: where, under which digest, whose, and its entries by class."""

    index: int
    digest: bytes
    manifest_digest: bytes
    version: int
    entries: dict[str, CalibrationEntry] = field(repr=False)
    verifier_id: str


def read_calibration(message: Calibration, digest: bytes, index: int) -> CalibrationLeaf:
    """A leaf with its usable entries; the first entry of a class counts."""
    entries: dict[str, CalibrationEntry] = {}
    for entry in message.entries[:MAX_ENTRIES]:
        if is_usable(entry):
            entries.setdefault(entry.parameter_class, entry)
    return CalibrationLeaf(
        index, digest, message.manifest_digest, message.version, entries, message.verifier_id
    )


class CalibrationTable:
    """Every verifier's calibrations, each for its own verdicts."""

    def __init__(self) -> None:
        self._by_digest: dict[tuple[str, bytes], CalibrationLeaf] = {}
        self._by_manifest: dict[tuple[str, bytes], list[CalibrationLeaf]] = {}
        self._manifests: dict[str, list[bytes]] = {}

    def add(self, leaf: CalibrationLeaf) -> bool:
        """False (and nothing happens) if its version does not go forward."""
        key = (leaf.verifier_id, leaf.manifest_digest)
        known = self._by_manifest.get(key, [])
        if len(known) >= MAX_VERSIONS or (known and leaf.version <= known[-1].version):
            return False
        if not known:
            self._by_manifest[key] = known
            self._manifests.setdefault(leaf.verifier_id, []).append(leaf.manifest_digest)
        known.append(leaf)
        self._by_digest[(leaf.verifier_id, leaf.digest)] = leaf
        return True

    def in_force(
        self, verifier_id: str, manifest_digest: bytes, receipt_index: int
    ) -> CalibrationLeaf | None:
        """The calibration by which this verifier judges a receipt at this log index."""
        for leaf in reversed(self._by_manifest.get((verifier_id, manifest_digest), ())):
            if leaf.index < receipt_index:
                return leaf
        return None

    def cited(self, verifier_id: str, digest: bytes, receipt_index: int) -> CalibrationLeaf | None:
        """The calibration of a digest, if it is this verifier's own and in force for the
        receipt."""
        leaf = self._by_digest.get((verifier_id, digest))
        if leaf is None:
            return None
        newest = self.in_force(verifier_id, leaf.manifest_digest, receipt_index)
        return leaf if newest is leaf else None

    def covers(self, verifier_id: str, parameter_class: str, receipt_index: int) -> bool:
        """True if for any weights a calibration of this verifier that is in force for the receipt
        has this class."""
        for manifest in self._manifests.get(verifier_id, ()):
            leaf = self.in_force(verifier_id, manifest, receipt_index)
            if leaf is not None and parameter_class in leaf.entries:
                return True
        return False

    def newest(self, verifier_id: str) -> list[CalibrationLeaf]:
        """A verifier's newest calibration for each of the weights that it has any for."""
        return [
            self._by_manifest[(verifier_id, manifest)][-1]
            for manifest in self._manifests.get(verifier_id, ())
        ]

    def all(self) -> list[CalibrationLeaf]:
        """Every accepted calibration in log order."""
        return sorted(self._by_digest.values(), key=lambda c: c.index)

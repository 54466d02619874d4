"""Logged calibrations, and which of them a verdict must cite: for verifiers and ledger alike. Pure.

A calibration binds nobody but its signer: it applies to that verifier's own verdicts on these
weights, from receipts logged after it on, until the same verifier's next version. So whoever
publishes an absurd one convicts, clears or freezes by his own word only, which counts as one of k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trueweight.protos.evidence import MU0_FLOOR_NANO, NANO
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry

# Versions of one verifier for one manifest, and entries of one calibration.
MAX_VERSIONS = 256
MAX_ENTRIES = 256


def is_usable(entry: CalibrationEntry) -> bool:
    """False for entries that no honest measurement gives (hostile or damaged)."""
    return (
        MU0_FLOOR_NANO <= entry.mu0_nano < NANO
        and entry.mu0_nano >= 2 * entry.upper_bound_nano
        and entry.ignored_below_nano < NANO
        and entry.refund_above_nano > 0
        and entry.requests > 0
    )


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

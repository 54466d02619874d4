"""Calibration: what honest noise looks like per manifest and parameter class, and when it applies.

Pure: measured margins in, ``CalibrationEntry`` out; logged calibrations in, the entry that a
verdict must cite out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trueweight.protos.evidence import MU0_FLOOR_NANO
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry
from trueweight.verifier.bounds import CONFIDENCE, MeanBound, upper_bound

NANO = 10**9
# A request is "far outside" only well above any honest one: see ``is_far_outside``.
REFUND_FLOOR_NANO = 100_000_000
REFUND_CEILING_NANO = 300_000_000
_REFUND_FACTOR = 3
# A mean over fewer tokens than this is no mean; such requests are judged as if they had so many.
SHORT_TOKENS = 8
# However long a request is, its client is not refunded for less than so many times the null mean.
REFUND_TIMES_NULL = 10
MAX_VERSIONS = 256


@dataclass(frozen=True, slots=True)
class PairSample:
    """Honest requests of one class under one benign pair: x per token, request by request.

    ``pair`` is for people: "vllm bf16 batch 32 / transformers fp32".
    """

    pair: str
    requests: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(len(r) for r in self.requests)


@dataclass(frozen=True, slots=True)
class PairResult:
    """A pair's bound, and the most that one honest request of it had: its sum of x over
    ``_spread`` of its length."""

    pair: str
    bound: MeanBound
    requests: int
    worst_request_nano: int


def measure(sample: PairSample, confidence: float = CONFIDENCE) -> PairResult:
    """The upper confidence bound of one pair's mean x, its requests being the units."""
    requests = [r for r in sample.requests if r]
    sums = [sum(r) / NANO for r in requests]
    bound = upper_bound(sums, [len(r) for r in requests], confidence)
    levels = [sum(r) // _spread(len(r)) for r in requests]
    return PairResult(sample.pair, bound, len(requests), max(levels, default=0))


def calibrate_class(parameter_class: str, samples: Sequence[PairSample]) -> CalibrationEntry:
    """The entry of one class from its benign pairs; the worst pair decides.

    The confidence is for all pairs together: each is measured at 1 - (1 - confidence) / pairs.
    """
    if not samples:
        raise ValueError("a class is calibrated from at least one pair")
    confidence = 1 - (1 - CONFIDENCE) / len(samples)
    results = [measure(s, confidence) for s in samples]
    worst = max(results, key=lambda r: r.bound.upper)
    upper_nano = _ceil_nano(worst.bound.upper)
    refund = _REFUND_FACTOR * max(r.worst_request_nano for r in results)
    return CalibrationEntry(
        parameter_class=parameter_class,
        worst_pair=worst.pair,
        mu0_nano=max(MU0_FLOOR_NANO, 2 * upper_nano),
        mean_nano=round(worst.bound.mean * NANO),
        upper_bound_nano=upper_nano,
        confidence_ppm=round(CONFIDENCE * 1e6),
        requests=sum(r.requests for r in results),
        tokens=sum(r.bound.tokens for r in results),
        refund_above_nano=min(REFUND_CEILING_NANO, max(REFUND_FLOOR_NANO, refund)),
    )


def _ceil_nano(value: float) -> int:
    return min(NANO, int(np.ceil(value * NANO)))


def is_usable(entry: CalibrationEntry) -> bool:
    """False for entries that no honest measurement gives (hostile or damaged)."""
    return (
        MU0_FLOOR_NANO <= entry.mu0_nano < NANO
        and entry.mu0_nano >= 2 * entry.upper_bound_nano
        and entry.refund_above_nano > 0
        and entry.requests > 0
    )


def is_far_outside(sum_x_nano: int, tokens: int, entry: CalibrationEntry) -> bool:
    """True if one request alone is so far outside that its client is refunded at once: three
    times what any honest request showed when the class was calibrated, or more."""
    by_chance = entry.refund_above_nano * _spread(tokens)
    return sum_x_nano > max(by_chance, REFUND_TIMES_NULL * entry.mu0_nano * tokens)


def _spread(tokens: int) -> int:
    """How the chance part of an honest request's sum of x grows: with the root of its length."""
    return math.isqrt(SHORT_TOKENS * max(tokens, SHORT_TOKENS))


@dataclass(frozen=True, slots=True)
class CalibrationLeaf:
    """A logged calibration: where, under which digest, and its entries by class."""

    index: int
    digest: bytes
    manifest_digest: bytes
    version: int
    entries: dict[str, CalibrationEntry] = field(repr=False)


def read_calibration(message: Calibration, digest: bytes, index: int) -> CalibrationLeaf:
    """A leaf with its usable entries; the first entry of a class counts."""
    entries: dict[str, CalibrationEntry] = {}
    for entry in message.entries[:MAX_VERSIONS]:
        if is_usable(entry):
            entries.setdefault(entry.parameter_class, entry)
    return CalibrationLeaf(index, digest, message.manifest_digest, message.version, entries)


class CalibrationTable:
    """Logged calibrations; each applies to receipts logged after it, until a higher version."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, CalibrationLeaf] = {}
        self._by_manifest: dict[bytes, list[CalibrationLeaf]] = {}

    def add(self, leaf: CalibrationLeaf) -> bool:
        """False (and nothing happens) if its version does not go forward."""
        known = self._by_manifest.setdefault(leaf.manifest_digest, [])
        if len(known) >= MAX_VERSIONS or (known and leaf.version <= known[-1].version):
            return False
        known.append(leaf)
        self._by_digest[leaf.digest] = leaf
        return True

    def in_force(self, manifest_digest: bytes, receipt_index: int) -> CalibrationLeaf | None:
        """The calibration that a receipt at this log index is judged by."""
        found = [c for c in self._by_manifest.get(manifest_digest, ()) if c.index < receipt_index]
        return found[-1] if found else None

    def cited(self, digest: bytes, receipt_index: int) -> CalibrationLeaf | None:
        """The calibration of a digest, if it is the one in force for this receipt."""
        leaf = self._by_digest.get(digest)
        if leaf is None or self.in_force(leaf.manifest_digest, receipt_index) is not leaf:
            return None
        return leaf

    def all(self) -> list[CalibrationLeaf]:
        """Every accepted calibration in log order."""
        return sorted(self._by_digest.values(), key=lambda c: c.index)

"""Calibration: what honest noise looks like per pair of node and reference and parameter class.

Pure: measured margins in, ``CalibrationEntry`` out. When a logged calibration applies is in
``protos.calibrations``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.evidence import MU0_FLOOR_NANO, counted_nano
from trueweight.protos.sampling_parameters import CALIBRATED_CLASSES
from trueweight.protos.v1.audit_pb2 import CalibrationEntry, CalibrationPair
from trueweight.verifier.bounds import CONFIDENCE, MeanBound, upper_bound

NANO = 10**9
# A request is "far outside" only well above any honest one: see ``is_far_outside``.
REFUND_FLOOR_NANO = 100_000_000
REFUND_CEILING_NANO = 300_000_000
_REFUND_FACTOR = 3
# A mean over fewer tokens than this is no mean; such requests are judged as if they had so many.
SHORT_TOKENS = 8
# Where honest nodes take another token than the reference, margins are normal rounding noise seen
# from one side: nine in ten are below 1.36 of its standard deviations. What counts begins at two of
# them, beyond which rounding decides one near tie in 44. Rounded up, so that verifiers who
# measured the same noise ignore the same.
NOISE_QUANTILE = 0.9
IGNORED_QUANTILES = 2 / 1.36
IGNORED_STEP_NANO = 10_000_000
IGNORED_CEILING_NANO = 400_000_000
# However long a request is, its client is not refunded for less than so many times the null mean.
REFUND_TIMES_NULL = 10


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
    confidence: float

    @property
    def row(self) -> CalibrationPair:
        """As it is stated. Bounds are rounded up, the chance of error too."""
        return CalibrationPair(
            pair=self.pair,
            requests=self.requests,
            tokens=self.bound.tokens,
            mean_nano=min(round(self.bound.mean * NANO), self.upper_nano),
            upper_bound_nano=self.upper_nano,
            # 1 - confidence is off by some 10^-16: that is no reason to round up.
            error_ppb=math.ceil(round((1 - self.confidence) * 1e9, 3)),
        )

    @property
    def upper_nano(self) -> int:
        """The bound in 10^-9, rounded up."""
        return min(NANO, math.ceil(self.bound.upper * NANO))


def ignored_below_nano(samples: Sequence[PairSample]) -> int:
    """Below which x a token counts as 0: what rounding alone may do, in the noisiest pair."""
    noise = max((_noise_nano(s) for s in samples), default=0)
    steps = math.ceil(IGNORED_QUANTILES * noise / IGNORED_STEP_NANO)
    return min(IGNORED_CEILING_NANO, steps * IGNORED_STEP_NANO)


def _noise_nano(sample: PairSample) -> int:
    """That quantile of the x of tokens in which node and reference differ; 0 if there are none."""
    found = sorted(x for request in sample.requests for x in request if x)
    return found[math.ceil(NOISE_QUANTILE * len(found)) - 1] if found else 0


def measure(
    sample: PairSample, ignored_nano: int = 0, confidence: float = CONFIDENCE
) -> PairResult:
    """The upper confidence bound of one pair's mean x, its requests being the units."""
    requests = [r for r in sample.requests if r]
    counted = [counted_nano(r, ignored_nano) for r in requests]
    lengths = [len(r) for r in requests]
    bound = upper_bound([total / NANO for total in counted], lengths, confidence)
    levels = [total // _spread(n) for total, n in zip(counted, lengths, strict=True)]
    return PairResult(sample.pair, bound, len(requests), max(levels, default=0), confidence)


def calibrate_class(parameter_class: str, samples: Sequence[PairSample]) -> CalibrationEntry:
    """The entry of one class from its benign pairs; the worst pair decides.

    The confidence is for all pairs of all classes together, whether they are measured at once or
    one by one: each pair's chance of error is the whole one over pairs and classes.
    """
    if not samples or len({s.pair for s in samples}) != len(samples):
        raise ValueError("a class is calibrated from at least one pair, each once")
    class_error = (1 - CONFIDENCE) / len(CALIBRATED_CLASSES)
    confidence = 1 - class_error / len(samples)
    ignored = ignored_below_nano(samples)
    results = [measure(s, ignored, confidence) for s in samples]
    worst = max(results, key=lambda r: r.bound.upper)
    decides = worst.row
    refund = _REFUND_FACTOR * max(r.worst_request_nano for r in results)
    return CalibrationEntry(
        parameter_class=parameter_class,
        worst_pair=worst.pair,
        mu0_nano=max(MU0_FLOOR_NANO, 2 * decides.upper_bound_nano),
        mean_nano=decides.mean_nano,
        upper_bound_nano=decides.upper_bound_nano,
        confidence_ppm=math.floor((1 - class_error) * 1e6),
        requests=sum(r.requests for r in results),
        tokens=sum(r.bound.tokens for r in results),
        refund_above_nano=min(REFUND_CEILING_NANO, max(REFUND_FLOOR_NANO, refund)),
        ignored_below_nano=ignored,
        pairs=[r.row for r in results],
    )


def is_far_outside(sum_x_nano: int, tokens: int, entry: CalibrationEntry) -> bool:
    """True if one request alone is so far outside that its client is refunded at once: three
    times what any honest request showed when the class was calibrated, or more."""
    by_chance = entry.refund_above_nano * _spread(tokens)
    return sum_x_nano > max(by_chance, REFUND_TIMES_NULL * entry.mu0_nano * tokens)


def _spread(tokens: int) -> int:
    """How the chance part of an honest request's sum of x grows: with the root of its length."""
    return math.isqrt(SHORT_TOKENS * max(tokens, SHORT_TOKENS))

"""Canonical sampling tw-gumbel-1: the numpy reference. docs/sampling.md describes it in words.

Generation and scoring share the forward half (``process_row``, ``perturb``); only the last step
differs: ``sample_rows`` takes the argmax, ``score_rows`` measures how far a claimed token is
from it. Everything is per row of logits, so callers may work in row blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.evidence import CLIP_LOGIT
from trueweight.protos.sampling_noise import F32, gumbel, hash_u32, position
from trueweight.protos.sampling_parameters import Sampling, parameter_class, resolve

__all__ = [
    "CLIP_LOGIT",
    "MASS_LADDER",
    "MAX_MARGIN",
    "SAMPLER_ID",
    "Perturbed",
    "Row",
    "RowScore",
    "Sampling",
    "cut_threshold",
    "gumbel",
    "hash_u32",
    "margin_of",
    "parameter_class",
    "perturb",
    "position",
    "process_row",
    "resolve",
    "rows_of",
    "sample",
    "sample_rows",
    "score_row",
    "score_rows",
    "shifted_top_p",
]

SAMPLER_ID = "tw-gumbel-1"
MAX_MARGIN = 1000.0
MASS_LADDER = (1 / 32, 1 / 16, 1 / 8)
"""Roundings, in logits, that are tried as an explanation of what top-p cut off or let in."""
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What decides one output token besides the logits.

    ``output[:length]`` is everything produced before it (prefix included), so that the rows of
    one request share their sequences. ``mask`` is the grammar's: True where a token is allowed.
    """

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    length: int
    mask: Mask | None = None

    @property
    def pos(self) -> int:
        return position(len(self.prompt), self.length)


@dataclass(frozen=True, slots=True)
class RowScore:
    """``margin`` in logits, 0 if the claimed token is the canonical one, at most 1000;
    log-probability and rank (0 is the best) of the claimed token under the raw logits."""

    margin: float
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, eq=False)
class Perturbed:
    """The forward half's result for one row.

    ``processed``: logits after masks, biases and penalties; ``noisy``: ``processed / T + g``, or
    ``processed`` at T = 0; ``threshold``: smallest allowed ``processed / T`` (-inf without cuts).
    ``scaled`` is ``processed / T``.
    """

    processed: F32
    scaled: F32
    noisy: F32
    threshold: float


def rows_of(
    sampling: Sampling,
    seed: int,
    prompt: Sequence[int],
    prefix: Sequence[int],
    output: Sequence[int],
    *,
    count: int,
    masks: Sequence[Mask] | None = None,
) -> list[Row]:
    """The rows of ``count`` consecutive output tokens after a prefix; ``output`` holds the
    tokens of this leg (at least the first ``count - 1``)."""
    history = [*prefix, *output]
    return [
        Row(sampling, seed, prompt, history, len(prefix) + j, masks[j] if masks else None)
        for j in range(count)
    ]


def sample(
    logits: F32,
    sampling: Sampling,
    seed: int,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    mask: Mask | None = None,
) -> int:
    """The canonical next token. ``output`` is everything produced so far, prefix included."""
    row = Row(sampling, seed, prompt, output, len(output), mask)
    return sample_rows(np.asarray(logits)[None, :], [row])[0]


def score_row(  # noqa: PLR0917
    logits: F32,
    sampling: Sampling,
    seed: int,
    prompt: Sequence[int],
    output: Sequence[int],
    claimed: int,
    *,
    mask: Mask | None = None,
    clip: float = CLIP_LOGIT,
) -> RowScore:
    """How far ``claimed`` is from the canonical next token after ``output``."""
    row = Row(sampling, seed, prompt, output, len(output), mask)
    return score_rows(np.asarray(logits)[None, :], [row], [claimed], clip)[0]


def sample_rows(logits: F32, rows: Sequence[Row]) -> list[int]:
    """Canonical tokens of a block of rows, ``logits`` of shape (rows, vocabulary)."""
    return [_argmax(perturb(line, row)) for line, row in zip(logits, rows, strict=True)]


def score_rows(
    logits: F32, rows: Sequence[Row], claimed: Sequence[int], clip: float = CLIP_LOGIT
) -> list[RowScore]:
    """Scores of a block of rows, one claimed token each."""
    return [
        _score(line, row, token, clip)
        for line, row, token in zip(logits, rows, claimed, strict=True)
    ]


# --- forward half --------------------------------------------------------------------------


def perturb(logits: F32, row: Row) -> Perturbed:
    """Processed and noisy logits and the cut of one row."""
    processed = process_row(logits, row)
    temperature = row.sampling.temperature
    if temperature == 0.0:
        return Perturbed(processed, processed, processed, -np.inf)
    scaled = processed if temperature == 1.0 else processed / np.float32(temperature)
    noisy = scaled + gumbel(row.seed, row.pos, len(scaled))
    return Perturbed(processed, scaled, noisy, cut_threshold(scaled, row.sampling))


def process_row(logits: F32, row: Row) -> F32:
    """Steps 1 to 4 of the order: grammar mask; biases, allowed ids, min_tokens; penalties; bad
    words. Returns a new fp32 row. Raises EngineError on NaN or +inf."""
    out = np.array(logits, dtype=np.float32)
    if not np.max(out, initial=-np.inf) < np.inf:
        raise EngineError("the logits hold NaN or +inf")
    _apply_grammar(out, row)
    _apply_bias(out, row.sampling)
    _apply_min_tokens(out, row)
    _apply_penalties(out, row)
    _apply_bad_words(out, row)
    return out


def _apply_grammar(out: F32, row: Row) -> None:
    if row.mask is None:
        if row.sampling.grammar_sha256:
            raise InvalidRequest("a request with a grammar needs its token mask", param="grammar")
        return
    out[~row.mask] = -np.inf


def _apply_bias(out: F32, sampling: Sampling) -> None:
    for token, bias in sampling.logit_bias:
        out[token] += np.float32(bias)
    if sampling.allowed_token_ids:
        allowed = np.zeros(len(out), dtype=np.bool_)
        allowed[list(sampling.allowed_token_ids)] = True
        out[~allowed] = -np.inf


def _apply_min_tokens(out: F32, row: Row) -> None:
    stops = list(row.sampling.stop_token_ids)
    if row.length >= row.sampling.min_tokens or not stops:
        return
    kept = out[stops].copy()
    out[stops] = -np.inf
    # A grammar that allows nothing but the end wins over min_tokens.
    if row.mask is not None and np.max(out) == -np.inf:
        out[stops] = kept


def _apply_penalties(out: F32, row: Row) -> None:
    sampling = row.sampling
    if not sampling.has_penalties:
        return
    counts = _counts(row.output[: row.length], len(out))
    if sampling.repetition_penalty != 1.0:
        seen = (counts > 0) | (_counts(row.prompt, len(out)) > 0)
        penalty = np.float32(sampling.repetition_penalty)
        # Multiplying by the fp32 reciprocal, not dividing, is what vLLM does.
        factor = np.where(out > 0, np.float32(1.0) / penalty, penalty)
        np.multiply(out, factor, out=out, where=seen)
    out -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    out -= np.float32(sampling.presence_penalty) * (counts > 0).astype(np.float32)


def _counts(ids: Sequence[int], vocabulary_size: int) -> NDArray[np.intp]:
    array = np.asarray(ids, dtype=np.int64)
    return np.bincount(array[array < vocabulary_size], minlength=vocabulary_size)


def _apply_bad_words(out: F32, row: Row) -> None:
    for word in row.sampling.bad_words:
        start = row.length - (len(word) - 1)
        # Only output counts: a word begun in the prompt is not completed by the model.
        if start >= 0 and tuple(row.output[start : row.length]) == word[:-1]:
            out[word[-1]] = -np.inf


def cut_threshold(scaled: F32, sampling: Sampling) -> float:
    """Smallest allowed value of ``processed / T``: the highest of the min-p, top-k and top-p cuts.

    Values at the threshold are kept, so cuts by value keep ties and their intersection is again
    one threshold. Top-p is renormalised over what min-p and top-k left.
    """
    if not sampling.cuts or np.max(scaled) == -np.inf:
        return -np.inf
    threshold = _cut_before_top_p(scaled, sampling)
    if sampling.top_p < 1.0:
        threshold = max(threshold, _top_p_threshold(scaled, threshold, sampling.top_p))
    return threshold


def _cut_before_top_p(scaled: F32, sampling: Sampling) -> float:
    """The higher of the min-p and top-k cuts; -inf without."""
    threshold = -np.inf
    if sampling.min_p > 0.0:
        threshold = float(np.max(scaled) + np.log(np.float32(sampling.min_p)))
    if 0 < sampling.top_k < len(scaled):
        kth = np.partition(scaled, len(scaled) - sampling.top_k)[len(scaled) - sampling.top_k]
        threshold = max(threshold, float(kth))
    return threshold


def _top_p_threshold(scaled: F32, above: float, top_p: float) -> float:
    left = np.sort(scaled[(scaled >= above) & (scaled > -np.inf)])[::-1]
    weights = np.exp(left.astype(np.float64) - float(left[0]))
    before = np.cumsum(weights) - weights
    # A token stays if those more likely than it hold less than top_p together; the first always.
    kept = int(np.count_nonzero(before < top_p * weights.sum()))
    return float(left[max(kept, 1) - 1])


# --- generation and scoring ----------------------------------------------------------------


def _argmax(row: Perturbed) -> int:
    if row.threshold == -np.inf:
        return int(np.argmax(row.noisy))
    return int(np.argmax(np.where(row.scaled >= row.threshold, row.noisy, -np.inf)))


def _score(logits: F32, row: Row, claimed: int, clip: float) -> RowScore:
    raw = np.asarray(logits, dtype=np.float32)
    if not 0 <= claimed < len(raw):
        raise InvalidRequest("a claimed token is outside the vocabulary")
    margin = margin_of(perturb(raw, row), claimed, row.sampling, clip)
    best = float(np.max(raw))
    total = float(np.sum(np.exp(raw.astype(np.float64) - best)))
    logprob = float(raw[claimed]) - best - float(np.log(total))
    return RowScore(margin, logprob, int(np.count_nonzero(raw > raw[claimed])))


def margin_of(row: Perturbed, claimed: int, sampling: Sampling, clip: float = CLIP_LOGIT) -> float:
    """Distance in logits of ``claimed`` from what the sampler takes, in [0, 1000]."""
    if row.processed[claimed] == -np.inf:
        nothing_allowed = bool(np.max(row.processed) == -np.inf)
        return 0.0 if nothing_allowed and claimed == 0 else MAX_MARGIN
    scale = sampling.temperature if sampling.temperature > 0.0 else 1.0
    own = float(row.noisy[claimed])
    if row.threshold == -np.inf:
        return _bounded(scale * (float(np.max(row.noisy)) - own))
    margin = _bounded(_cut_margin(row, claimed, own, scale, clip))
    if sampling.top_p < 1.0:
        for rounding in MASS_LADDER:
            if rounding >= margin:
                break
            if _is_explained(row, claimed, sampling, rounding):
                return rounding
    return margin


def _cut_margin(row: Perturbed, claimed: int, own: float, scale: float, clip: float) -> float:
    """min over |s| <= clip of max(|s|, gap(s), below(s)) for a cut at logit θ moved by s.

    ``gap(s)`` is T * (best noisy value at or above θ + s, minus the claimed one)+ and falls with
    s; ``below(s) = (θ + s - l_claimed)+``. ``max(|s|, below(s))`` is smallest at
    s0 = -(θ - l_claimed)+ / 2 and rises from there, so only s >= s0 can win, and there only at s0
    and just above a rival (a token that beats the claimed one), where ``gap`` falls. The token with
    the highest logit is a rival like any other: for the node another one may be the highest, and
    ``min_p`` = 1 keeps no other.
    """
    theta = scale * row.threshold
    short = theta - scale * float(row.scaled[claimed])
    start = max(-max(short, 0.0) / 2, -clip)
    logits = row.scaled.astype(np.float64) * scale
    rival = (row.noisy > own) & (logits >= theta + start)
    order = np.argsort(logits[rival])
    height = logits[rival][order]
    gap = scale * (row.noisy[rival][order].astype(np.float64) - own)
    # worst[i]: the gap that is left when the i lowest rivals are cut off.
    worst = np.append(np.maximum.accumulate(gap[::-1])[::-1], 0.0)
    best = max(_move_cost(start, short), float(worst[0]))
    for i, value in enumerate(height):
        move = max(float(value) - theta, start)
        if move > clip:
            break
        best = min(best, max(_move_cost(move, short), float(worst[i + 1])))
    return best


def _is_explained(row: Perturbed, claimed: int, sampling: Sampling, rounding: float) -> bool:
    """Whether logits that are off by at most ``rounding / 2`` each explain ``claimed`` under top-p.

    They move the log-odds of the mass of any set of tokens by at most ``rounding / T``, and the
    min-p and top-k cuts by at most ``rounding``. So the cut lies between ``lowest`` and
    ``highest``, give or take ``step``. The best for ``claimed`` is the highest that it survives.
    """
    scaled = row.scaled
    step = np.float32(rounding) / np.float32(sampling.temperature)
    before = np.float32(_cut_before_top_p(scaled, sampling))
    shift = rounding / sampling.temperature
    above = (float(before - step), float(min(before + step, np.max(scaled))))
    lowest = _top_p_threshold(scaled, above[0], shifted_top_p(sampling.top_p, shift))
    highest = _top_p_threshold(scaled, above[1], shifted_top_p(sampling.top_p, -shift))
    cut = min(np.float32(highest), scaled[claimed]) + step
    if cut < np.float32(lowest) - step:
        return False
    return not np.any(row.noisy[scaled >= cut] > row.noisy[claimed] + step)


def shifted_top_p(top_p: float, shift: float) -> float:
    """``top_p`` moved by ``shift`` in log-odds, in fp64. Needs no clamp: of an fp32 value below 1
    and at most 1/8 over the least temperature it makes a value strictly between 0 and 1."""
    return 1.0 / (1.0 + (1.0 - top_p) / top_p * math.exp(-shift))


def _move_cost(move: float, short: float) -> float:
    return max(abs(move), short + move, 0.0)


def _bounded(value: float) -> float:
    return min(max(value, 0.0), MAX_MARGIN)

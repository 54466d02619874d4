"""Canonical sampling and scoring of one request on the fused kernels.

Equal to the reference ``trueweight.protos.sampling``; ``tests/node`` holds them together. One
forward half in ``kernels`` serves generation and scoring, so that what a node samples and what a
verifier recomputes cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trueweight.node import kernels
from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.sampling import CLIP_LOGIT, Sampling
from trueweight.protos.sampling_parameters import check_token_ids

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Mask = NDArray[np.bool_]
_NO_MASK: Mask = np.empty(0, dtype=np.bool_)
_NO_MASKS: Mask = np.empty((0, 0), dtype=np.bool_)


class Rules(NamedTuple):
    """A ``Sampling`` as the kernels want it. Empty arrays and neutral numbers are off."""

    temperature: np.float32
    log_min_p: np.float32
    top_k: int
    top_p: float
    has_cuts: bool
    repetition: np.float32
    frequency: np.float32
    presence: np.float32
    has_penalties: bool
    changes_logits: bool
    min_tokens: int
    stop_ids: I32
    bias_ids: I32
    biases: F32
    allowed: Mask
    bad_ids: I32
    bad_offsets: I32


@dataclass(frozen=True, slots=True, eq=False)
class BlockScore:
    """Scores of consecutive output tokens, one array element each."""

    margins: NDArray[np.float64]
    logprobs: NDArray[np.float64]
    ranks: NDArray[np.int64]


class Masks(Protocol):
    """A grammar walking along one output; see ``grammar.GrammarCursor``."""

    def mask_after(self, output: I32, length: int) -> Mask:
        """What may follow ``output[:length]``, prefix included."""
        ...


def is_plain(sampling: Sampling) -> bool:
    """Whether nothing but the temperature matters, so that the batched kernel may serve it."""
    return not (sampling.cuts or sampling.grammar_sha256 or _changes_logits(sampling))


def _compile_rules(sampling: Sampling, vocabulary_size: int) -> Rules:
    """Raises InvalidRequest if a parameter names an id outside the vocabulary."""
    check_token_ids(sampling, vocabulary_size)
    allowed = _NO_MASK
    if sampling.allowed_token_ids:
        allowed = np.zeros(vocabulary_size, dtype=np.bool_)
        allowed[list(sampling.allowed_token_ids)] = True
    words = sampling.bad_words
    return Rules(
        temperature=np.float32(sampling.temperature),
        log_min_p=np.float32(np.log(np.float32(sampling.min_p)) if sampling.min_p else -np.inf),
        top_k=sampling.top_k,
        top_p=float(sampling.top_p),
        has_cuts=bool(sampling.cuts),
        repetition=np.float32(sampling.repetition_penalty),
        frequency=np.float32(sampling.frequency_penalty),
        presence=np.float32(sampling.presence_penalty),
        has_penalties=sampling.has_penalties,
        changes_logits=_changes_logits(sampling),
        min_tokens=sampling.min_tokens,
        stop_ids=np.array(sampling.stop_token_ids, dtype=np.int32),
        bias_ids=np.array([token for token, _ in sampling.logit_bias], dtype=np.int32),
        biases=np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32),
        allowed=allowed,
        bad_ids=np.array([token for word in words for token in word], dtype=np.int32),
        bad_offsets=np.cumsum([0, *map(len, words)]).astype(np.int32),
    )


def _changes_logits(sampling: Sampling) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.has_penalties
        or (sampling.min_tokens and sampling.stop_token_ids)
    )


class Scratch:
    """Working memory of one thread for one vocabulary; not to be shared between threads."""

    def __init__(self, vocabulary_size: int) -> None:
        self.rows: F32 = np.empty((3, vocabulary_size), dtype=np.float32)
        self.counts: I32 = np.zeros(vocabulary_size, dtype=np.int32)


class RowSampler:
    """Generation with any rules: remembers prompt and output of one request."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt: Sequence[int], prefix: Sequence[int],
        scratch: Scratch, *, grammar: Masks | None = None,
    ) -> None:  # fmt: skip
        self._grammar = _grammar_of(sampling, grammar)
        self._rules = _compile_rules(sampling, scratch.counts.size)
        self._seed = seed
        self._prompt = np.array(prompt, dtype=np.int32)
        self._history = np.array([*prefix, *([0] * 64)], dtype=np.int32)
        self._prefix_len = len(prefix)
        self._known = 0
        self._scratch = scratch

    def winner(self, row: F32, output: Sequence[int]) -> int:
        """The canonical token after prefix and ``output``, which must only ever grow.

        Raises EngineError if the row holds NaN or plus infinity.
        """
        self._extend(output)
        length = self._prefix_len + self._known
        grammar = self._grammar
        mask = _NO_MASK if grammar is None else grammar.mask_after(self._history, length)
        winner: int = kernels.sample_row(
            row, self._rules, mask, self._prompt, self._history, length, self._seed,
            self._scratch.rows, self._scratch.counts,
        )  # fmt: skip
        if winner == kernels.INVALID_ROW:
            raise EngineError("the logits hold NaN or +inf")
        return winner

    def _extend(self, output: Sequence[int]) -> None:
        end = self._prefix_len + len(output)
        if end > self._history.size:
            grown = np.zeros(2 * end, dtype=np.int32)
            grown[: self._history.size] = self._history
            self._history = grown
        self._history[self._prefix_len + self._known : end] = output[self._known :]
        self._known = len(output)


class BlockScorer:
    """Scores the outputs of one request, in blocks of any size and order."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt: Sequence[int], output: Sequence[int],
        scratch: Scratch, *, grammar: Masks | None = None,
    ) -> None:  # fmt: skip
        """``output`` is prefix and claimed tokens. Raises InvalidRequest for ids outside the
        vocabulary."""
        self._grammar = _grammar_of(sampling, grammar)
        self._rules = _compile_rules(sampling, scratch.counts.size)
        self._seed = seed
        self._prompt = np.array(prompt, dtype=np.int32)
        self._history = np.array(output, dtype=np.int32)
        if self._history.size and not 0 <= self._history.min() <= self._history.max() < (
            scratch.counts.size
        ):
            raise InvalidRequest("a claimed token is outside the vocabulary")
        self._scratch = scratch

    def score(self, logits: F32, first: int) -> BlockScore:
        """Row i of ``logits`` predicts output token ``first + i``. Raises EngineError if a row
        holds NaN or plus infinity."""
        count = logits.shape[0]
        if not 0 <= first <= first + count <= self._history.size:
            raise InvalidRequest("scored rows are outside the claimed output")
        masks = _NO_MASKS
        if self._grammar is not None and count:
            lengths = range(first, first + count)
            masks = np.stack([self._grammar.mask_after(self._history, n) for n in lengths])
        margins, logprobs = np.empty(count), np.empty(count)
        ranks = np.empty(count, dtype=np.int64)
        valid = kernels.score_rows(
            np.ascontiguousarray(logits), self._rules, masks, self._prompt, self._history, first,
            self._seed, CLIP_LOGIT, margins, logprobs, ranks,
            self._scratch.rows, self._scratch.counts,
        )  # fmt: skip
        if not valid:
            raise EngineError("the logits hold NaN or +inf")
        return BlockScore(margins, logprobs, ranks)


def _grammar_of(sampling: Sampling, grammar: Masks | None) -> Masks | None:
    if sampling.grammar_sha256 and grammar is None:
        raise InvalidRequest("a request with a grammar needs its masks", param="response_format")
    return grammar

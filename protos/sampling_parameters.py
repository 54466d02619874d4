"""Resolved sampling parameters: the value every role passes around instead of the message."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.v1 import market_pb2 as pb

MIN_TEMPERATURE = struct.unpack("<f", struct.pack("<f", 0.01))[0]
MAX_TEMPERATURE = 100.0
# Repetition penalties multiply logits, and so rounding errors; beyond these no calibration holds.
MIN_REPETITION, MAX_REPETITION = 0.75, 2.0
# Far below, logits would overflow: two infinities have no distance, and such an audit no end.
LEAST_REPETITION = struct.unpack("<f", struct.pack("<f", 1e-6))[0]
MAX_LOGIT_BIAS, MAX_BIAS = 1024, 100.0
MAX_ALLOWED_IDS = 1024
MAX_STOP_IDS = 128
MAX_BAD_WORDS, MAX_BAD_WORD_IDS = 128, 64
MAX_TOKEN_ID = 2**31 - 1
SHA256_BYTES = 32
MAX_COMPILER_CHARS = 128


@dataclass(frozen=True, slots=True)
class Sampling:
    """Mirrors ``SamplingParams``, resolved; the defaults are neutral (plain sampling at T = 1)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    grammar_sha256: bytes = b""
    grammar_compiler: str = ""

    @classmethod
    def from_proto(cls, message: pb.SamplingParams) -> Sampling:
        """The value of a message. Raises InvalidRequest, naming the parameter, if anything is
        out of range or not resolved."""
        value = cls(
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            min_p=message.min_p,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=message.repetition_penalty,
            min_tokens=message.min_tokens,
            logit_bias=tuple((b.token_id, b.bias) for b in message.logit_bias),
            allowed_token_ids=tuple(message.allowed_token_ids),
            bad_words=tuple(tuple(w.token_ids) for w in message.bad_words),
            stop_token_ids=tuple(message.stop_token_ids),
            grammar_sha256=message.grammar.source_sha256,
            grammar_compiler=message.grammar.compiler,
        )
        check(value)
        return value

    def to_proto(self) -> pb.SamplingParams:
        """The message of a resolved value (call ``resolve`` first on what users sent)."""
        message = pb.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            logit_bias=[pb.LogitBias(token_id=t, bias=b) for t, b in self.logit_bias],
            allowed_token_ids=self.allowed_token_ids,
            bad_words=[pb.TokenSequence(token_ids=w) for w in self.bad_words],
            stop_token_ids=self.stop_token_ids,
        )
        if self.grammar_sha256:
            message.grammar.CopyFrom(
                pb.Grammar(source_sha256=self.grammar_sha256, compiler=self.grammar_compiler)
            )
        return message

    @property
    def has_penalties(self) -> bool:
        """True if any of the three penalties is on."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that limit the allowed set; none at temperature 0."""
        if self.temperature == 0.0:
            return ()
        on = {"min_p": self.min_p > 0.0, "top_k": self.top_k > 0, "top_p": self.top_p < 1.0}
        return tuple(name for name, is_on in on.items() if is_on)


def resolve(sampling: Sampling) -> Sampling:
    """What goes into an Assignment: fp32 values, 0 < T < 0.01 raised to 0.01, top-k 1 as greedy,
    cuts neutral at T = 0, id lists ascending and distinct. Raises InvalidRequest."""
    _check_finite(sampling)
    temperature = to_fp32(sampling.temperature)
    if sampling.temperature > 0.0 and temperature < MIN_TEMPERATURE:
        temperature = MIN_TEMPERATURE
    if sampling.top_k == 1:
        temperature = 0.0
    greedy = temperature == 0.0
    resolved = replace(
        sampling,
        temperature=temperature,
        top_p=1.0 if greedy else to_fp32(sampling.top_p),
        top_k=0 if greedy else sampling.top_k,
        min_p=0.0 if greedy else to_fp32(sampling.min_p),
        presence_penalty=to_fp32(sampling.presence_penalty),
        frequency_penalty=to_fp32(sampling.frequency_penalty),
        repetition_penalty=to_fp32(sampling.repetition_penalty),
        logit_bias=tuple(sorted((t, to_fp32(b)) for t, b in sampling.logit_bias)),
        allowed_token_ids=tuple(sorted(set(sampling.allowed_token_ids))),
        stop_token_ids=tuple(sorted(set(sampling.stop_token_ids))),
    )
    check(resolved)
    return resolved


CALIBRATED_CLASSES = (
    "plain",
    "greedy",
    "top_p",
    "top_k",
    "min_p",
    "multi_cut",
    "penalties",
    "grammar",
)
"""The classes that are evidence once they are calibrated."""


def parameter_class(sampling: Sampling) -> str:
    """The calibration class: grammar, else penalties, else by the number of cuts, else greedy or
    plain. Masks and biases are exact, so they make no class of their own. A calibration of
    "grammar" or "penalties" must therefore cover greedy, plain and every cut.

    "amplified" is never calibrated: a repetition penalty near 0 multiplies logits, and with them
    an honest node's rounding, so a client could choose it to make a rival look guilty."""
    if sampling.has_penalties and sampling.repetition_penalty < MIN_REPETITION:
        return "amplified"
    if sampling.grammar_sha256:
        return "grammar"
    if sampling.has_penalties:
        return "penalties"
    cuts = sampling.cuts
    if len(cuts) > 1:
        return "multi_cut"
    if cuts:
        return cuts[0]
    return "greedy" if sampling.temperature == 0.0 else "plain"


def check_token_ids(sampling: Sampling, vocabulary_size: int) -> None:
    """Raises InvalidRequest if a parameter names an id that the vocabulary does not have."""
    lists: dict[str, Sequence[int]] = {
        "logit_bias": [t for t, _ in sampling.logit_bias],
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words": [t for word in sampling.bad_words for t in word],
        "stop_token_ids": sampling.stop_token_ids,
    }
    for name, ids in lists.items():
        if any(not 0 <= token < vocabulary_size for token in ids):
            raise _refuse(name, f"ids must be below {vocabulary_size}")


def check(sampling: Sampling) -> None:
    """Raises InvalidRequest at the first parameter that is out of range or not resolved."""
    _check_finite(sampling)
    _check_numbers(sampling)
    _check_lists(sampling)
    if len(sampling.grammar_sha256) not in (0, SHA256_BYTES):
        raise _refuse("grammar", "its digest has 32 bytes")
    if len(sampling.grammar_compiler) > MAX_COMPILER_CHARS:
        raise _refuse("grammar", "the compiler's name is too long")
    if bool(sampling.grammar_sha256) != bool(sampling.grammar_compiler):
        raise _refuse("grammar", "digest and compiler come together")


def to_fp32(value: float) -> float:
    """The nearest fp32 value. Raises InvalidRequest if it does not fit."""
    try:
        result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (OverflowError, struct.error):
        raise InvalidRequest("a sampling parameter does not fit fp32") from None
    return result


def _refuse(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is out of range: {why}", param=param)


def _check_finite(sampling: Sampling) -> None:
    numbers = {
        name: getattr(sampling, name)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
    }
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise _refuse(name, "it must be finite")
    if any(not math.isfinite(bias) for _, bias in sampling.logit_bias):
        raise _refuse("logit_bias", "it must be finite")


def _check_numbers(sampling: Sampling) -> None:
    t = sampling.temperature
    if t != 0.0 and not MIN_TEMPERATURE <= t <= MAX_TEMPERATURE:
        raise _refuse("temperature", f"0, or from 0.01 to {MAX_TEMPERATURE:g}")
    if not 0.0 < sampling.top_p <= 1.0:
        raise _refuse("top_p", "above 0, at most 1")
    if not 0 <= sampling.top_k <= MAX_TOKEN_ID or sampling.top_k == 1:
        raise _refuse("top_k", "0 for off, or at least 2 (1 is resolved to temperature 0)")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise _refuse("min_p", "from 0 to 1")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2.0 <= getattr(sampling, name) <= 2.0:
            raise _refuse(name, "from -2 to 2")
    if not LEAST_REPETITION <= sampling.repetition_penalty <= MAX_REPETITION:
        raise _refuse("repetition_penalty", f"from {LEAST_REPETITION:g} to {MAX_REPETITION:g}")
    if not 0 <= sampling.min_tokens <= MAX_TOKEN_ID:
        raise _refuse("min_tokens", "not negative")


def _check_lists(sampling: Sampling) -> None:
    biased = [token for token, _ in sampling.logit_bias]
    if len(biased) > MAX_LOGIT_BIAS or len(set(biased)) != len(biased):
        raise _refuse("logit_bias", f"at most {MAX_LOGIT_BIAS} distinct ids")
    if any(abs(bias) > MAX_BIAS for _, bias in sampling.logit_bias):
        raise _refuse("logit_bias", f"from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    _check_ascending("allowed_token_ids", sampling.allowed_token_ids, MAX_ALLOWED_IDS)
    _check_ascending("stop_token_ids", sampling.stop_token_ids, MAX_STOP_IDS)
    words = sampling.bad_words
    if len(words) > MAX_BAD_WORDS or any(not 1 <= len(w) <= MAX_BAD_WORD_IDS for w in words):
        raise _refuse("bad_words", f"at most {MAX_BAD_WORDS} of 1 to {MAX_BAD_WORD_IDS} ids")
    for name, ids in (("logit_bias", biased), ("bad_words", [t for w in words for t in w])):
        if any(not 0 <= token <= MAX_TOKEN_ID for token in ids):
            raise _refuse(name, "a token id does not fit 31 bits")


def _check_ascending(name: str, ids: Sequence[int], most: int) -> None:
    if len(ids) > most:
        raise _refuse(name, f"at most {most} ids")
    if any(b <= a for a, b in itertools.pairwise(ids)):
        raise _refuse(name, "ids must be ascending and distinct")
    if ids and not 0 <= ids[0] <= ids[-1] <= MAX_TOKEN_ID:
        raise _refuse(name, "a token id does not fit 31 bits")

"""A small deterministic language model in numpy: real logits without weights on disk.

The next token's logits are a fixed random mix of embeddings of the last few tokens, so they
depend on the context and on nothing else. It writes no sense; it behaves like a language model
where that matters: peaked distributions, context dependence, outputs that end by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.model_directory import read_facts, read_json

Logits = npt.NDArray[np.float32]
_MASKED = np.float32(-30.0)
_MAX_HASHED_BYTES = 64 * 1024 * 1024


class LogitsModel(Protocol):
    """What the synthetic engine runs. Simulation passes others through the same seam."""

    @property
    def vocabulary_size(self) -> int: ...

    def logits(self, context: Sequence[int]) -> Logits:
        """Raw logits of the token after ``context``, float32, one per id. ``context`` is never
        empty and never longer than the last 128 tokens."""
        ...


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What defines a synthetic model. Equal shapes give equal logits on every machine up to
    rounding. ``mean_output_tokens`` sets the chance of an end-of-sequence id at temperature 1;
    ``scale`` is the standard deviation of the logits; ``silent_ids`` are practically never drawn.
    """

    vocabulary_size: int = 2048
    model_seed: int = 1
    eos_token_ids: tuple[int, ...] = (0,)
    silent_ids: tuple[int, ...] = ()
    max_context_tokens: int = 4096
    mean_output_tokens: int = 64
    context_tokens: int = 4
    hidden: int = 24
    scale: float = 3.0

    def __post_init__(self) -> None:
        if not 2 <= self.vocabulary_size <= 1_000_000 or self.max_context_tokens < 2:
            raise InvalidRequest("a model needs at least 2 ids and a context of at least 2")
        if any(not 0 <= i < self.vocabulary_size for i in (*self.eos_token_ids, *self.silent_ids)):
            raise InvalidRequest("end-of-sequence ids must be below the vocabulary size")


class SyntheticModel:
    """Logits = unigram bias + output matrix times a gated mix of the last tokens' embeddings."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        rng = np.random.default_rng([0x7477, shape.model_seed & 0xFFFFFFFFFFFFFFFF])
        size = (shape.vocabulary_size, shape.hidden)
        decay = 0.75 ** np.arange(shape.context_tokens, dtype=np.float64)
        # One table per distance would be large at big vocabularies; signs per distance suffice.
        self._signs = rng.choice([-1.0, 1.0], (shape.context_tokens, shape.hidden))
        self._signs *= (decay / np.sqrt((decay**2).sum()))[:, None]
        self._embedding = rng.standard_normal(size)
        self._output = rng.standard_normal(size) * (shape.scale / np.sqrt(shape.hidden))
        self._bias = rng.standard_normal(shape.vocabulary_size) * 0.5
        self._silent = np.array(shape.silent_ids, dtype=np.intp)
        self._eos = np.array(shape.eos_token_ids, dtype=np.intp)

    @property
    def vocabulary_size(self) -> int:
        return self.shape.vocabulary_size

    def logits(self, context: Sequence[int]) -> Logits:
        last = list(context[-self.shape.context_tokens :])
        # Double precision, rounded once: the float32 result hardly depends on the BLAS in use.
        mixed = (self._embedding[last[::-1]] * self._signs[: len(last)]).sum(axis=0)
        row = self._output @ (np.tanh(mixed) * 1.5) + self._bias
        row[self._silent] = _MASKED
        if self._eos.size:
            self._place_eos(row, last)
        result: Logits = row.astype(np.float32)
        return result

    def _place_eos(self, row: npt.NDArray[np.float64], last: list[int]) -> None:
        """Gives the first EOS id a chance of 1/mean_output_tokens, and in one context of as many
        makes it the clear favourite, so that greedy outputs end too."""
        row[self._eos] = _MASKED
        top = float(row.max())
        total = top + float(np.log(np.exp(row - top).sum()))
        mean = max(2, self.shape.mean_output_tokens)
        key = b"".join(token.to_bytes(4, "little") for token in last)
        word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        favoured = word % mean == 0
        row[self._eos[0]] = top + 3.0 if favoured else total - float(np.log(mean))


def shape_from_directory(directory: Path, base: ModelShape | None = None) -> ModelShape:
    """The shape that fits a Hugging Face model directory: its vocabulary, special ids and context,
    and a model seed drawn from its weights, so that other weights are another model.

    Raises WeightsRefused if the directory does not describe a model.
    """
    facts = read_facts(directory)
    config = read_json(directory / "config.json")
    special = {*_ids(config.get("bos_token_id")), *_ids(config.get("pad_token_id"))}
    silent = {i for i in special - set(facts.eos_token_ids) if i < facts.vocabulary_size}
    return replace(
        base or ModelShape(),
        vocabulary_size=facts.vocabulary_size,
        eos_token_ids=facts.eos_token_ids,
        silent_ids=tuple(sorted(silent)),
        max_context_tokens=facts.max_context_tokens,
        model_seed=_weights_seed(directory),
    )


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and v >= 0)


def _weights_seed(directory: Path) -> int:
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + file.read(_MAX_HASHED_BYTES))
    return int.from_bytes(digest.digest()[:8], "little")

"""The narrow seam behind which every engine sits.

An engine turns token ids into token ids and scores claimed outputs. It knows nothing of money,
signatures or sessions. Implementations: ``trueweight.node.vllm`` and ``trueweight.node.synthetic``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from trueweight.protos.sampling import Sampling
from trueweight.protos.v1.market_pb2 import EngineFingerprint


class EngineFinish(Enum):
    """Why an engine stopped by itself."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """One leg of one output.

    ``prompt`` and ``prefix`` are token ids; ``prefix`` was produced by earlier legs and counts as
    output for positions, penalties and ``min_tokens``. ``max_tokens`` is for this leg.
    ``grammar_source`` is what ``sampling.grammar_sha256`` names.
    """

    job_id: str
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    sampling: Sampling
    seed: int
    max_tokens: int
    grammar_source: bytes = b""


@dataclass(frozen=True, slots=True)
class Step:
    """New output ids of one job, in order; ``finish`` is set on the last step."""

    token_ids: tuple[int, ...]
    finish: EngineFinish | None = None


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """A claimed output to score in one teacher-forced prefill."""

    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling
    seed: int
    grammar_source: bytes = b""


@dataclass(frozen=True, slots=True)
class Score:
    """Per output token, same length as ``ScoreJob.output``; see ``ScoreResult`` in node.proto."""

    margins: tuple[float, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine says of itself. ``kv_use`` is a fraction in [0, 1]."""

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0
    generated_tokens_total: int = 0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine can take."""

    vocabulary_size: int
    max_context_tokens: int
    max_running: int


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Outcome of proving the engine against golden vectors at start. An engine may have it as
    ``self_test``; one that fails does not start."""

    positions: int = 0
    equal: int = 0


class Engine(Protocol):
    """Life: ``start`` once, then any number of concurrent calls, then ``close`` once.

    ``generate`` stops the work in the engine when its iterator is closed or its task cancelled.
    Errors: ``EngineError`` if the engine failed, ``InvalidRequest`` for a job it cannot take, which
    is raised before the first step.
    """

    @property
    def fingerprint(self) -> EngineFingerprint: ...

    @property
    def limits(self) -> EngineLimits: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def generate(self, job: GenerateJob) -> AsyncIterator[Step]: ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Score]: ...

    def load(self) -> EngineLoad: ...

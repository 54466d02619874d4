"""Cheats that wrap an engine: what a dishonest operator does to answers, injected by composition.

Each is an ``Engine`` around another one, so any node can be given one; ``node/`` has no switch for
it. Cheats that change weights are in ``adversary_weights``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trueweight.node.engine import (
    Engine,
    EngineFinish,
    EngineLimits,
    EngineLoad,
    GenerateJob,
    Score,
    ScoreJob,
    Step,
)
from trueweight.node.synthetic_model import LogitsModel
from trueweight.protos.sampling_parameters import to_fp32
from trueweight.protos.v1.market_pb2 import EngineFingerprint

_MAX_CACHED = 10_000


class Adversary:
    """Passes everything through; cheats override ``change`` or ``generate``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def fingerprint(self) -> EngineFingerprint:
        """The honest one: cheats declare what they do not run."""
        return self._engine.fingerprint

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    async def start(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()

    def change(self, job: GenerateJob) -> GenerateJob:
        """What is run instead of what was asked for."""
        return job

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        async for step in self._engine.generate(self.change(job)):
            yield step

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Score]:
        return await self._engine.score(jobs)

    def load(self) -> EngineLoad:
        return self._engine.load()


class WrongSeed(Adversary):
    """Samples with a seed of its own choice."""

    def change(self, job: GenerateJob) -> GenerateJob:
        return replace(job, seed=(job.seed ^ 0x5EED) & 0x7FFFFFFFFFFFFFFF)


class WrongTemperature(Adversary):
    """Samples at ``factor`` times the temperature that was asked for."""

    def __init__(self, engine: Engine, factor: float) -> None:
        super().__init__(engine)
        self._factor = factor

    def change(self, job: GenerateJob) -> GenerateJob:
        temperature = to_fp32(job.sampling.temperature * self._factor)
        return replace(job, sampling=replace(job.sampling, temperature=temperature))


class WrongTopP(Adversary):
    """Cuts at ``top_p`` whatever was asked for."""

    def __init__(self, engine: Engine, top_p: float) -> None:
        super().__init__(engine)
        self._top_p = to_fp32(top_p)

    def change(self, job: GenerateJob) -> GenerateJob:
        return replace(job, sampling=replace(job.sampling, top_p=self._top_p))


class IgnoredGrammar(Adversary):
    """Spares itself the masks of structured output."""

    def change(self, job: GenerateJob) -> GenerateJob:
        free = replace(job.sampling, grammar_sha256=b"", grammar_compiler="")
        return replace(job, sampling=free, grammar_source=b"")


class HiddenPrompt(Adversary):
    """Overwrites the beginning of the prompt with its own text. Length, and so positions and
    noise, stay: the subtlest form of a hidden prefix or a truncated context."""

    def __init__(self, engine: Engine, hidden: Sequence[int]) -> None:
        super().__init__(engine)
        self._hidden = tuple(hidden)

    def change(self, job: GenerateJob) -> GenerateJob:
        hidden = self._hidden[: len(job.prompt)]
        return replace(job, prompt=hidden + job.prompt[len(hidden) :])


class Truncation(Adversary):
    """Ends after ``share`` of the tokens and claims that the length was reached."""

    def __init__(self, engine: Engine, share: float) -> None:
        super().__init__(engine)
        self._share = share

    def change(self, job: GenerateJob) -> GenerateJob:
        return replace(job, max_tokens=max(1, int(job.max_tokens * self._share)))


class Padding(Adversary):
    """Goes on after the end of the output, to be paid for more tokens."""

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        endless = replace(job, sampling=replace(job.sampling, stop_token_ids=()))
        async for step in self._engine.generate(endless):
            yield step


class EarlyEnd(Adversary):
    """Ends a longer answer by itself, after ``share`` of the tokens that it may have: the last
    token becomes a stop token, so that counts and finish reason are in order."""

    def __init__(self, engine: Engine, share: float) -> None:
        super().__init__(engine)
        self._share = share

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        stops = job.sampling.stop_token_ids
        limit = max(1, int(job.max_tokens * self._share))
        if not stops or limit >= job.max_tokens:
            async for step in self._engine.generate(job):
                yield step
            return
        async for step in self._engine.generate(replace(job, max_tokens=limit)):
            if step.finish is EngineFinish.LENGTH:
                step = Step((*step.token_ids[:-1], stops[0]), EngineFinish.EOS)  # noqa: PLW2901
            yield step


class Sometimes(Adversary):
    """Cheats on ``share`` of the requests and is honest on the others; which ones depends on the
    request alone, so that a retry meets the same node."""

    def __init__(self, engine: Engine, cheat: Engine, share: float) -> None:
        super().__init__(engine)
        self._cheat, self._share = cheat, share

    def cheats_on(self, job: GenerateJob) -> bool:
        """The choice for one request."""
        digest = hashlib.sha256(f"{job.seed} {job.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._share * 2**64

    async def start(self) -> None:
        await asyncio.gather(self._engine.start(), self._cheat.start())

    async def close(self) -> None:
        await asyncio.gather(self._engine.close(), self._cheat.close())

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        serving = self._cheat if self.cheats_on(job) else self._engine
        async for step in serving.generate(job):
            yield step


class CachedText(Adversary):
    """Answers a prompt it has seen before with the old answer, whatever the seed."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._cache: OrderedDict[tuple[int, ...], tuple[int, ...]] = OrderedDict()

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        known = self._cache.get(job.prompt)
        if known is not None:
            tokens = known[: job.max_tokens]
            ended = len(known) <= job.max_tokens and tokens[-1] in job.sampling.stop_token_ids
            yield Step(tokens, EngineFinish.EOS if ended else EngineFinish.LENGTH)
            return
        made: list[int] = []
        async for step in self._engine.generate(job):
            made.extend(step.token_ids)
            yield step
        self._cache[job.prompt] = tuple(made)
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)


class OtherEngine(Adversary):
    """Generates with a cheaper engine; declares (and scores as) the honest one. Also the cheat
    that generates cheaply and then prefills with the true model to look busy."""

    def __init__(self, engine: Engine, cheap: Engine) -> None:
        super().__init__(engine)
        self._cheap = cheap

    async def start(self) -> None:
        await asyncio.gather(self._engine.start(), self._cheap.start())

    async def close(self) -> None:
        await asyncio.gather(self._engine.close(), self._cheap.close())

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        async for step in self._cheap.generate(job):
            yield step


class PerturbedModel:
    """A ``LogitsModel`` whose logits are off by a fixed amount per context and token: what
    quantised or noisy weights do. ``scale`` is the standard deviation in logits."""

    def __init__(self, model: LogitsModel, scale: float, *, rank: int = 16, seed: int = 9) -> None:
        rng = np.random.default_rng(seed)
        self._model = model
        size = model.vocabulary_size
        self._by_token = rng.standard_normal((size, rank)) * (scale / np.sqrt(rank))
        self._by_context = rng.standard_normal((size, rank))

    @property
    def vocabulary_size(self) -> int:
        return self._model.vocabulary_size

    def logits(self, context: Sequence[int]) -> NDArray[np.float32]:
        row = self._model.logits(context) + self._by_token @ self._by_context[context[-1]]
        changed: NDArray[np.float32] = row.astype(np.float32)
        return changed

"""The synthetic engine: real logits, real canonical sampling, chosen speed; no torch, no GPU.

For simulation, tests and benchmarks. It must be asked for by name and says "synthetic" in its
fingerprint, which no market that sells real weights allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trueweight.node.engine import (
    EngineFinish,
    EngineLimits,
    EngineLoad,
    GenerateJob,
    Score,
    ScoreJob,
    SelfTest,
    Step,
)
from trueweight.node.golden import prove_reference_sampler
from trueweight.node.grammar import GrammarCursor, Grammars, Mask
from trueweight.node.synthetic_model import (
    Logits,
    LogitsModel,
    ModelShape,
    SyntheticModel,
    shape_from_directory,
)
from trueweight.protos import sampling as canonical
from trueweight.protos.errors import (
    EngineError,
    InvalidRequest,
    OverCapacity,
    UnsupportedParameter,
)
from trueweight.protos.v1.market_pb2 import EngineFingerprint
from trueweight.runtime.clock import Clock, SystemClock

log = logging.getLogger(__name__)

_ENGINE_VERSION = "1"
# Rows computed before other coroutines of the process get a turn.
_ROWS_PER_TURN = 8
MAX_WAITING = 4096


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the engine pretends to be; 0 is as fast as it can.

    ``decode_tokens_per_s`` is per request: one step gives each running request one token.
    ``prefill_tokens_per_s`` is shared by all.
    """

    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    start_ms: float = 0.0


@dataclass(eq=False)
class _Running:
    job: GenerateJob
    output: list[int]
    grammar: GrammarCursor | None = None
    steps: deque[Step] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: EngineError | None = None
    made: int = 0
    finished: bool = False


class SyntheticEngine:
    """An ``Engine`` around a ``LogitsModel``.

    ``noise`` is the standard deviation, in logits, of what a different machine's rounding would
    add; it is drawn anew for every evaluation, so that a score never sees the noise of its
    generation.
    """

    def __init__(
        self,
        model: LogitsModel | None = None,
        *,
        speed: Speed | None = None,
        noise: float = 0.0,
        noise_seed: int = 0,
        max_running: int = 64,
        max_context_tokens: int | None = None,
        clock: Clock | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._grammars = grammars
        self._model = model or SyntheticModel(ModelShape())
        self._speed = speed or Speed()
        self._noise = noise
        self._rng = np.random.default_rng([0x6E6F, noise_seed])
        self._clock = clock or SystemClock()
        shape = getattr(self._model, "shape", ModelShape())
        self._limits = EngineLimits(
            vocabulary_size=self._model.vocabulary_size,
            max_context_tokens=max_context_tokens or shape.max_context_tokens,
            max_running=max_running,
        )
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._generated = 0
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False
        self.self_test = SelfTest()

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        *,
        speed: Speed | None = None,
        noise: float = 0.0,
        max_running: int = 64,
        clock: Clock | None = None,
    ) -> SyntheticEngine:
        """An engine with the vocabulary, special ids and context of a model directory."""
        model = SyntheticModel(shape_from_directory(directory))
        grammars = Grammars.from_directory(directory, model.vocabulary_size)
        return cls(
            model,
            speed=speed,
            noise=noise,
            max_running=max_running,
            clock=clock,
            grammars=grammars,
        )

    @property
    def fingerprint(self) -> EngineFingerprint:
        return EngineFingerprint(
            engine="synthetic",
            engine_version=_ENGINE_VERSION,
            dtype="float32",
            quantization="none",
            kv_dtype="none",
            tensor_parallel=1,
            pipeline_parallel=1,
            attention_backend="none",
            accelerator="numpy",
            sampler_id="tw-gumbel-1",
            sampler_precision="fp32",
        )

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    async def start(self) -> None:
        """Raises EngineError if the sampler differs from the golden vectors."""
        self.self_test = prove_reference_sampler()
        if self._speed.start_ms:
            await self._clock.sleep_ms(self._speed.start_ms)
        self._loop_task = asyncio.create_task(self._guarded_loop())

    async def close(self) -> None:
        self._closed = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        self._fail_all(EngineError("the engine is closed"))

    def load(self) -> EngineLoad:
        used = sum(len(r.job.prompt) + len(r.output) for r in self._running)
        room = self._limits.max_running * self._limits.max_context_tokens
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_use=min(1.0, used / room),
            generated_tokens_total=self._generated,
        )

    async def generate(self, job: GenerateJob) -> AsyncIterator[Step]:
        self._check_running()
        self._check_tokens(job.prompt, job.prefix, job.max_tokens)
        if len(self._waiting) >= MAX_WAITING:
            raise OverCapacity("the engine's queue is full", hint="Try again later.")
        grammar = await self._grammar(job)
        running = _Running(job, list(job.prefix), grammar)
        self._waiting.append(running)
        self._wake.set()
        try:
            while True:
                await running.wake.wait()
                running.wake.clear()
                while running.steps:
                    step = running.steps.popleft()
                    yield step
                    if step.finish is not None:
                        return
                if running.error is not None:
                    raise running.error
        finally:
            self._drop(running)

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Score]:
        self._check_running()
        for job in jobs:
            self._check_tokens(job.prompt, job.prefix, len(job.output))
            if any(not 0 <= t < self._limits.vocabulary_size for t in job.output):
                raise InvalidRequest("a claimed token id is not in the vocabulary")
        scored = [await self._score_one(job) for job in jobs]
        if self._speed.prefill_tokens_per_s:
            tokens = sum(len(j.prompt) + len(j.prefix) + len(j.output) for j in jobs)
            await self._clock.sleep_ms(1000 * tokens / self._speed.prefill_tokens_per_s)
        return scored

    async def _grammar(self, job: GenerateJob | ScoreJob) -> GrammarCursor | None:
        if not job.sampling.grammar_sha256:
            return None
        if self._grammars is None:
            raise UnsupportedParameter("this engine has no grammars", param="response_format")
        if isinstance(job, GenerateJob):
            await self._grammars.check(job.grammar_source)
        return await asyncio.to_thread(
            self._grammars.cursor, job.grammar_source, job.sampling.stop_token_ids
        )

    async def _score_one(self, job: ScoreJob) -> Score:
        grammar = await self._grammar(job)
        prompt = list(job.prompt)
        output = list(job.prefix)
        rows = []
        for index, claimed in enumerate(job.output):
            if index % _ROWS_PER_TURN == 0:
                await asyncio.sleep(0)
            logits = self._logits(prompt, output)
            mask = _mask(grammar, output)
            rows.append(
                canonical.score_row(
                    logits, job.sampling, job.seed, prompt, output, claimed, mask=mask
                )
            )
            output.append(claimed)
        return Score(
            margins=tuple(float(r.margin) for r in rows),
            logprobs=tuple(float(r.logprob) for r in rows),
            ranks=tuple(int(r.rank) for r in rows),
        )

    def _logits(self, prompt: Sequence[int], output: Sequence[int]) -> Logits:
        # Enough context for any model here; joining whole prompts would cost more than the model.
        context = [*prompt[-64:], *output[-64:]] if len(output) < 64 else output[-64:]
        row = self._model.logits(context)
        if self._noise:
            noise = self._rng.standard_normal(row.shape[0], dtype=np.float32)
            row = row + noise * np.float32(self._noise)
        return row

    def _check_running(self) -> None:
        if self._loop_task is None or self._closed:
            raise EngineError("the engine is not running")

    def _check_tokens(self, prompt: Sequence[int], prefix: Sequence[int], new_tokens: int) -> None:
        if not prompt or new_tokens < 1:
            raise InvalidRequest("a job needs a prompt and at least one output token")
        if len(prompt) + len(prefix) + new_tokens > self._limits.max_context_tokens:
            raise InvalidRequest("the job does not fit the engine's context")
        size = self._limits.vocabulary_size
        if min(prompt) < 0 or max(prompt) >= size:
            raise InvalidRequest("a prompt token id is not in the vocabulary")
        if prefix and (min(prefix) < 0 or max(prefix) >= size):
            raise InvalidRequest("a prefix token id is not in the vocabulary")

    def _drop(self, running: _Running) -> None:
        running.finished = True
        if running in self._running:
            self._running.remove(running)
        if running in self._waiting:
            self._waiting.remove(running)

    def _fail_all(self, error: EngineError) -> None:
        for running in [*self._running, *self._waiting]:
            running.error = error
            running.wake.set()

    async def _guarded_loop(self) -> None:
        try:
            await self._step_forever()
        except asyncio.CancelledError:
            raise
        except Exception:  # whatever it was, callers must learn of it
            log.exception("the synthetic engine failed")
            self._closed = True
            self._fail_all(EngineError("the engine failed; see the node's log"))

    async def _step_forever(self) -> None:
        while True:
            if not self._running and not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            prefilled = self._admit()
            await self._step()
            await self._pace(prefilled)

    def _admit(self) -> int:
        """Moves waiting jobs into the batch; how many tokens they make the engine read."""
        tokens = 0
        while self._waiting and len(self._running) < self._limits.max_running:
            running = self._waiting.popleft()
            self._running.append(running)
            tokens += len(running.job.prompt) + len(running.job.prefix)
        return tokens

    async def _pace(self, prefilled: int) -> None:
        duration_ms = 0.0
        if self._speed.prefill_tokens_per_s:
            duration_ms += 1000 * prefilled / self._speed.prefill_tokens_per_s
        if self._speed.decode_tokens_per_s:
            duration_ms += 1000 / self._speed.decode_tokens_per_s
        await self._clock.sleep_ms(duration_ms)

    async def _step(self) -> None:
        for index, running in enumerate(list(self._running)):
            if index and index % _ROWS_PER_TURN == 0:
                await asyncio.sleep(0)
            if not running.finished:
                self._advance(running)

    def _advance(self, running: _Running) -> None:
        job = running.job
        logits = self._logits(job.prompt, running.output)
        mask = _mask(running.grammar, running.output)
        token = canonical.sample(
            logits, job.sampling, job.seed, job.prompt, running.output, mask=mask
        )
        running.output.append(token)
        running.made += 1
        self._generated += 1
        finish = None
        if token in job.sampling.stop_token_ids:
            finish = EngineFinish.EOS
        elif running.made >= job.max_tokens:
            finish = EngineFinish.LENGTH
        running.steps.append(Step((token,), finish))
        running.wake.set()
        if finish is not None:
            self._drop(running)


def _mask(grammar: GrammarCursor | None, output: Sequence[int]) -> Mask | None:
    return None if grammar is None else grammar.mask_after(output, len(output))

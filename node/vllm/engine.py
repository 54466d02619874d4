"""vLLM as a Trueweight engine.

``VllmEngine`` runs ``AsyncLLM`` in its own processes with the canonical sampler as logits
processor and the scorer as worker extension. Importing this module imports neither vLLM nor torch;
``start`` does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

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
from trueweight.node.grammar import Grammars
from trueweight.node.vllm.options import VllmOptions
from trueweight.node.vllm.process import EngineProcess
from trueweight.node.vllm.wire import EngineOrder
from trueweight.protos.errors import ContextOverflow, InvalidRequest, UnsupportedParameter
from trueweight.protos.grammar import check_grammar
from trueweight.protos.sampling_parameters import check, check_token_ids
from trueweight.protos.v1.market_pb2 import EngineFingerprint

__all__ = ["VllmEngine", "VllmOptions"]


class VllmEngine:
    """``trueweight.node.engine.Engine`` on vLLM. ``model_dir`` is a Hugging Face directory."""

    def __init__(self, model_dir: Path | str, options: VllmOptions | None = None) -> None:
        self._options = options or VllmOptions()
        self._process = EngineProcess(Path(model_dir), self._options)
        self._serial = itertools.count()
        self._open_jobs = 0
        self._held_tokens = 0
        self._generated_tokens = 0
        self._self_test = SelfTest()
        self._model_dir = Path(model_dir)
        self._grammars: Grammars | None = None

    @property
    def fingerprint(self) -> EngineFingerprint:
        """Known after ``start``; raises EngineError before."""
        return self._process.facts.fingerprint

    @property
    def limits(self) -> EngineLimits:
        """Known after ``start``; raises EngineError before."""
        return self._process.facts.limits

    @property
    def self_test(self) -> SelfTest:
        """What ``start`` proved."""
        return self._self_test

    async def start(self) -> None:
        """Start the processes and prove the engine against golden vectors.

        Raises EngineError if it does not start in time or samples anything but tw-gumbel-1.
        """
        try:
            await self._process.start()
            self._grammars = await asyncio.to_thread(
                Grammars.from_directory, self._model_dir, self.limits.vocabulary_size
            )
            self._self_test = await self._prove()
        except BaseException:
            await self.close()
            raise

    async def _prove(self) -> SelfTest:
        from trueweight.node.vllm import self_test  # noqa: PLC0415 - compiled kernels

        limits = self.limits
        jobs = self_test.probe_jobs(limits.vocabulary_size, limits.max_context_tokens)
        outputs = await asyncio.gather(*(self._collect(job) for job in jobs))
        claims = [self_test.score_job(*pair) for pair in zip(jobs, outputs, strict=True)]
        return self_test.judge(self._process.kernel_test, await self.score(claims))

    async def _collect(self, job: GenerateJob) -> tuple[int, ...]:
        return tuple([token async for step in self.generate(job) for token in step.token_ids])

    async def close(self) -> None:
        """End the engine's processes. Safe to call twice and after a failed start."""
        await self._process.close()

    async def generate(self, job: GenerateJob) -> AsyncGenerator[Step, None]:
        """Steps of one leg; closing or cancelling the iterator aborts it in the engine."""
        prompt = [*job.prompt, *job.prefix]
        if job.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
        self._check_tokens(prompt, job.max_tokens)
        self._check_sampling(job)
        if self._grammars is not None and job.grammar_source:
            await self._grammars.check(job.grammar_source)
        order = EngineOrder(
            job.sampling, job.seed, len(job.prompt), grammar_source=job.grammar_source
        )
        stop_ids = frozenset(job.sampling.stop_token_ids)
        request_id = f"g{next(self._serial)}"
        left = job.max_tokens
        self._open(1, len(prompt))
        try:
            async with aclosing(
                self._process.run(prompt, order, request_id, max_tokens=job.max_tokens)
            ) as outputs:
                async for token_ids in outputs:
                    left -= len(token_ids)
                    self._generated_tokens += len(token_ids)
                    self._held_tokens += len(token_ids)
                    yield Step(token_ids, _finish(token_ids[-1], left, stop_ids))
        finally:
            self._open(-1, left - job.max_tokens - len(prompt))

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Score]:
        """Score claimed outputs in one teacher-forced prefill each, all at once.

        Raises InvalidRequest for a job that does not fit, EngineError if the engine failed or the
        deadline of the options passed. Nothing is left in the engine in either case.
        """
        for job in jobs:
            self._check_tokens([*job.prompt, *job.prefix, *job.output], 0)
            self._check_sampling(job)
            if self._grammars is not None and job.grammar_source:
                # A cheat serves what does not compile; the worker would end with it.
                await asyncio.to_thread(self._grammars.matcher, job.grammar_source)
        scored = [job for job in jobs if job.output]
        batch = next(self._serial)
        keys = [f"s{batch}.{index}" for index in range(len(scored))]
        tokens = sum(len(job.prompt) + len(job.prefix) + len(job.output) for job in scored)
        self._open(len(scored), tokens)
        try:
            results = iter(await self._process.score(scored, keys)) if scored else iter(())
        finally:
            self._open(-len(scored), -tokens)
        return [next(results) if job.output else Score((), (), ()) for job in jobs]

    async def prefill(self, jobs: Sequence[ScoreJob]) -> None:
        """Compute the same tokens as ``score`` and score nothing: the yardstick of its cost."""
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                tokens = [*job.prompt, *job.prefix, *job.output[:-1]]
                self._check_tokens(tokens, 1)
                order = EngineOrder(job.sampling, job.seed, len(job.prompt))
                group.create_task(self._process.prefill(tokens, order, f"p{next(self._serial)}"))

    def _open(self, jobs: int, tokens: int) -> None:
        self._open_jobs += jobs
        self._held_tokens += tokens

    def load(self) -> EngineLoad:
        """Counted here: vLLM's own statistics cost more per step than the sampler does.

        ``kv_use`` counts the tokens of all open jobs, shared prefixes and queued jobs included, so
        it errs on the side of less work.
        """
        running = min(self._open_jobs, self._options.max_running)
        capacity = self._process.facts.kv_tokens if self._open_jobs else 0
        return EngineLoad(
            running=running,
            waiting=self._open_jobs - running,
            kv_use=min(1.0, self._held_tokens / capacity) if capacity else 0.0,
            generated_tokens_total=self._generated_tokens,
        )

    def _check_sampling(self, job: GenerateJob | ScoreJob) -> None:
        check(job.sampling)
        check_token_ids(job.sampling, self.limits.vocabulary_size)
        check_grammar(job.sampling, job.grammar_source)
        if job.grammar_source and self._grammars is None:
            raise UnsupportedParameter(
                "this engine has no grammars",
                param="response_format",
                hint="Send it without one.",
            )

    def _check_tokens(self, tokens: list[int], more: int) -> None:
        limits = self.limits
        if not tokens:
            raise InvalidRequest("an engine job needs at least one prompt token")
        if min(tokens) < 0 or max(tokens) >= limits.vocabulary_size:
            raise InvalidRequest(f"token ids must be below {limits.vocabulary_size}")
        if len(tokens) + more > limits.max_context_tokens:
            raise ContextOverflow(
                f"{len(tokens)} + {more} tokens do not fit {limits.max_context_tokens}",
                hint="Shorten the prompt or lower max_tokens.",
            )


def _finish(last: int, left: int, stop_ids: frozenset[int]) -> EngineFinish | None:
    """vLLM checks stop ids before the length; so does this."""
    if last in stop_ids:
        return EngineFinish.EOS
    return EngineFinish.LENGTH if left <= 0 else None

"""Legs of the engine benchmarks: one way of turning prompts into tokens, timed."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from trueweight.node.engine import GenerateJob
from trueweight.node.vllm.engine import VllmEngine
from trueweight.node.vllm.lifeline import OWNER_VARIABLE
from trueweight.node.vllm.options import VllmOptions, engine_arguments, engine_environment
from trueweight.protos.sampling import Sampling

Leg = Callable[[Sequence[GenerateJob]], Awaitable[int]]
"""Runs all jobs at once; the number of tokens that came out."""

PLAIN = Sampling()


def make_jobs(
    count: int, *, prompt_tokens: int, tokens: int, vocabulary: int, seed: int
) -> list[GenerateJob]:
    """Jobs that run to ``tokens``: no stop ids, other prompts for each ``seed``."""
    generator = random.Random(seed)  # noqa: S311 - a workload
    return [
        GenerateJob(
            job_id=f"bench-{seed}-{index}",
            prompt=tuple(generator.randrange(3, vocabulary) for _ in range(prompt_tokens)),
            prefix=(),
            sampling=PLAIN,
            seed=generator.randrange(2**62),
            max_tokens=tokens,
        )
        for index in range(count)
    ]


def engine_leg(engine: VllmEngine) -> Leg:
    """The canonical engine, called directly."""

    async def one(job: GenerateJob) -> int:
        return sum([len(step.token_ids) async for step in engine.generate(job)])

    async def run(jobs: Sequence[GenerateJob]) -> int:
        return sum(await asyncio.gather(*map(one, jobs)))

    return run


@asynccontextmanager
async def bare_engine(model_dir: Path, options: VllmOptions) -> AsyncIterator[Any]:
    """vLLM as it comes: same options, no sampler plug-in, no scorer, no load statistics."""
    os.environ.update(engine_environment(options, OWNER_VARIABLE))
    from vllm import AsyncEngineArgs  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    arguments = engine_arguments(model_dir, options, canonical=False)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        yield llm
    finally:
        if llm.output_handler is not None:
            llm.output_handler.cancel()
        await asyncio.to_thread(llm.shutdown, 20.0)


def bare_leg(llm: Any, *, temperature: float) -> Leg:
    """vLLM's own sampling at ``temperature``, unseeded (seeded is slower and breaks on CPUs)."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    serial = iter(range(10**9))

    async def one(job: GenerateJob) -> int:
        params = SamplingParams(
            temperature=temperature,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"type": "token", "prompt_token_ids": list(job.prompt)}
        outputs = llm.generate(prompt, params, f"bare-{next(serial)}")
        return sum([len(output.outputs[0].token_ids) async for output in outputs])

    async def run(jobs: Sequence[GenerateJob]) -> int:
        return sum(await asyncio.gather(*map(one, jobs)))

    return run


async def tokens_per_second(leg: Leg, jobs: Sequence[GenerateJob]) -> float:
    """Raises RuntimeError if the leg lost tokens: a fast wrong answer is no throughput."""
    start = time.perf_counter()
    produced = await leg(jobs)
    elapsed = time.perf_counter() - start
    wanted = sum(job.max_tokens for job in jobs)
    if produced != wanted:
        raise RuntimeError(f"{produced} tokens came out instead of {wanted}")
    return produced / elapsed

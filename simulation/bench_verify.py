"""What it costs to check an answer: scoring against a bare prefill of the same tokens, and
against generating them, alone and 32 at once; what L0 costs a receipt, and what both come to as a
share of the market's compute at the floor rate.

Two models: the shipped one and a random Llama of hidden size 1024 made by a fixed recipe. All
three ways run on the same engine in interleaved rounds. Run as
``python -m trueweight.simulation.bench_verify``; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from trueweight.node.engine import GenerateJob, ScoreJob
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.runtime import cli
from trueweight.simulation.bench_engines import make_jobs
from trueweight.simulation.bench_l0 import market_share, measure_l0, say_l0, say_shares
from trueweight.simulation.bench_node import demo_model
from trueweight.simulation.bench_report import Estimate, estimate, finish, ratios, say
from trueweight.simulation.random_llama import WIDE, write_random_llama

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
CONCURRENCIES = (1, 32)
_ALONE_REPEATS = 2
_OPTIONS = VllmOptions(max_context_tokens=1024, kv_cache_bytes=512 << 20)

Way = Callable[[], Awaitable[Any]]


async def measure(model: Path, rounds: int) -> dict[str, Any]:
    """Figures of one model, by concurrency."""
    engine = VllmEngine(model, _OPTIONS)
    await engine.start()
    try:
        figures: dict[str, Any] = {}
        for concurrency in CONCURRENCIES:
            figures[f"concurrency_{concurrency}"] = await _compare(engine, concurrency, rounds)
        return figures
    finally:
        await engine.close()


async def _compare(engine: VllmEngine, concurrency: int, rounds: int) -> dict[str, Estimate]:
    seconds: dict[str, list[float]] = {"prefill": [], "score": [], "generate": []}
    exact = total = 0
    for index in range(rounds + 1):
        jobs = make_jobs(
            concurrency if concurrency > 1 else _ALONE_REPEATS,
            prompt_tokens=PROMPT_TOKENS,
            tokens=OUTPUT_TOKENS,
            vocabulary=engine.limits.vocabulary_size,
            seed=7000 + index,
        )
        batches = [jobs] if concurrency > 1 else [[job] for job in jobs]
        spent, claims = await _timed_generation(engine, batches)
        scores = await engine.score([claim for batch in claims for claim in batch])
        margins = [margin for score in scores for margin in score.margins]
        exact, total = exact + sum(m == 0 for m in margins), total + len(margins)
        both = await _timed_checks(engine, claims, score_first=bool(index % 2))
        if index:
            for name, value in (("generate", spent), *both.items()):
                seconds[name].append(value)
            say(
                f"{concurrency} at once, round {index}: "
                + ", ".join(f"{name} {values[-1] * 1e3:.0f} ms" for name, values in seconds.items())
            )
    return {
        **{f"{name}_s": estimate(values) for name, values in seconds.items()},
        "score_over_prefill": estimate(ratios(seconds["score"], seconds["prefill"])),
        "score_over_generate": estimate(ratios(seconds["score"], seconds["generate"])),
        "prefill_over_generate": estimate(ratios(seconds["prefill"], seconds["generate"])),
        "exact_share": Estimate(exact / total, exact / total, exact / total, total),
    }


async def _timed_generation(
    engine: VllmEngine, batches: Sequence[Sequence[GenerateJob]]
) -> tuple[float, list[list[ScoreJob]]]:
    """Seconds for all batches one after the other, and what they claim."""
    claims = []
    start = time.perf_counter()
    for batch in batches:
        outputs = await asyncio.gather(*(_collect(engine, job) for job in batch))
        claims.append(
            [
                ScoreJob(job.prompt, (), output, job.sampling, job.seed)
                for job, output in zip(batch, outputs, strict=True)
            ]
        )
    return time.perf_counter() - start, claims


async def _timed_checks(
    engine: VllmEngine, batches: Sequence[Sequence[ScoreJob]], *, score_first: bool
) -> Mapping[str, float]:
    ways: dict[str, Callable[[Sequence[ScoreJob]], Awaitable[Any]]] = {
        "prefill": engine.prefill,
        "score": engine.score,
    }
    found = {}
    for name in sorted(ways, reverse=score_first):
        start = time.perf_counter()
        for batch in batches:
            await ways[name](batch)
        found[name] = time.perf_counter() - start
    return found


async def _collect(engine: VllmEngine, job: GenerateJob) -> tuple[int, ...]:
    return tuple([token async for step in engine.generate(job) for token in step.token_ids])


def _shares(figures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of the shipped and the wide model, as they were measured with many requests at once."""
    busy = max(CONCURRENCIES)
    l0_s = figures["l0"][f"{PROMPT_TOKENS}+{OUTPUT_TOKENS}"]["router_s"].median
    shares = {}
    for name in ("shipped", "wide"):
        if name in figures:
            found = figures[name][f"concurrency_{busy}"]
            request_s = found["generate_s"].median / busy
            ratio = found["score_over_generate"].median
            shares[name] = market_share(ratio, request_s, l0_s)
    return shares


@click.command()
@cli.path_option("--model", default=None, help="Model directory; the shipped one if not given.")
@cli.option("--rounds", default=11, type=click.IntRange(9, 1000), help="Interleaved rounds.")
@cli.option("--wide/--no-wide", default=True, help="Also the random model of hidden size 1024.")
def main(model: Path | None, rounds: int, wide: bool) -> None:
    """Cost of scoring against prefill and generation."""
    directory = model or demo_model()
    say(f"model {directory.name}")
    figures: dict[str, Any] = {"shipped": asyncio.run(measure(directory, rounds))}
    if wide:
        with tempfile.TemporaryDirectory() as root:
            say(f"random model, hidden {WIDE.hidden}")
            random_model = write_random_llama(Path(root) / "wide", WIDE)
            figures["wide"] = asyncio.run(measure(random_model, rounds))
    figures["l0"] = measure_l0()
    say_l0(figures["l0"])
    figures["floor_rate_share"] = _shares(figures)
    say_shares(figures["floor_rate_share"])
    about = {
        "model": directory.name,
        "wide_recipe": asdict(WIDE),
        "rounds": rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    finish("verify", figures, about)


if __name__ == "__main__":
    main()

"""What the canonical sampler costs vLLM, and what the node costs the engine.

Three ways to the same number of tokens on the same model: the bare engine with its own random
sampling, the engine with the canonical sampler, and the latter through a real node's session with
signed assignments and receipts (in this process, so the router's end costs cycles too). Rounds
interleave them in both orders, so that what else the machine does hits all alike. Run as
``python -m trueweight.simulation.bench_node``; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from trueweight.node.engine import GenerateJob
from trueweight.node.vllm.engine import VllmEngine
from trueweight.node.vllm.options import VllmOptions, usual_dtype
from trueweight.runtime import cli
from trueweight.simulation.bench_engines import (
    Leg,
    bare_engine,
    bare_leg,
    engine_leg,
    make_jobs,
    tokens_per_second,
)
from trueweight.simulation.bench_market import node_session
from trueweight.simulation.bench_report import Estimate, estimate, finish, ratios, say
from trueweight.simulation.demo_files import DEMO_MODEL
from trueweight.simulation.random_llama import WIDE, write_random_llama

_PROMPT_TOKENS = 32
_SETTINGS = ((1, 128), (32, 96))
"""Concurrency and tokens per request."""
_WIDE_PROMPT_TOKENS = 4
_WIDE_SETTINGS = ((1, 48), (32, 12))
"""For random wide models, whose steps take longer: prefill of long prompts would hide sampling."""

_RATIOS = {
    "sampler_over_bare": ("canonical", "bare"),
    "sampler_over_bare_greedy": ("canonical", "bare_greedy"),
    "node_over_sampler": ("node", "canonical"),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What every leg gets. ``settings``: concurrency and tokens per request."""

    prompt_tokens: int
    settings: tuple[tuple[int, int], ...]


async def measure(model: Path, rounds: int, load: Load) -> dict[str, Any]:
    """All figures. The node starts and ends the canonical engine."""
    options = VllmOptions(max_context_tokens=1024, dtype=usual_dtype())
    engine = VllmEngine(model, options)
    with tempfile.TemporaryDirectory() as root:
        # The bare engine first: it is built on this thread, and meanwhile no session lives.
        async with (
            bare_engine(model, options) as llm,
            node_session(Path(root), model, engine) as client,
        ):
            say(f"node ready, self-test {engine.self_test.equal} of {engine.self_test.positions}")
            legs: dict[str, Leg] = {
                "bare": bare_leg(llm, temperature=1.0),
                "bare_greedy": bare_leg(llm, temperature=0.0),
                "canonical": engine_leg(engine),
                "node": client.run,
            }
            figures: dict[str, Any] = {}
            for concurrency, tokens in load.settings:
                jobs_of = partial(
                    make_jobs,
                    concurrency,
                    prompt_tokens=load.prompt_tokens,
                    tokens=tokens,
                    vocabulary=engine.limits.vocabulary_size,
                )
                speeds = await _interleave(legs, rounds, concurrency, jobs_of)
                figures[f"concurrency_{concurrency}"] = _figures(speeds)
            figures["receipts_checked"] = client.check_receipts()
    return figures


async def _interleave(
    legs: Mapping[str, Leg],
    rounds: int,
    concurrency: int,
    jobs_of: Callable[..., list[GenerateJob]],
) -> dict[str, list[float]]:
    """Tokens per second of each leg and round; the first round only warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in legs}
    for index in range(rounds + 1):
        order = list(legs) if index % 2 else list(legs)[::-1]
        for position, name in enumerate(order):
            jobs = jobs_of(seed=(index * 100 + position) * 100 + concurrency)
            speed = await tokens_per_second(legs[name], jobs)
            if index:
                speeds[name].append(speed)
        if index:
            line = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
            say(f"concurrency {concurrency}, round {index}: {line} tokens/s")
    return speeds


def _figures(speeds: Mapping[str, list[float]]) -> dict[str, Estimate]:
    found = {f"{name}_tokens_per_s": estimate(values) for name, values in speeds.items()}
    for name, (numerator, denominator) in _RATIOS.items():
        found[name] = estimate(ratios(speeds[numerator], speeds[denominator]))
    return found


@click.command()
@cli.path_option("--model", default=None, help="Model directory; the shipped one if not given.")
@cli.option(
    "--vocabulary",
    default=0,
    type=click.IntRange(0, 1_000_000),
    help="Instead: a random model of hidden size 1024 with this vocabulary.",
)
@cli.option("--rounds", default=15, type=click.IntRange(9, 1000), help="Interleaved rounds.")
def main(model: Path | None, vocabulary: int, rounds: int) -> None:
    """Throughput of the bare engine, with the canonical sampler, and through the node."""
    with tempfile.TemporaryDirectory() as root:
        load = Load(_PROMPT_TOKENS, _SETTINGS)
        directory = model or DEMO_MODEL
        if vocabulary:
            shape = replace(WIDE, vocabulary=vocabulary)
            directory = write_random_llama(Path(root) / f"random-{vocabulary}", shape)
            load = Load(_WIDE_PROMPT_TOKENS, _WIDE_SETTINGS)
        figures = asyncio.run(measure(directory, rounds, load))
    about = {
        "model": directory.name,
        "dtype": usual_dtype(),
        "rounds": rounds,
        "settings": str(load.settings),
    }
    finish("node", figures, about)


if __name__ == "__main__":
    main()

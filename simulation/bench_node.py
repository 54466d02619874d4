"""What the canonical sampler costs vLLM, and what the node costs the engine.

Three ways to the same number of tokens on the same model: the bare engine with its own random
sampling, the engine with the canonical sampler, and the latter through a real node's session with
signed assignments and receipts (in this process, so the router's end costs cycles too). Rounds
interleave them in both orders, so that what else the machine does hits all alike. Run as
``python -m trueweight.simulation.bench_node``; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from trueweight.node.vllm.engine import VllmEngine, VllmOptions
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

_PROMPT_TOKENS = 32
_SETTINGS = ((1, 128), (32, 96))
"""Concurrency and tokens per request."""

_RATIOS = {
    "sampler_over_bare": ("canonical", "bare"),
    "sampler_over_bare_greedy": ("canonical", "bare_greedy"),
    "node_over_sampler": ("node", "canonical"),
}


def demo_model() -> Path:
    """The shipped model."""
    return Path(str(importlib.resources.files("trueweight.simulation"))) / "models" / "tw-demo"


async def measure(model: Path, rounds: int) -> dict[str, Any]:
    """All figures. The node starts and ends the canonical engine."""
    options = VllmOptions(max_context_tokens=1024)
    engine = VllmEngine(model, options)
    with tempfile.TemporaryDirectory() as root:
        async with node_session(Path(root), model, engine) as client:
            say(f"node ready, self-test {engine.self_test.equal} of {engine.self_test.positions}")
            async with bare_engine(model, options) as llm:
                legs: dict[str, Leg] = {
                    "bare": bare_leg(llm, temperature=1.0),
                    "bare_greedy": bare_leg(llm, temperature=0.0),
                    "canonical": engine_leg(engine),
                    "node": client.run,
                }
                figures: dict[str, Any] = {}
                for concurrency, tokens in _SETTINGS:
                    speeds = await _interleave(
                        legs, rounds, concurrency, tokens, engine.limits.vocabulary_size
                    )
                    figures[f"concurrency_{concurrency}"] = _figures(speeds)
                figures["receipts_checked"] = client.check_receipts()
    return figures


async def _interleave(
    legs: Mapping[str, Leg], rounds: int, concurrency: int, tokens: int, vocabulary: int
) -> dict[str, list[float]]:
    """Tokens per second of each leg and round; the first round only warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in legs}
    for index in range(rounds + 1):
        order = list(legs) if index % 2 else list(legs)[::-1]
        for position, name in enumerate(order):
            jobs = make_jobs(
                concurrency,
                prompt_tokens=_PROMPT_TOKENS,
                tokens=tokens,
                vocabulary=vocabulary,
                seed=(index * 100 + position) * 100 + concurrency,
            )
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
@cli.option("--rounds", default=15, type=click.IntRange(9, 1000), help="Interleaved rounds.")
def main(model: Path | None, rounds: int) -> None:
    """Throughput of the bare engine, with the canonical sampler, and through the node."""
    directory = model or demo_model()
    figures = asyncio.run(measure(directory, rounds))
    about = {"model": directory.name, "rounds": rounds, "settings": str(_SETTINGS)}
    finish("node", figures, about)


if __name__ == "__main__":
    main()

"""What each known cheat costs to convict: real vLLM output, scored by another implementation.

    python -m trueweight.simulation.bench_power --model DIR --calibration FILE

Every cheat generates its own pool of requests; the wealth then runs over many orders of it. Honest
traffic is held out: other prompts and seeds than the calibration's.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from trueweight.node.engine import Engine, ScoreJob
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.protos.evidence import Item, sum_nano
from trueweight.protos.manifest import build_manifest
from trueweight.runtime import cli
from trueweight.simulation import adversaries
from trueweight.simulation.adversary_weights import write_fp8, write_noisy, write_quantised
from trueweight.simulation.calibrate import generate
from trueweight.simulation.calibration_traffic import draw_jobs, load_prompts
from trueweight.simulation.power import Mix, Pool, Power, power
from trueweight.verifier.calibration_file import read_measured

CONCURRENCY = 32
# Calibration uses small seeds; what is judged here must not be among what it saw.
HELD_OUT_SEED = 770_001
Wrap = Callable[[Engine], Engine]


@dataclass(frozen=True)
class Cheat:
    """One way to serve. ``weights`` writes altered weights; ``wrap`` alters the engine."""

    name: str
    wrap: Wrap = lambda engine: engine
    weights: Callable[[Path, Path], Path] | None = None
    parameter_class: str = "plain"


ENGINE_CHEATS = (
    Cheat("honest"),
    Cheat("honest, T = 0", parameter_class="greedy"),
    Cheat("honest, top-p", parameter_class="top_p"),
    Cheat("wrong seed (also: text from another seed)", adversaries.WrongSeed),
    Cheat("T = 0.95 for 1", lambda e: adversaries.WrongTemperature(e, 0.95)),
    Cheat("top-p 0.9 unasked", lambda e: adversaries.WrongTopP(e, 0.9)),
    Cheat("hidden prompt", lambda e: adversaries.HiddenPrompt(e, [3, 40, 500, 60, 700] * 4)),
)
WEIGHT_CHEATS = (
    Cheat("4-bit weights", weights=lambda a, b: write_quantised(a, b, bits=4, group=32)),
    Cheat("fp8 weights", weights=write_fp8),
    Cheat("1 % weight noise", weights=lambda a, b: write_noisy(a, b, relative=0.01)),
    Cheat("5 % weight noise", weights=lambda a, b: write_noisy(a, b, relative=0.05)),
    Cheat("another model", weights=lambda a, b: write_noisy(a, b, relative=1.0)),
    Cheat("int8 per channel", weights=lambda a, b: write_quantised(a, b, bits=8, group=0)),
)


class PowerBench:
    """Generates pools with real engines, one engine after another, and scores them."""

    def __init__(self, model: Path, calibration: Path, tokens: int) -> None:
        self._model, self._tokens = model, tokens
        measured = read_measured(calibration)
        self.null = {entry.parameter_class: entry.mu0_nano for entry in measured.entries}
        manifest = build_manifest(
            model, market_id="", name="", revision="", licence="", now_unix_ms=0
        )
        self._context = manifest.max_context_tokens
        self._prompts = load_prompts(model, manifest.eos_token_ids, 2000, HELD_OUT_SEED)
        self._claims: list[tuple[Cheat, list[ScoreJob]]] = []

    async def collect(self, cheats: Sequence[Cheat], directory: Path) -> None:
        """Runs one engine on these weights and keeps what each of its cheats produced."""
        engine = VllmEngine(directory, VllmOptions(max_running=CONCURRENCY))
        started = time.monotonic()
        await engine.start()
        try:
            for cheat in cheats:
                name = cheat.parameter_class
                jobs = draw_jobs(self._prompts, name, HELD_OUT_SEED, self._context)
                wrapped = cheat.wrap(engine)
                claims = await generate(wrapped, jobs, self._tokens, CONCURRENCY)
                self._claims.append((cheat, claims))
                click.echo(f"{cheat.name}: {time.monotonic() - started:.0f} s", err=True)
        finally:
            await engine.close()

    def pools(self) -> list[Pool]:
        """Scores everything with the other implementation on the honest weights."""
        # Needs transformers, which takes seconds to import.
        from trueweight.simulation.hf_reference import HfReference  # noqa: PLC0415

        reference = HfReference(self._model, "bfloat16")
        found = []
        for cheat, claims in self._claims:
            scores = reference.score(claims)
            mu0 = self.null[cheat.parameter_class]
            items = tuple(
                Item(sum_nano(s.margins), len(s.margins), mu0) for s in scores if s.margins
            )
            tokens = sum(item.n for item in items)
            exact = sum(1 for s in scores for m in s.margins if m == 0) / max(1, tokens)
            found.append(Pool(cheat.name, items, exact))
        return found


MIXES = {
    "": Mix(),
    ", on 20 % of requests": Mix(cheat_share=0.2),
    ", 10 one-token requests each": Mix(one_token_each=10),
    ", after 5,000 honest requests": Mix(honest_before=5000),
}


def rows(pools: Sequence[Pool], orders: int) -> list[Power]:
    """The table: every cheat, and 4-bit weights in every disguise."""
    honest = pools[0]
    found = [power(pool, honest, Mix(), orders, seed=1) for pool in pools]
    for pool in pools:
        if pool.name == "4-bit weights":
            for label, mix in list(MIXES.items())[1:]:
                named = Pool(pool.name + label, pool.items, pool.exact)
                found.append(power(named, honest, mix, orders, seed=2))
            short = tuple(item for item in pool.items if item.n <= 16)
            if short:
                named = Pool("4-bit weights, outputs of at most 16 tokens", short, pool.exact)
                found.append(power(named, honest, Mix(), orders, seed=3))
    return found


async def run(bench: PowerBench, model: Path) -> None:
    """All engines, one after another."""
    await bench.collect(ENGINE_CHEATS, model)
    for cheat in WEIGHT_CHEATS:
        if cheat.weights is None:
            continue
        with tempfile.TemporaryDirectory() as directory:
            altered = cheat.weights(model, Path(directory) / "weights")
            await bench.collect((cheat,), altered)


@click.command()
@cli.path_option("--model", required=True, help="Model directory in Hugging Face layout.")
@cli.path_option("--calibration", required=True, help="Its calibration file.")
@cli.option("--tokens", default=20_000, type=click.IntRange(500), help="Pool per cheat.")
@cli.option("--orders", default=40, type=click.IntRange(6), help="Orders of each pool.")
def bench_power(**options: Any) -> None:
    """Tokens to conviction of every known cheat, median and 95th percentile."""
    bench = PowerBench(options["model"], options["calibration"], options["tokens"])
    asyncio.run(run(bench, options["model"]))
    found = rows(bench.pools(), options["orders"])
    cli.print_table(
        f"alpha = 10^-6, {options['orders']} orders, pools of {options['tokens']:,} tokens",
        ("served", "exact", "mean x", "convicted", "median tokens", "p95 tokens", "requests"),
        [
            (
                p.name,
                f"{p.exact:.2%}",
                f"{p.mean_x:.6f}",
                f"{p.convicted}/{p.orders}",
                f"{p.median_tokens:.0f}",
                f"{p.p95_tokens:.0f}",
                f"{p.median_requests:.0f} / {p.p95_requests:.0f}",
            )
            for p in found
        ],
    )
    click.echo(json.dumps({"power": [_finite(asdict(p)) for p in found]}))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: never convicted is null."""
    return {k: None if v == float("inf") else v for k, v in row.items()}


if __name__ == "__main__":
    bench_power()

"""``make bench-verify``: what verification costs, what it convicts, and whom it leaves alone.

- ``cost``: scoring against a bare prefill of the same tokens, and against generating them, alone
  and 32 at once, on the shipped model and a random Llama of hidden size 1024. Scoring and prefill
  run on a reference (float32), generating on a node's engine, in interleaved rounds. Also what L0
  costs a receipt, and what both come to as a share of the market's compute at the floor rate.
- ``cheats``: audited tokens until each known cheat is convicted (``bench_power``).
- ``honest``: the largest wealth of honest nodes on held-out traffic (``honest_run``).

The last two take hours at full size; measurements are kept and the next run goes on where the last
one stopped (``--minutes``). The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from trueweight.node.engine import GenerateJob, ScoreJob
from trueweight.node.vllm.engine import VllmEngine
from trueweight.node.vllm.options import VllmOptions, usual_dtype
from trueweight.protos.evidence import REFERENCE_DTYPE
from trueweight.runtime import cli
from trueweight.simulation import bench_power, charts, honest_run, structural_cheats
from trueweight.simulation.bench_engines import make_jobs
from trueweight.simulation.bench_l0 import market_share, measure_l0, say_l0, say_shares
from trueweight.simulation.bench_report import Estimate, estimate, finish, ratios, say
from trueweight.simulation.demo_files import DEMO_MODEL
from trueweight.simulation.margin_store import MarginStore
from trueweight.simulation.measuring import Measurement, Traffic, weights_of
from trueweight.simulation.random_llama import WIDE, write_random_llama
from trueweight.verifier.calibration_file import read_measured

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
CONCURRENCIES = (1, 32)
_ALONE_REPEATS = 2
_OPTIONS = VllmOptions(max_context_tokens=1024, kv_cache_bytes=512 << 20)


async def measure(model: Path, rounds: int) -> dict[str, Any]:
    """Figures of one model, by concurrency."""
    async with AsyncExitStack() as stack:
        dtypes = (usual_dtype(), REFERENCE_DTYPE)
        engines = [VllmEngine(model, replace(_OPTIONS, dtype=dtype)) for dtype in dtypes]
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.close)
        node, reference = engines
        return {
            f"concurrency_{count}": await _compare(node, reference, count, rounds)
            for count in CONCURRENCIES
        }


async def _compare(
    node: VllmEngine, reference: VllmEngine, concurrency: int, rounds: int
) -> dict[str, Estimate]:
    seconds: dict[str, list[float]] = {"prefill": [], "score": [], "generate": []}
    exact = total = 0
    for index in range(rounds + 1):
        jobs = make_jobs(
            concurrency if concurrency > 1 else _ALONE_REPEATS,
            prompt_tokens=PROMPT_TOKENS,
            tokens=OUTPUT_TOKENS,
            vocabulary=node.limits.vocabulary_size,
            seed=7000 + index,
        )
        batches = [jobs] if concurrency > 1 else [[job] for job in jobs]
        spent, claims = await _timed_generation(node, batches)
        scores = await reference.score([claim for batch in claims for claim in batch])
        margins = [margin for score in scores for margin in score.margins]
        exact, total = exact + sum(m == 0 for m in margins), total + len(margins)
        both = await _timed_checks(reference, claims, score_first=bool(index % 2))
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


def cost(model: Path, rounds: int, *, wide: bool) -> dict[str, Any]:
    """Scoring against prefill and generation."""
    say(f"model {model.name}")
    figures: dict[str, Any] = {"shipped": asyncio.run(measure(model, rounds))}
    if wide:
        with tempfile.TemporaryDirectory() as root:
            say(f"random model, hidden {WIDE.hidden}")
            random_model = write_random_llama(Path(root) / "wide", WIDE)
            figures["wide"] = asyncio.run(measure(random_model, rounds))
    figures["l0"] = measure_l0()
    say_l0(figures["l0"])
    figures["floor_rate_share"] = _shares(figures)
    say_shares(figures["floor_rate_share"])
    return figures


def cheats(options: dict[str, Any], work: Path) -> dict[str, Any]:
    """Audited tokens until each known cheat is convicted."""
    bench = bench_power.PowerBench(
        options["model"], options["calibration"], work / "pools", options["minutes"]
    )
    asyncio.run(bench.collect(options["tokens"], options["server"]))
    shown = bench.rows(options["orders"])
    bench_power.show(shown, options["orders"])
    structural = asyncio.run(structural_cheats.measure_all())
    structural_cheats.show(structural)
    if options["charts"] is not None:
        charts.write_all(options["charts"], shown, bench.roc_pools())
    return {
        "power": bench_power.as_figures(shown),
        "structural": [asdict(row) for row in structural],
    }


def honest(options: dict[str, Any], work: Path) -> dict[str, Any]:
    """The largest wealth of honest nodes on held-out traffic."""
    model, minutes = options["model"], options["minutes"]
    seed = honest_run.HONEST_SEED
    store = MarginStore(work / "honest", weights_of(model), seed)
    measurement = Measurement(model, store, Traffic.of_model(model, seed), minutes)
    entries = {e.parameter_class: e for e in read_measured(options["calibration"]).entries}
    run = honest_run.HonestRun(model.name, measurement, entries)
    asyncio.run(run.collect(options["honest_tokens"]))
    rows = run.rows(options["orders"])
    for name in honest_run.WIDE if options["wide"] else ():
        slug = name.rsplit(maxsplit=1)[-1]
        rows += asyncio.run(
            honest_run.wide_run(
                name,
                work / f"wide-{slug}",
                tokens=options["wide_tokens"],
                orders=options["orders"],
                minutes=minutes,
            )
        )
    honest_run.show(rows)
    return {"honest": [asdict(row) for row in rows]}


PARTS = ("cost", "cheats", "honest")


@click.command()
@cli.path_option("--model", default=None, help="Model directory; the shipped one if not given.")
@cli.path_option("--calibration", default=None, help="Default: MODEL.calibration.json.")
@cli.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@cli.option("--rounds", default=11, type=click.IntRange(9, 1000), help="Interleaved rounds (cost).")
@cli.option("--wide/--no-wide", default=True, help="Also random models of hidden size 1024.")
@cli.path_option("--work", default=Path(".trueweight/bench-verify"), help="Keeps measurements.")
@cli.option("--tokens", default=100_000, type=click.IntRange(500), help="Pool of each cheat.")
@cli.option(
    "--server",
    default="vllm",
    type=click.Choice(("vllm", "transformers")),
    help="What serves the cheats.",
)
@cli.option("--orders", default=40, type=click.IntRange(1), help="Random orders of each pool.")
@cli.option("--honest-tokens", default=1_000_000, type=click.IntRange(500), help="Shipped model.")
@cli.option("--wide-tokens", default=100_000, type=click.IntRange(500), help="Random models.")
@cli.option("--minutes", default=20.0, help="Measure for about so long a part; run again to go on.")
@cli.path_option("--charts", default=None, help="Write ROC and power curves here (PNG).")
def main(**options: Any) -> None:
    """What checking costs, what cheats cost, and that honest nodes have nothing to fear."""
    options["model"] = model = options["model"] or DEMO_MODEL
    options["calibration"] = options["calibration"] or model.with_name(
        f"{model.name}.calibration.json"
    )
    parts, work = options["parts"] or PARTS, options["work"]
    figures: dict[str, Any] = {}
    if "cost" in parts:
        figures |= cost(model, options["rounds"], wide=options["wide"])
    if "cheats" in parts:
        figures |= cheats(options, work)
    if "honest" in parts:
        figures |= honest(options, work)
    about = {
        **{name: value for name, value in options.items() if not isinstance(value, Path)},
        "model": model.name,
        "wide_recipe": asdict(WIDE),
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    finish("verify", figures, about)


if __name__ == "__main__":
    main()

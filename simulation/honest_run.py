"""Never the honest: held-out honest traffic against the production wealth.

Part of ``make bench-verify``. Every benign variation and parameter class of the calibration, with
prompts and seeds that it did not see, and traffic that a hostile client would choose; every
reference judges everything. A node lives through all requests of its kind in many random orders.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trueweight.node.vllm.options import VllmOptions, emulates_bfloat16
from trueweight.protos.evidence import CONVICT, Item, Wealth
from trueweight.protos.v1.audit_pb2 import CalibrationEntry
from trueweight.simulation.bench_report import table
from trueweight.simulation.calibrate import FLOAT32, NATIVE, REFERENCES, VARIANTS, Calibrator
from trueweight.simulation.calibration_traffic import CLASSES, SPECIAL, class_of
from trueweight.simulation.margin_store import MarginStore
from trueweight.simulation.measuring import Measurement, Source, Traffic, weights_of
from trueweight.simulation.power import items_of
from trueweight.simulation.random_llama import LlamaShape, write_random_llama
from trueweight.verifier.calibration import calibrate_class

HONEST_SEED = 880_001
HOSTILE = tuple(kind for kind in SPECIAL if kind.startswith("hostile "))
# All but grammar, which needs a tokeniser.
WIDE_CLASSES = tuple(kind for kind in CLASSES if kind != "grammar")
# A random model seldom ends an answer, so that fewer requests are as many tokens.
_WIDE_SLICE = 50
# Two weight scales: flat outputs with tiny noise, sharp ones with large noise.
WIDE = {
    "random, hidden 1024, std 0.02": LlamaShape(1024, 4, 16, 8, 2816, 8192, std=0.02),
    "random, hidden 1024, std 0.06": LlamaShape(1024, 4, 16, 8, 2816, 8192, std=0.06),
}


@dataclass(frozen=True, slots=True)
class HonestRow:
    """One kind of honest node as one reference saw it. ``of_null`` is the largest mean x of any
    of its kinds of traffic, as a share of that class's null mean."""

    model: str
    pair: str
    traffic: str
    tokens: int
    requests: int
    mean_x: float
    of_null: float
    orders: int
    convicted: int
    largest_wealth: float


def lifetimes(items: Sequence[Item], orders: int, seed: int) -> tuple[int, float]:
    """Convictions and the largest wealth over random orders of the same requests."""
    convicted, largest = 0, 1.0
    for number in range(orders):
        order = list(items)
        random.Random(f"{seed}/{number}").shuffle(order)  # noqa: S311  (reproducible orders)
        wealth, top = Wealth(), 1.0
        for item in order:
            wealth = wealth.add(*item)
            top = max(top, wealth.value)
        convicted, largest = convicted + (top >= CONVICT), max(largest, top)
    return convicted, largest


class HonestRun:
    """Held-out honest answers of one model, judged under its calibration."""

    def __init__(
        self,
        name: str,
        measurement: Measurement,
        entries: Mapping[str, CalibrationEntry],
        kinds: Sequence[str] = (*CLASSES, *HOSTILE),
        variants: Sequence[Source] = VARIANTS,
    ) -> None:
        self._name, self._measurement, self._entries = name, measurement, entries
        self._variants = variants
        # A class without calibration is no evidence, so there is nothing to judge.
        self._kinds = [kind for kind in kinds if class_of(kind) in entries]

    async def collect(self, tokens: int) -> None:
        """Answers about ``tokens`` tokens in all, over kinds and variants, and scores them."""
        share = sum(v.tokens_share for v in self._variants)
        each = max(1, round(tokens / len(self._kinds) / share))
        await Calibrator(self._measurement, self._variants, dict.fromkeys(self._kinds, each)).run()

    def rows(self, orders: int) -> list[HonestRow]:
        """Ordinary traffic in one life, hostile traffic in another, by pair."""
        ordinary = [k for k in self._kinds if k not in HOSTILE]
        hostile = [k for k in self._kinds if k in HOSTILE]
        found = [
            self._row(pair, label, kinds, orders)
            for pair in self._pairs()
            for label, kinds in (("every class", ordinary), ("hostile parameters", hostile))
        ]
        return [row for row in found if row.tokens]

    def _pairs(self) -> Iterable[tuple[str, str]]:
        for kind in dict.fromkeys(v.name for v in self._variants):
            for reference in REFERENCES:
                yield kind, reference

    def _row(
        self, pair: tuple[str, str], label: str, kinds: Sequence[str], orders: int
    ) -> HonestRow:
        items: list[Item] = []
        worst = 0.0
        for kind in kinds:
            entry = self._entries[class_of(kind)]
            sources = [v for v in self._variants if v.name == pair[0]]
            sample = self._measurement.sample(sources, kind, pair[1])
            found = items_of(sample.requests, entry)
            items += found
            null = sample.tokens * entry.mu0_nano
            worst = max(worst, sum(i.sum_x_nano for i in found) / null if null else 0.0)
        convicted, largest = lifetimes(items, orders, seed=1)
        tokens = sum(i.n for i in items)
        return HonestRow(
            model=self._name,
            pair=" / ".join(pair),
            traffic=label,
            tokens=tokens,
            requests=len(items),
            mean_x=sum(i.sum_x_nano for i in items) / tokens / 1e9 if tokens else 0.0,
            of_null=worst,
            orders=orders,
            convicted=convicted,
            largest_wealth=largest,
        )


def wide_variants(*, has_bfloat16: bool) -> tuple[list[Source], list[Source]]:
    """Nodes of a wide model that serve most tokens, and the other benign variations.

    Transformers in bfloat16 is one of them. On a machine whose CPU lacks bfloat16 vLLM's nodes
    compute in float32: in bfloat16 they would take many hours.
    """
    bulk = [v for v in VARIANTS if v.tokens_share == 1.0]
    others = [v for v in VARIANTS if v.tokens_share < 1.0]
    if not has_bfloat16:
        bulk = [v for v in bulk if v.name != NATIVE]
        others = [replace(v, name=FLOAT32, options=_in_float32(v.options)) for v in others]
    bulk.append(Source("transformers, bfloat16", "50 at once", transformers_dtype="bfloat16"))

    def sliced(found: Sequence[Source]) -> list[Source]:
        return [
            replace(v, slice_requests=max(4, round(_WIDE_SLICE * v.tokens_share))) for v in found
        ]

    return sliced(bulk), sliced(others)


def _in_float32(options: VllmOptions) -> VllmOptions:
    """As many tokens of twice the bytes."""
    return replace(options, dtype="float32", kv_cache_bytes=2 * options.kv_cache_bytes)


async def wide_run(
    name: str, work: Path, *, tokens: int, orders: int, minutes: float
) -> list[HonestRow]:
    """Calibrates a random model, then judges as many tokens of other traffic.

    No rows as long as something is missing."""
    model = write_random_llama(work / "model", WIDE[name])
    weights = weights_of(model)

    def measurement(seed: int) -> Measurement:
        store = MarginStore(work / f"seed-{seed}", weights, seed)
        return Measurement(model, store, Traffic.of_model(model, seed), minutes)

    bulk, others = wide_variants(has_bfloat16=not emulates_bfloat16())
    each = round(tokens / len(WIDE_CLASSES) / len(bulk))
    calibrator = Calibrator(measurement(1), bulk, dict.fromkeys(WIDE_CLASSES, each))
    await calibrator.run()
    if calibrator.missing():
        return []
    entries = {c: calibrate_class(c, calibrator.samples(c)) for c in WIDE_CLASSES}
    run = HonestRun(name, measurement(HONEST_SEED), entries, WIDE_CLASSES, (*bulk, *others))
    await run.collect(tokens)
    return run.rows(orders)


def show(rows: Sequence[HonestRow]) -> None:
    """The table."""
    table(
        "honest nodes, held-out traffic",
        ("model", "node / reference", "traffic", "tokens", "mean x", "worst kind / null",
         "convicted", "largest wealth"),
        [
            (
                r.model,
                r.pair,
                r.traffic,
                f"{r.tokens:,}",
                f"{r.mean_x:.6f}",
                f"{r.of_null:.2f}",
                f"{r.convicted}/{r.orders}",
                f"{r.largest_wealth:.2f}",
            )
            for r in rows
        ],
    )  # fmt: skip

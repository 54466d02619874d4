"""What each known cheat costs to convict: real vLLM output, scored by another implementation.

Part of ``make bench-verify``. Every cheat of ``simulation/cheats.py`` answers its own pool of
requests; the production wealth then runs over many orders of it. All traffic is held out: other
prompts and seeds than the calibration's. Pools are kept, so a second run goes on or only prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trueweight.protos.v1.audit_pb2 import CalibrationEntry
from trueweight.simulation.bench_report import table
from trueweight.simulation.calibration_traffic import class_of
from trueweight.simulation.cheats import HONEST, ROWS, SERVED, Row
from trueweight.simulation.margin_store import MarginStore
from trueweight.simulation.measuring import (
    TRANSFORMERS,
    Measurement,
    Traffic,
    by_transformers,
    weights_of,
)
from trueweight.simulation.power import Pool, Power, items_of, power
from trueweight.verifier.calibration import is_far_outside
from trueweight.verifier.calibration_file import read_measured

# Calibration uses small seeds; what is judged here must not be among what it saw.
HELD_OUT_SEED = 770_001


@dataclass(frozen=True, slots=True)
class Shown:
    """A finished row: ``refunded`` is the share of requests whose own verdict refunds them."""

    row: Row
    found: Power
    refunded: float


class PowerBench:
    """Makes the pools and reads them."""

    def __init__(self, model: Path, calibration: Path, pools: Path, minutes: float) -> None:
        measured = read_measured(calibration)
        self.entries: dict[str, CalibrationEntry] = {
            entry.parameter_class: entry for entry in measured.entries
        }
        traffic = Traffic.of_model(model, HELD_OUT_SEED)
        self.store = MarginStore(pools, weights_of(model), HELD_OUT_SEED)
        self._measurement = Measurement(model, self.store, traffic, minutes)

    async def collect(self, tokens: int, server: str = "vllm") -> None:
        """Answers and scores what is missing, while there is time. ``server`` "transformers" needs
        no engine and covers fewer cheats."""
        wanted = [
            (s.source, {kind: round(tokens * share) for kind, share in s.traffic.items()})
            for s in SERVED
        ]
        if server == "vllm":
            await self._measurement.run_cheats(wanted)
        else:
            for source, parts in wanted:
                self._measurement.answer_by_transformers(by_transformers(source), parts)
        kinds = dict.fromkeys(kind for _, traffic in wanted for kind in traffic)
        sources = [s for source, _ in wanted for s in (source, by_transformers(source))]
        self._measurement.judge_by_transformers(sources, list(kinds))

    def pool(self, source: str, kind: str) -> Pool:
        """Scored requests of one way of serving; empty if there are none."""
        served = next(s for s in SERVED if s.source.name == source)
        entry = self.entries[class_of(kind)]
        rows = [
            row
            for s in (served.source, by_transformers(served.source))
            for row in self._measurement.margins(s, kind, TRANSFORMERS)
        ]
        tokens = sum(map(len, rows))
        exact = sum(x == 0 for row in rows for x in row)
        return Pool(source, items_of(rows, entry), exact / tokens if tokens else 0.0)

    def roc_pools(self) -> dict[str, Pool]:
        """Plain traffic of every cheat that has some, the honest pool first."""
        names = [s.source.name for s in SERVED if "plain" in s.traffic]
        pools = {name: self.pool(name, "plain") for name in names}
        return {name: pool for name, pool in pools.items() if pool.items}

    def rows(self, orders: int) -> list[Shown]:
        """Every row whose pool is there."""
        honest = self.pool(HONEST, "plain")
        found = []
        for number, row in enumerate(ROWS):
            pool = replace(self.pool(row.pool, row.traffic), name=row.name)
            if pool.items and honest.items:
                entry = self.entries[class_of(row.traffic)]
                refunds = sum(is_far_outside(i.sum_x_nano, i.n, entry) for i in pool.items)
                measured = power(pool, honest, row.mix, orders, seed=number)
                found.append(Shown(row, measured, refunds / len(pool.items)))
        return found


def show(shown: Sequence[Shown], orders: int) -> None:
    """The table."""
    table(
        f"audited tokens until conviction, alpha = 10^-6, {orders} orders",
        ("served", "pool", "exact", "mean x", "refunded", "convicted", "median", "p95", "requests"),
        [
            (
                s.row.name,
                f"{s.found.pool_tokens:,}",
                f"{s.found.exact:.2%}",
                f"{s.found.mean_x:.6f}",
                f"{s.refunded:.0%}",
                f"{s.found.convicted}/{s.found.orders}",
                f"{s.found.median_tokens:,.0f}",
                f"{s.found.p95_tokens:,.0f}",
                f"{s.found.median_requests:.0f} / {s.found.p95_requests:.0f}",
            )
            for s in shown
        ],
    )


def as_figures(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """For the last line: JSON knows no infinity, never convicted is null."""
    rows = []
    for s in shown:
        row = {
            **asdict(s.found),
            "refunded": s.refunded,
            "target": s.row.target,
            "target_requests": s.row.target_requests,
        }
        del row["tokens"]
        rows.append({k: None if v == float("inf") else v for k, v in row.items()})
    return rows

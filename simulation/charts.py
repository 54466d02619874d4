"""Pictures of the power bench: ROC curves and power curves. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueweight.simulation.bench_power import Shown
from trueweight.simulation.power import Pool
from trueweight.verifier.plot import canvas

# Requests are joined to samples of at least so many tokens.
ROC_TOKENS = 300
ROC_SAMPLES = 4000


def write_all(directory: Path, shown: Sequence[Shown], pools: Mapping[str, Pool]) -> None:
    """``roc.png`` and ``power.png``. ``pools`` begins with the honest one."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_roc(directory / "roc.png", pools)
    _write_power(directory / "power.png", shown)


def _sample_means(pool: Pool, seed: int) -> list[float]:
    """Mean x of samples of at least ``ROC_TOKENS`` tokens, drawn with replacement."""
    chance = random.Random(seed)  # noqa: S311  (reproducible)
    found = []
    for _ in range(ROC_SAMPLES):
        total = tokens = 0
        while tokens < ROC_TOKENS:
            item = chance.choice(pool.items)
            total, tokens = total + item.sum_x_nano, tokens + item.n
        found.append(total / tokens)
    return found


def roc(honest: Sequence[float], cheat: Sequence[float]) -> list[tuple[float, float]]:
    """(false, true) positive rates over all thresholds, from the strictest on."""
    cuts = sorted({*honest, *cheat}, reverse=True)
    bad, good = sorted(cheat, reverse=True), sorted(honest, reverse=True)
    found, caught, wrong = [(0.0, 0.0)], 0, 0
    for cut in cuts:
        while caught < len(bad) and bad[caught] >= cut:
            caught += 1
        while wrong < len(good) and good[wrong] >= cut:
            wrong += 1
        found.append((wrong / len(good), caught / len(bad)))
    return found


def area(curve: Sequence[tuple[float, float]]) -> float:
    """Under a ROC curve: the chance that a cheat looks worse than an honest node."""
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))


def _write_roc(path: Path, pools: Mapping[str, Pool]) -> None:
    """One curve per cheat, against the first pool."""
    (_, honest), *cheats = pools.items()
    axes, figure = canvas()
    null = _sample_means(honest, 0)
    for number, (name, pool) in enumerate(cheats, start=1):
        curve = roc(null, _sample_means(pool, number))
        axes.plot(*zip(*curve, strict=True), label=f"{name} (AUC {area(curve):.4f})")
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlabel("honest samples above the threshold")
    axes.set_ylabel("cheating samples above it")
    axes.set_title(f"mean margin of {ROC_TOKENS} tokens")
    _finish(axes, figure, path)


def _write_power(path: Path, shown: Sequence[Shown]) -> None:
    """Share of orders convicted by audited tokens, for the undisguised cheats with a target and
    the one inside honest rounding."""
    axes, figure = canvas()
    for entry in shown:
        found = entry.found
        tokens = [t for t in found.tokens if math.isfinite(t)]
        if not tokens or entry.row.name != entry.row.pool:
            continue
        shares = [(index + 1) / found.orders for index in range(len(tokens))]
        axes.step([1, *tokens], [0.0, *shares], where="post", label=entry.row.name)
    axes.set_xscale("log")
    axes.set_xlabel("audited tokens")
    axes.set_ylabel("convicted at 10^6")
    axes.set_title("power")
    _finish(axes, figure, path)


def _finish(axes: Any, figure: Any, path: Path) -> None:
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=90)

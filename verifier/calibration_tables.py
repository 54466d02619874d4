"""What people are shown of calibrations: tables by class and by pair, and figures for --json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trueweight.protos.evidence import NANO
from trueweight.protos.v1.audit_pb2 import CalibrationEntry, CalibrationPair
from trueweight.runtime import cli

NOT_STATED = "not stated"
_WIDEST = 200


def as_figures(entries: Iterable[CalibrationEntry]) -> list[dict[str, Any]]:
    """Every entry with its pairs; x as shares from 0 to 1. No pairs: not stated."""
    return [
        {**_class_figures(e), "worst_pair": e.worst_pair, "pairs": [_pair(p) for p in e.pairs]}
        for e in entries
    ]


def print_calibration(title: str, entries: Sequence[CalibrationEntry]) -> None:
    """A table by class and one by class and pair."""
    _print(title, [_class_figures(e) for e in entries])
    _print("honest node / reference", [row for e in entries for row in _pair_rows(e)])


def _pair_rows(entry: CalibrationEntry) -> list[dict[str, Any]]:
    """Of an entry that states no pairs only the worst is known."""
    worst = CalibrationPair(
        pair=entry.worst_pair, mean_nano=entry.mean_nano, upper_bound_nano=entry.upper_bound_nano
    )
    unknown = dict.fromkeys(("requests", "tokens", "error"), NOT_STATED)
    rows = [_pair(pair) for pair in entry.pairs] or [_pair(worst) | unknown]
    return [
        {
            "class": entry.parameter_class,
            **row,
            "decides": "yes" if row["pair"] == entry.worst_pair else "",
        }
        for row in rows
    ]


def _class_figures(entry: CalibrationEntry) -> dict[str, Any]:
    return {
        "class": entry.parameter_class,
        "requests": entry.requests,
        "tokens": entry.tokens,
        "counts_from": entry.ignored_below_nano / NANO,
        "mean": entry.mean_nano / NANO,
        "upper": entry.upper_bound_nano / NANO,
        "confidence": entry.confidence_ppm / 10**6,
        "mu0": entry.mu0_nano / NANO,
        "refund_above": entry.refund_above_nano / NANO,
    }


def _pair(pair: CalibrationPair) -> dict[str, Any]:
    return {
        "pair": pair.pair,
        "requests": pair.requests,
        "tokens": pair.tokens,
        "mean": pair.mean_nano / NANO,
        "upper": pair.upper_bound_nano / NANO,
        "error": pair.error_ppb / NANO,
    }


def _print(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    titles = list(rows[0]) if rows else ["class"]
    cli.print_table(str(_cell(title)), titles, [[_cell(v) for v in row.values()] for row in rows])


def _cell(value: str | int | float) -> str | int:
    """Figures have six digits; text that others logged cannot move the cursor."""
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str):
        return (value if value.isprintable() else ascii(value))[:_WIDEST]
    return value

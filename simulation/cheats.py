"""The known cheats, by name: how each is served, on which traffic, and how it may hide.

Served by a real engine (``Served``), then shown in the power table as rows (``Row``): several rows
may tell of one pool, because the same answers come about in several ways or are mixed with others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trueweight.node.engine import Engine
from trueweight.node.vllm.engine import VllmOptions
from trueweight.simulation import adversaries
from trueweight.simulation.adversary_weights import (
    write_fine_tuned,
    write_fp8,
    write_noisy,
    write_quantised,
)
from trueweight.simulation.measuring import Source
from trueweight.simulation.power import Mix

OPTIONS = VllmOptions(max_running=64, max_batched_tokens=4096)
SHORT, LOW = "short outputs", "low entropy"
HONEST = "honest"


@dataclass(frozen=True)
class Served:
    """A way to serve and the kinds of traffic that it gets, with the share of the pool's tokens
    that each needs."""

    source: Source
    traffic: dict[str, float] = field(default_factory=lambda: {"plain": 1.0})


def _weights(
    name: str, write: Callable[[Path, Path], Path], traffic: dict[str, float] | None = None
) -> Served:
    return Served(Source(name, options=OPTIONS, weights=write), traffic or {"plain": 1.0})


def _engine(
    name: str, wrap: Callable[[Engine], Engine], traffic: dict[str, float] | None = None
) -> Served:
    return Served(Source(name, options=OPTIONS, wrap=wrap), traffic or {"plain": 1.0})


_EVERY_KIND = {"plain": 1.0, "greedy": 0.2, SHORT: 0.1, LOW: 0.2}
_WITH_CUTS = {**_EVERY_KIND, "top_p": 0.2, "multi_cut": 0.2}

SERVED = (
    Served(
        Source(HONEST, options=OPTIONS),
        _WITH_CUTS,
    ),
    _weights("4-bit weights", lambda a, b: write_quantised(a, b, bits=4, group=32), _WITH_CUTS),
    _weights("fp8 weights", write_fp8, _WITH_CUTS),
    _weights(
        "1 % weight noise",
        lambda a, b: write_noisy(a, b, relative=0.01),
        {"plain": 1.0, "greedy": 0.2, SHORT: 0.1},
    ),
    _engine(
        "T = 0.95 for 1",
        lambda e: adversaries.WrongTemperature(e, 0.95),
        {"plain": 1.0, SHORT: 0.1, LOW: 0.2},
    ),
    _weights("int8 per channel", lambda a, b: write_quantised(a, b, bits=8, group=0)),
    _weights("fine-tuned weights", write_fine_tuned, {"plain": 1.0, "greedy": 0.2}),
    _engine("top-p 0.9 unasked", lambda e: adversaries.WrongTopP(e, 0.9)),
    _engine(
        "another top-p than asked for", lambda e: adversaries.WrongTopP(e, 0.9), {"top_p": 1.0}
    ),
    _engine("wrong seed", adversaries.WrongSeed, {"plain": 1.0, SHORT: 0.1}),
    _weights("another model", lambda a, b: write_noisy(a, b, relative=1.0), _EVERY_KIND),
    _engine("hidden prompt", lambda e: adversaries.HiddenPrompt(e, [3, 40, 500, 60, 700] * 4)),
    _engine("early end", lambda e: adversaries.EarlyEnd(e, 0.25)),
    _weights("5 % weight noise", lambda a, b: write_noisy(a, b, relative=0.05)),
    _weights("5-bit weights", lambda a, b: write_quantised(a, b, bits=5, group=32)),
    _weights("6-bit weights", lambda a, b: write_quantised(a, b, bits=6, group=32)),
    _weights("8-bit weights", lambda a, b: write_quantised(a, b, bits=8, group=32)),
)
"""In the order in which they are measured when time is short."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``pool`` names the source; ``target`` is the median that the project
    has set itself, in audited tokens, ``target_requests`` the 95th percentile in requests."""

    name: str
    pool: str
    traffic: str = "plain"
    mix: Mix = field(default_factory=Mix)
    target: int | None = None
    target_requests: int | None = None


def _disguises(pool: str) -> tuple[Row, ...]:
    return (
        Row(f"{pool}, on 20 % of requests", pool, mix=Mix(cheat_share=0.2)),
        Row(f"{pool}, ten one-token requests each", pool, mix=Mix(one_token_each=10)),
        Row(f"{pool}, after 5,000 honest requests", pool, mix=Mix(honest_before=5000)),
    )


ROWS = (
    *(Row(f"honest, {kind}", HONEST, kind) for kind in SERVED[0].traffic),
    Row("wrong seed", "wrong seed", target_requests=10),
    Row("text from another seed (the same thing)", "wrong seed", target_requests=10),
    *_disguises("wrong seed"),
    Row("wrong seed, short outputs", "wrong seed", SHORT),
    Row("another model", "another model", target_requests=10),
    *_disguises("another model"),
    Row("another model, T = 0", "another model", "greedy"),
    Row("another model, short outputs", "another model", SHORT),
    Row("another model, low entropy", "another model", LOW),
    Row("hidden prompt or truncated context", "hidden prompt"),
    *_disguises("hidden prompt"),
    Row("early end with a forged stop token", "early end"),
    *_disguises("early end"),
    Row("top-p 0.9 unasked", "top-p 0.9 unasked"),
    *_disguises("top-p 0.9 unasked"),
    Row("top-p 0.9 for 0.5 to 0.99", "another top-p than asked for", "top_p"),
    Row("4-bit weights", "4-bit weights", target=1500),
    Row("4-bit weights, then a prefill with the true ones (the same text)", "4-bit weights"),
    Row("4-bit weights, T = 0", "4-bit weights", "greedy"),
    Row("4-bit weights, short outputs", "4-bit weights", SHORT),
    Row("4-bit weights, low entropy", "4-bit weights", LOW),
    Row("4-bit weights, top-p", "4-bit weights", "top_p"),
    Row("4-bit weights, several cuts", "4-bit weights", "multi_cut"),
    *_disguises("4-bit weights"),
    Row("5-bit weights", "5-bit weights"),
    Row("6-bit weights", "6-bit weights"),
    Row("8-bit weights", "8-bit weights"),
    Row("5 % weight noise", "5 % weight noise"),
    Row("fine-tuned weights", "fine-tuned weights"),
    *_disguises("fine-tuned weights"),
    Row("fine-tuned weights, T = 0", "fine-tuned weights", "greedy"),
    Row("T = 0.95 for 1", "T = 0.95 for 1", target=1500),
    Row("T = 0.95 for 1, short outputs", "T = 0.95 for 1", SHORT),
    Row("T = 0.95 for 1, low entropy", "T = 0.95 for 1", LOW),
    *_disguises("T = 0.95 for 1"),
    Row("fp8 weights", "fp8 weights", target=8000),
    Row("fp8 weights, T = 0", "fp8 weights", "greedy"),
    Row("fp8 weights, short outputs", "fp8 weights", SHORT),
    Row("fp8 weights, low entropy", "fp8 weights", LOW),
    Row("fp8 weights, top-p", "fp8 weights", "top_p"),
    Row("fp8 weights, several cuts", "fp8 weights", "multi_cut"),
    *_disguises("fp8 weights"),
    Row("1 % weight noise", "1 % weight noise", target=18000),
    Row("1 % weight noise, T = 0", "1 % weight noise", "greedy"),
    Row("1 % weight noise, short outputs", "1 % weight noise", SHORT),
    *_disguises("1 % weight noise"),
    Row("int8 per channel", "int8 per channel"),
)

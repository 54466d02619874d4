"""Cheats about counts and ends, over the production ledger: L0 refuses them one by one.

Synthetic engines without noise, so that what the cheat changed is known exactly.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trueweight.node.engine import Engine, GenerateJob
from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.protos.errors import ReceiptRefused
from trueweight.protos.sampling_parameters import Sampling, resolve
from trueweight.protos.v1.model_pb2 import FileEntry, Manifest
from trueweight.simulation import adversaries
from trueweight.simulation.audited_market import AuditedMarket, Order
from trueweight.simulation.bench_report import table

VOCABULARY = 512
REQUESTS = 60

CHEATS: dict[str, tuple[Callable[[Engine], Engine], int]] = {
    "truncation": (lambda e: adversaries.Truncation(e, 0.5), 60),
    "padding": (adversaries.Padding, 400),
}


@dataclass(frozen=True, slots=True)
class StructuralRow:
    """``touched``: answers that differ from the honest one; ``paid`` of them were paid for."""

    name: str
    requests: int
    touched: int
    paid: int
    refused_by: str


def _engine() -> SyntheticEngine:
    shape = ModelShape(vocabulary_size=VOCABULARY, mean_output_tokens=100)
    return SyntheticEngine(SyntheticModel(shape))


def _orders(max_tokens: int) -> Iterator[Order]:
    chance = random.Random(1)  # noqa: S311  (reproducible)
    sampling = resolve(Sampling(stop_token_ids=(0,)))
    for _ in range(REQUESTS):
        prompt = tuple(chance.randrange(1, VOCABULARY) for _ in range(12))
        yield Order(prompt, sampling, chance.randrange(2**62), max_tokens)


async def _answer(engine: Engine, order: Order) -> list[int]:
    job = GenerateJob("j", order.prompt, (), order.sampling, order.seed, order.max_tokens)
    return [token async for step in engine.generate(job) for token in step.token_ids]


async def _measure(name: str, directory: Path) -> StructuralRow:
    wrap, max_tokens = CHEATS[name]
    honest, cheat = _engine(), wrap(_engine())
    files = [FileEntry(path="model.safetensors", size_bytes=1, sha256=b"x" * 32)]
    manifest = Manifest(
        name="synthetic", vocabulary_size=VOCABULARY, eos_token_ids=[0], files=files
    )
    market = AuditedMarket(directory, manifest, nodes=1)
    await market.start()
    await honest.start()
    await cheat.start()
    touched = paid = 0
    checks: set[str] = set()
    try:
        (node,) = market.world.node
        await market.join(node, 10**9)
        for order in _orders(max_tokens):
            different = await _answer(honest, order) != await _answer(cheat, order)
            touched += different
            try:
                await market.serve(node, cheat, order)
                paid += different
            except ReceiptRefused as error:
                checks.add(error.check)
    finally:
        await honest.close()
        await cheat.close()
        await market.close()
    return StructuralRow(name, REQUESTS, touched, paid, ", ".join(sorted(checks)))


async def measure_all() -> list[StructuralRow]:
    """Every structural cheat."""
    found = []
    for name in CHEATS:
        with tempfile.TemporaryDirectory() as directory:
            found.append(await _measure(name, Path(directory)))
    return found


def show(rows: Sequence[StructuralRow]) -> None:
    """The table."""
    table(
        "refused by L0, refunded in full",
        ("cheat", "requests", "touched", "of these paid", "refused by check"),
        [(r.name, str(r.requests), str(r.touched), str(r.paid), r.refused_by) for r in rows],
    )

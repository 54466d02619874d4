"""CPU time of the canonical sampler per row of logits, beside what any sampler costs.

Processor time of one thread, the best of several rounds, so that what else the machine does
hardly matters. ``argmax`` and ``softmax, exponential, argmax`` are torch's: greedy sampling, and
the random sampling of vLLM on CPUs. Run as ``python -m trueweight.simulation.bench_sampler``; the
last line is one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import numpy as np
import torch

from trueweight.node import kernels
from trueweight.node.canonical import RowSampler, Scratch
from trueweight.protos.sampling import Sampling, resolve
from trueweight.simulation.bench_report import finish, say

VOCABULARIES = (2_048, 8_192, 32_768, 152_064)
_ROWS = 32
_ROUNDS = 5
_SCALE = 3.0  # standard deviation of the logits; flatter ones cost top-p more
_RICH = {
    "top_p 0.9": Sampling(top_p=0.9),
    "top_k 40": Sampling(top_k=40),
    "min_p 0.05": Sampling(min_p=0.05),
    "repetition 1.1": Sampling(repetition_penalty=1.1),
    "bias of one id": Sampling(logit_bias=((1, 1.0),)),
}


def _cpu_us(work: Callable[[], object], repeats: int) -> float:
    """Processor microseconds of one call."""
    work()
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.process_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.process_time() - start) / repeats)
    return best * 1e6


def measure(vocabulary: int) -> dict[str, float]:
    """Microseconds per row by way of sampling."""
    generator = np.random.default_rng(vocabulary)
    logits = (generator.standard_normal((_ROWS, vocabulary)) * _SCALE).astype(np.float32)
    tensor, scratch = torch.from_numpy(logits), Scratch(vocabulary)
    each, winners = np.arange(_ROWS), np.empty(_ROWS, np.int64)
    ones, zeros = np.ones(_ROWS, np.float32), np.zeros(_ROWS, np.float32)
    noise = torch.empty_like(tensor)

    def batch(temperatures: np.ndarray) -> Callable[[], object]:
        return lambda: kernels.sample_plain_rows(
            logits, each, each, each, temperatures, winners, scratch.rows[1]
        )

    whole: dict[str, Callable[[], object]] = {
        "argmax": lambda: tensor.argmax(-1),
        "softmax, exponential, argmax": lambda: (
            tensor.softmax(-1).div_(noise.exponential_()).argmax(-1)
        ),
        "greedy": batch(zeros),
        "plain": batch(ones),
    }
    repeats = max(2, 4_000_000 // (vocabulary * _ROWS))
    found = {name: _cpu_us(work, repeats) / _ROWS for name, work in whole.items()}
    for name, sampling in _RICH.items():
        sampler = RowSampler(resolve(sampling), 1, [1, 2, 3], [], scratch)
        found[name] = _cpu_us(lambda s=sampler: s.winner(logits[0], [4]), repeats * 8)  # type: ignore[misc]
    return found


@click.command()
def main() -> None:
    """CPU time of sampling one row, by vocabulary and parameters."""
    torch.set_num_threads(1)
    figures = {vocabulary: measure(vocabulary) for vocabulary in VOCABULARIES}
    say("microseconds of CPU per row, at vocabulary " + ", ".join(f"{v:,}" for v in figures))
    for name in figures[VOCABULARIES[0]]:
        say(f"{name:>30}" + "".join(f"{found[name]:10,.1f}" for found in figures.values()))
    finish("sampler", {"cpu_us_per_row": figures}, {"rows": _ROWS, "logits_std": _SCALE})


if __name__ == "__main__":
    main()

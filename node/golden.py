"""Proving a sampler against the golden vectors of the contract before anything is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trueweight.node.engine import SelfTest
from trueweight.protos.errors import EngineError
from trueweight.protos.golden_vectors import load_golden
from trueweight.protos.sampling import Sampling, sample


@dataclass(frozen=True, slots=True, eq=False)
class GoldenCase:
    """One row and what must come out of it. ``scores``: claimed token, margin, logprob, rank."""

    logits: NDArray[np.float32]
    sampling: Sampling
    seed: int
    prompt: list[int]
    output: list[int]
    mask: NDArray[np.bool_] | None
    token: int
    scores: list[tuple[int, float, float, int]]


def golden_cases() -> tuple[list[GoldenCase], float]:
    """All sampling cases, and the absolute tolerance of margins and log-probabilities."""
    return [_case(fields) for fields in load_golden("sampling")["cases"]], 1e-4


def prove_sampler(sampler: Callable[[GoldenCase], int]) -> SelfTest:
    """Every golden case through ``sampler``. Raises EngineError if a token differs, for instance
    because this machine's arithmetic does."""
    cases, _ = golden_cases()
    equal = sum(sampler(case) == case.token for case in cases)
    if equal != len(cases):
        raise EngineError(
            f"only {equal} of {len(cases)} golden tokens were sampled",
            hint="This machine or its numpy build is not supported.",
        )
    return SelfTest(len(cases), equal)


def prove_reference_sampler() -> SelfTest:
    """The numpy reference against the golden vectors. Raises EngineError."""
    return prove_sampler(
        lambda case: sample(
            case.logits, case.sampling, case.seed, case.prompt, case.output, mask=case.mask
        )
    )


def _case(fields: dict[str, Any]) -> GoldenCase:
    mask = fields["mask"]
    return GoldenCase(
        logits=np.array(fields["logits"], dtype=np.float32),
        sampling=_sampling(fields["sampling"]),
        seed=int(fields["seed"]),
        prompt=fields["prompt"],
        output=fields["output"],
        mask=None if mask is None else np.array(mask, dtype=np.bool_),
        token=fields["token"],
        scores=[tuple(score) for score in fields["scores"]],
    )


def _sampling(fields: dict[str, Any]) -> Sampling:
    values = {name: _as_tuples(value) for name, value in fields.items()}
    if "grammar_sha256" in values:
        values["grammar_sha256"] = bytes.fromhex(values["grammar_sha256"])
    return Sampling(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value

"""Proving a sampler against the golden vectors of the contract before anything is served."""

from __future__ import annotations

from typing import Any

import numpy as np

from trueweight.node.engine import SelfTest
from trueweight.protos.errors import EngineError
from trueweight.protos.golden_vectors import load_golden
from trueweight.protos.sampling import Sampling, sample


def prove_reference_sampler() -> SelfTest:
    """Every golden sampling case through the numpy reference. Raises EngineError if one differs,
    for instance because this machine's arithmetic does."""
    cases = load_golden("sampling")["cases"]
    equal = sum(_sampled(case) == case["token"] for case in cases)
    if equal != len(cases):
        raise EngineError(
            f"only {equal} of {len(cases)} golden tokens were sampled",
            hint="This machine or its numpy build is not supported.",
        )
    return SelfTest(len(cases), equal)


def _sampled(case: dict[str, Any]) -> int:
    mask = case["mask"]
    return sample(
        np.array(case["logits"], dtype=np.float32),
        _sampling(case["sampling"]),
        int(case["seed"]),
        case["prompt"],
        case["output"],
        mask=None if mask is None else np.array(mask, dtype=np.bool_),
    )


def _sampling(fields: dict[str, Any]) -> Sampling:
    values = {name: _as_tuples(value) for name, value in fields.items()}
    if "grammar_sha256" in values:
        values["grammar_sha256"] = bytes.fromhex(values["grammar_sha256"])
    return Sampling(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value

"""Proof at start that the Triton kernels of this device sample and score tw-gumbel-1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trueweight.node.canonical import is_plain
from trueweight.node.engine import SelfTest
from trueweight.node.golden import GoldenCase, golden_cases
from trueweight.node.vllm.device_rules import Batch, DeviceRules
from trueweight.protos.errors import EngineError


def check_device(device: torch.device, every: int = 1) -> SelfTest:
    """The golden vectors on ``device``, those of one vocabulary size as one batch. ``every``: only
    each n-th case and its first claim, for an interpreter, which is slow. Raises EngineError at the
    first other token or score."""
    cases, tolerance = golden_cases()
    cases = cases[::every]
    by_size: dict[int, list[GoldenCase]] = defaultdict(list)
    for case in cases:
        by_size[case.logits.size].append(case)
    for size, group in by_size.items():
        rules, batch = _batch(group, size, device)
        tokens = rules.sample(batch).tolist()
        if tokens != [case.token for case in group]:
            raise EngineError("the sampler on this device differs from the golden vectors")
        claims = max(len(case.scores) for case in group) if every == 1 else 1
        for claim in range(claims):
            _check_scores(group, claim, rules, batch, tolerance)
    return SelfTest(len(cases), len(cases))


def _check_scores(
    group: Sequence[GoldenCase], claim: int, rules: DeviceRules, batch: Batch, tolerance: float
) -> None:
    wanted = [case.scores[claim % len(case.scores)] for case in group]
    claimed = torch.tensor([score[0] for score in wanted], device=rules.device)
    margins, logprobs, ranks = (found.tolist() for found in rules.score(batch, claimed))
    close = np.allclose(margins, [s[1] for s in wanted], rtol=0.0, atol=tolerance)
    close &= np.allclose(logprobs, [s[2] for s in wanted], rtol=0.0, atol=tolerance)
    if not close or ranks != [s[3] for s in wanted]:
        raise EngineError("the scorer on this device differs from the golden vectors")


def _batch(
    group: Sequence[GoldenCase], size: int, device: torch.device
) -> tuple[DeviceRules, Batch]:
    """One slot and one row per case."""
    rules = DeviceRules(len(group), size, device)
    histories = [[*case.prompt, *case.output] for case in group]
    longest = max(map(len, histories))
    masks = [np.zeros(size, dtype=np.bool_)]
    mask_rows = []
    for slot, case in enumerate(group):
        rules.put(slot, case.sampling, case.seed, len(case.prompt))
        mask_rows.append(-1 if case.mask is None else len(masks))
        if case.mask is not None:
            masks.append(case.mask)
    rules.flush()
    padded = [history + [0] * (longest + 1 - len(history)) for history in histories]
    batch = Batch(
        logits=torch.from_numpy(np.stack([case.logits for case in group])).to(device),
        slots=torch.arange(len(group), dtype=torch.int32, device=device),
        positions=torch.tensor([len(h) - 1 for h in histories], device=device),
        tokens=torch.tensor(padded, dtype=torch.int32, device=device),
        longest=longest,
        masks=torch.from_numpy(np.stack(masks)).to(device),
        mask_rows=torch.tensor(mask_rows, dtype=torch.int32, device=device),
    )
    return rules, batch


def native_is_canonical(device: torch.device) -> bool:
    """Whether vLLM's seeded sampler gives the golden tokens of plain sampling on this device: then
    such requests need no plug-in."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample  # noqa: PLC0415 - vLLM is heavy

    cases = [c for c in golden_cases()[0] if c.mask is None and is_plain(c.sampling)]
    return all(_native_token(gumbel_sample, case, device) == case.token for case in cases)


def _native_token(gumbel_sample: Any, case: GoldenCase, device: torch.device) -> int:
    temperature = torch.tensor([case.sampling.temperature], dtype=torch.float32, device=device)
    logits = torch.from_numpy(case.logits[None, :].copy()).to(device)
    if case.sampling.temperature:
        logits = logits / temperature
    sampled = gumbel_sample(
        logits,
        torch.zeros(1, dtype=torch.int32, device=device),
        temperature,
        torch.tensor([case.seed], dtype=torch.int64, device=device),
        torch.tensor([len(case.prompt) + len(case.output) - 1], dtype=torch.int64, device=device),
        apply_temperature=False,
        is_drafting=False,
    )
    return int(sampled[0])

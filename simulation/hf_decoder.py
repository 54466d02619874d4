"""Serves with transformers: another implementation that answers, in one process, within seconds.

For pools of cheats where starting an engine for each costs more than it answers. Prompts are padded
on the left; requests that end leave the batch. Below float32, matrix products add up in float32 and
are rounded once, as hardware for such numbers does; without such hardware this is five times faster
than PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trueweight.node.canonical import RowSampler, Scratch
from trueweight.node.engine import GenerateJob

BATCH = 250


class HfDecoder:
    """Canonical sampling on transformers' logits. Knows no grammars."""

    def __init__(self, model_directory: Path, dtype: str = "float32") -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_directory), dtype=getattr(torch, dtype)
        ).eval()
        if dtype != "float32":
            _add_up_in_float32(self._model)
        self._scratch = Scratch(int(self._model.config.vocab_size))

    def answer(self, jobs: Sequence[GenerateJob]) -> list[list[int]]:
        """The outputs, in the order of the jobs."""
        found: list[list[int]] = []
        for start in range(0, len(jobs), BATCH):
            with torch.inference_mode():
                found += self._batch(jobs[start : start + BATCH])
        return found

    def _batch(self, jobs: Sequence[GenerateJob]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in jobs]
        samplers = [RowSampler(j.sampling, j.seed, j.prompt, (), self._scratch) for j in jobs]
        longest = max(len(job.prompt) for job in jobs)
        rows = [[0] * (longest - len(job.prompt)) + list(job.prompt) for job in jobs]
        ids = torch.tensor(rows)
        mask = torch.tensor(
            [[int(i >= longest - len(j.prompt)) for i in range(longest)] for j in jobs]
        )
        alive, cache = list(range(len(jobs))), None
        while alive:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            step = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = step.past_key_values, step.logits[:, -1].float().numpy()
            for row, index in zip(logits, alive, strict=True):
                outputs[index].append(
                    samplers[index].winner(np.ascontiguousarray(row), outputs[index])
                )
            going = [n for n, i in enumerate(alive) if not _ended(jobs[i], outputs[i])]
            alive = [alive[n] for n in going]
            if not alive:
                break
            if len(going) < len(logits):
                kept = torch.tensor(going)
                cache.batch_select_indices(kept)
                mask = mask[kept]
            ids = torch.tensor([[outputs[i][-1]] for i in alive])
            mask = torch.cat((mask, torch.ones((len(alive), 1), dtype=mask.dtype)), dim=1)
        return outputs


def _add_up_in_float32(model: torch.nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            bias = None if layer.bias is None else layer.bias.detach().float()
            weight = layer.weight.detach()
            layer.forward = partial(_product, weight.float(), bias, weight.dtype)


def _product(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: torch.Tensor
) -> torch.Tensor:
    return torch.nn.functional.linear(rows.float(), weight, bias).to(dtype)


def _ended(job: GenerateJob, output: Sequence[int]) -> bool:
    return len(output) >= job.max_tokens or output[-1] in job.sampling.stop_token_ids

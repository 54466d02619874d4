"""The canonical sampler inside vLLM's Model Runner V2 (the default on GPUs), as a logits processor.

The engine samples greedily, as under V1: this processor computes each of our rows' canonical token
on the device and sets that one logit to plus infinity. Nothing is copied to the host but the
outputs of requests with a grammar, whose matcher lives there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from trueweight.node.vllm.device_rules import INVALID_ROW, Batch, DeviceRules
from trueweight.node.vllm.grammars import cursor_of, grammars_of
from trueweight.node.vllm.wire import unpack
from trueweight.protos.errors import EngineError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )

    from trueweight.node.grammar import GrammarCursor


class CanonicalSampler(LogitsProcessor):  # type: ignore[misc]
    """See the module. Given to vLLM by name, instantiated in each worker."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._states = req_states
        self._rules = DeviceRules(req_states.max_num_reqs, req_states.vocab_size, req_states.device)
        self._grammars = grammars_of(vllm_config)
        self._cursors: dict[int, GrammarCursor] = {}
        self._prompt_lens: dict[int, int] = {}
        self._ours: set[int] = set()
        self._was_invalid: torch.Tensor | None = None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        order = unpack(sampling_params.extra_args)
        self._cursors.pop(req_idx, None)
        if order is None or order.score_key or order.native:
            self._ours.discard(req_idx)
            self._rules.put(req_idx, None, 0, 0)
            return False
        self._ours.add(req_idx)
        self._rules.put(req_idx, order.sampling, order.seed, order.prompt_len)
        self._prompt_lens[req_idx] = order.prompt_len
        cursor = cursor_of(order, self._grammars)
        if cursor is not None:
            self._cursors[req_idx] = cursor
        return True

    def apply_staged_writes(self) -> None:
        self._rules.flush()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        if not self._ours.intersection(ctx.idx_mapping_np.tolist()):
            return logits
        self._check_last_step()
        winners = self._rules.sample(self._batch(logits, ctx))
        self._was_invalid = (winners == INVALID_ROW).any()
        at = winners.clamp_min(0)[:, None]
        values = torch.where(winners[:, None] >= 0, torch.inf, logits.gather(1, at))
        return logits.scatter_(1, at, values)

    def _check_last_step(self) -> None:
        """Asked one step late: the answer has arrived by then, so that nothing waits for it."""
        if self._was_invalid is not None and bool(self._was_invalid):
            raise EngineError("the logits hold NaN or +inf")

    def _batch(self, logits: torch.Tensor, ctx: LogitsContext) -> Batch:
        device, lengths = logits.device, ctx.seq_lens_upper_bound_np
        masks, mask_rows = self._masks(ctx.idx_mapping_np, lengths)
        return Batch(
            logits=logits,
            slots=ctx.expanded_idx_mapping.to(torch.int32),
            positions=ctx.pos.to(torch.int64),
            tokens=self._states.all_token_ids.gpu,
            longest=int(lengths.max(initial=0)),
            masks=self._rules.no_mask if masks is None else torch.from_numpy(masks).to(device),
            mask_rows=torch.from_numpy(mask_rows).to(device),
        )

    def _masks(
        self, slots: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Masks of the rows under a grammar; rows still in their prompt get none."""
        mask_rows = np.full(len(slots), -1, dtype=np.int32)
        masks: list[np.ndarray] = []
        for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
            cursor, first = self._cursors.get(slot), self._prompt_lens.get(slot, 0)
            if cursor is None or length < first:
                continue
            output = self._states.all_token_ids.gpu[slot, first:length].cpu().numpy()
            mask_rows[row] = len(masks)
            masks.append(cursor.mask_after(output, length - first))
        return (np.stack(masks) if masks else None), mask_rows

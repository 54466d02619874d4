"""Scoring in vLLM's Model Runner V2, on the device from hidden state to margin.

The runner hands every step's hidden states to its worker for prompt log-probabilities; the wrapper
turns those of claimed outputs into logits, in blocks of rows, and the blocks into three numbers per
token, which stay on the device until they are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trueweight.node.vllm.device_rules import Batch, DeviceRules
from trueweight.node.vllm.grammars import cursor_of, grammars_of
from trueweight.node.vllm.kept_scores import KeptScores
from trueweight.node.vllm.wire import EngineOrder, pack_score, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from trueweight.node.grammar import GrammarCursor

    LogitsOf = Callable[[torch.Tensor], torch.Tensor | None]

# Of logits; as much again for processed and for noisy rows. Larger than on CPUs: a row is one
# program, and a device wants many.
_BLOCK_BYTES = 64 << 20


class DeviceTask:
    """One request being scored. Positions count from the start of prompt + outputs."""

    def __init__(
        self, order: EngineOrder, tokens: torch.Tensor, grammar: GrammarCursor | None
    ) -> None:
        """``tokens`` is prompt and outputs but the last claimed one, int32 on the device."""
        last = torch.tensor([order.last_claimed], dtype=torch.int32, device=tokens.device)
        self.order, self.tokens = order, torch.cat([tokens, last])[None, :]
        self.end = self.tokens.shape[1]
        count = self.end - order.score_from
        self._margins = torch.zeros(count, dtype=torch.float64, device=tokens.device)
        self._logprobs = torch.zeros_like(self._margins)
        self._ranks = torch.full((count,), -2, dtype=torch.int64, device=tokens.device)
        self._grammar = grammar
        self._output = self.tokens[0, order.prompt_len :].cpu().numpy() if grammar else None

    def score(self, rules: DeviceRules, logits: torch.Tensor, position: int) -> None:
        """Row i of ``logits`` predicts the token at ``position + i``."""
        rows, device = logits.shape[0], logits.device
        masks, mask_rows = self._masks(rules, rows, position)
        batch = Batch(
            logits=logits,
            slots=torch.zeros(rows, dtype=torch.int32, device=device),
            positions=torch.arange(position - 1, position - 1 + rows, device=device),
            tokens=self.tokens,
            longest=position - 1 + rows,
            masks=masks,
            mask_rows=mask_rows,
        )
        claimed = self.tokens[0, position : position + rows].to(torch.int64)
        at = slice(position - self.order.score_from, position - self.order.score_from + rows)
        self._margins[at], self._logprobs[at], self._ranks[at] = rules.score(batch, claimed)

    def _masks(
        self, rules: DeviceRules, rows: int, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.tokens.device
        if self._grammar is None or self._output is None:
            none = torch.full((rows,), -1, dtype=torch.int32, device=device)
            return rules.no_mask, none
        first = position - self.order.prompt_len
        masks = [self._grammar.mask_after(self._output, first + i) for i in range(rows)]
        each = torch.arange(rows, dtype=torch.int32, device=device)
        return torch.from_numpy(np.stack(masks)).to(device), each

    def packed(self) -> list[bytes] | str:
        ranks = self._ranks.cpu().numpy()
        if ranks.size and ranks.min() < 0:
            return "the logits hold NaN or +inf" if ranks.min() == -1 else "positions were skipped"
        return pack_score(self._margins.cpu().numpy(), self._logprobs.cpu().numpy(), ranks)


class DeviceScorer:
    """All requests being scored in one worker of Model Runner V2."""

    def __init__(self, runner: Any) -> None:
        self.kept: KeptScores[DeviceTask] = KeptScores()
        self._orders: dict[str, EngineOrder] = {}
        self._size = runner.req_states.vocab_size
        self._rules = DeviceRules(1, self._size, runner.req_states.device)
        self._grammars = grammars_of(runner.vllm_config)
        self._block_rows = max(1, _BLOCK_BYTES // (4 * self._size))
        self._hook(runner.prompt_logprobs_worker)

    def _hook(self, worker: Any) -> None:
        add, remove, compute = (
            worker.add_request,
            worker.remove_request,
            worker.compute_prompt_logprobs,
        )

        def add_request(req_id: str, req_idx: int, sampling_params: Any) -> None:
            order = unpack(sampling_params.extra_args)
            if order is not None and order.score_key:
                self._orders[req_id] = order
            add(req_id, req_idx, sampling_params)

        def remove_request(req_id: str) -> None:
            self._orders.pop(req_id, None)
            remove(req_id)

        def compute_prompt_logprobs(  # noqa: PLR0917 - the runner's own signature
            logits_fn: LogitsOf,
            hidden_states: torch.Tensor,
            input_batch: Any,
            all_token_ids: torch.Tensor,
            num_computed_tokens: torch.Tensor,
            prompt_lens: np.ndarray,
        ) -> Any:
            self.observe(logits_fn, hidden_states, input_batch, all_token_ids, prompt_lens)
            return compute(
                logits_fn,
                hidden_states,
                input_batch,
                all_token_ids,
                num_computed_tokens,
                prompt_lens,
            )

        worker.add_request, worker.remove_request = add_request, remove_request
        worker.compute_prompt_logprobs = compute_prompt_logprobs

    def observe(
        self,
        logits_fn: LogitsOf,
        hidden: torch.Tensor,
        batch: Any,
        all_token_ids: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> None:
        """One engine step: hidden states of every token it computed."""
        for i, req_id in enumerate(batch.req_ids):
            order = self._orders.get(req_id)
            if order is None:
                continue
            slot = int(batch.idx_mapping_np[i])
            computed, prompt_len = int(batch.num_computed_prefill_tokens_np[i]), prompt_lens[slot]
            if computed >= prompt_len:
                continue
            task = self.kept.get(order.score_key)
            if task is None:
                grammar = cursor_of(order, self._grammars)
                task = DeviceTask(order, all_token_ids[slot, :prompt_len].to(torch.int32), grammar)
                self.kept.put(order.score_key, task)
            offset = int(batch.query_start_loc_np[i])
            chunk = hidden[offset : offset + int(batch.num_scheduled_tokens[i])]
            self._score_chunk(task, logits_fn, chunk, computed)

    def _score_chunk(
        self, task: DeviceTask, logits_fn: LogitsOf, hidden: torch.Tensor, computed: int
    ) -> None:
        """``hidden[i]`` belongs to position ``computed + i`` and predicts the one after it."""
        order = task.order
        self._rules.put(0, order.sampling, order.seed, order.prompt_len)
        self._rules.flush()
        position = max(computed + 1, order.score_from)
        end = min(computed + len(hidden) + 1, task.end)
        while position < end:
            stop = min(position + self._block_rows, end)
            logits = logits_fn(hidden[position - computed - 1 : stop - computed - 1])
            if logits is not None:  # None on all but one tensor-parallel rank
                task.score(self._rules, logits.float().contiguous(), position)
            position = stop

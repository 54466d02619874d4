"""Scoring where the logits are: a worker extension of vLLM's Model Runner V1.

The runner calls ``_get_prompt_logprobs_dict`` once per step with the hidden states of every token
it computed. For requests that carry a score key the wrapper turns those of the claimed output into
logits, in blocks of rows, and keeps three numbers per token. Chunked prefill brings the rows in
pieces and preemption repeats pieces, so scores are filed by position. What is kept is bounded;
the node takes scores by key, once per batch, and takes them too when it gives up on a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trueweight.node.canonical import BlockScorer, Scratch
from trueweight.node.vllm.grammars import cursor_of, grammars_of
from trueweight.node.vllm.kept_scores import KeptScores
from trueweight.node.vllm.self_test import check_kernels
from trueweight.node.vllm.wire import EngineOrder, pack_score, unpack
from trueweight.protos.errors import TrueweightError

if TYPE_CHECKING:
    import torch

    from trueweight.node.grammar import Grammars

_BLOCK_BYTES = 8 << 20


class _Task:
    """One request being scored. Positions count from the start of prompt + outputs."""

    def __init__(
        self,
        order: EngineOrder,
        tokens: list[int],
        scratch: Scratch,
        grammars: Grammars | None,
    ) -> None:
        self.order = order
        self.end = len(tokens) + 1
        count = self.end - order.score_from
        self.margins = np.zeros(count)
        self.logprobs = np.zeros(count)
        self.ranks = np.zeros(count, dtype=np.int64)
        self.done = np.zeros(count, dtype=np.bool_)
        self.error = ""
        output = [*tokens[order.prompt_len :], order.last_claimed]
        prompt = tokens[: order.prompt_len]
        self.scorer = BlockScorer(
            order.sampling, order.seed, prompt, output, scratch, grammar=cursor_of(order, grammars)
        )

    def score(self, logits: np.ndarray, position: int) -> None:
        """Row i of ``logits`` predicts the token at ``position + i``."""
        block = self.scorer.score(logits, position - self.order.prompt_len)
        at = slice(position - self.order.score_from, position - self.order.score_from + len(logits))
        self.margins[at] = block.margins
        self.logprobs[at] = block.logprobs
        self.ranks[at] = block.ranks
        self.done[at] = True

    def packed(self) -> list[bytes] | str:
        if self.error or not self.done.all():
            return self.error or "the engine skipped positions"
        return pack_score(self.margins, self.logprobs, self.ranks)


class Scorer:
    """All requests being scored in one worker of Model Runner V1."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.kept: KeptScores[_Task] = KeptScores()
        vocabulary_size = runner.model_config.get_vocab_size()
        self._scratch = Scratch(vocabulary_size)
        self._grammars = grammars_of(runner.vllm_config)
        self._block_rows = max(1, _BLOCK_BYTES // (4 * vocabulary_size))

    def observe(self, hidden: torch.Tensor, scheduled: dict[str, int]) -> None:
        """One engine step: ``scheduled`` tokens per request, their hidden states in a row."""
        for request_id, count in scheduled.items():
            request = self._runner.requests.get(request_id)
            if request is None or request.num_computed_tokens >= request.num_prompt_tokens:
                continue
            task = self._task_of(request)
            if task is None:
                continue
            row = self._runner.input_batch.req_id_to_index[request_id]
            offset = int(self._runner.query_start_loc.np[row])
            self._score_chunk(task, hidden[offset : offset + count], request.num_computed_tokens)

    def _task_of(self, request: Any) -> _Task | None:
        order = unpack(request.sampling_params.extra_args)
        if order is None or not order.score_key:
            return None
        task = self.kept.get(order.score_key)
        if task is None:
            task = _Task(order, request.prompt_token_ids, self._scratch, self._grammars)
            self.kept.put(order.score_key, task)
        return task

    def _score_chunk(self, task: _Task, hidden: torch.Tensor, computed: int) -> None:
        """``hidden[i]`` belongs to position ``computed + i`` and predicts the one after it."""
        position = max(computed + 1, task.order.score_from)
        end = min(computed + len(hidden) + 1, task.end)
        while position < end:
            stop = min(position + self._block_rows, end)
            logits = self._runner.model.compute_logits(
                hidden[position - computed - 1 : stop - computed - 1]
            )
            if logits is not None and not task.error:  # None on all but one tensor-parallel rank
                try:
                    task.score(logits.float().cpu().numpy(), position)
                except TrueweightError as error:
                    task.error = error.message
            position = stop

    def hook(self) -> None:
        """Watch every step of the runner."""
        original = self._runner._get_prompt_logprobs_dict

        def observed(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            self.observe(hidden_states, num_scheduled_tokens)
            return original(hidden_states, num_scheduled_tokens)

        self._runner._get_prompt_logprobs_dict = observed


class ScorerExtension:
    """Mixed into vLLM's worker; its methods are called by name over ``collective_rpc``."""

    model_runner: Any

    def trueweight_install_scorer(self) -> bool:
        """Hook the runner, whichever it is. Once per worker, before the first request."""
        runner = self.model_runner
        if _is_v2(runner):
            from trueweight.node.vllm.scorer_v2 import DeviceScorer  # noqa: PLC0415 - Triton

            runner.trueweight_kept = DeviceScorer(runner).kept
        else:
            scorer = Scorer(runner)
            scorer.hook()
            runner.trueweight_kept = scorer.kept
        return True

    def trueweight_check_kernels(self) -> list[int]:
        """The kernels of this process against the golden vectors: positions, equal."""
        runner = self.model_runner
        if _is_v2(runner):
            from trueweight.node.vllm.self_test_v2 import check_device  # noqa: PLC0415 - Triton

            found = check_device(runner.req_states.device)
        else:
            found = check_kernels(runner.model_config.get_vocab_size())
        return [found.positions, found.equal]

    def trueweight_native_sampler(self) -> bool:
        """Whether the runner's own seeded sampler gives the golden vectors of plain sampling."""
        if not _is_v2(self.model_runner):
            return False
        from trueweight.node.vllm.self_test_v2 import native_is_canonical  # noqa: PLC0415

        return native_is_canonical(self.model_runner.req_states.device)

    def trueweight_take_scores(self, keys: list[str]) -> list[list[bytes] | str]:
        """See ``KeptScores.take``."""
        kept: KeptScores[Any] = self.model_runner.trueweight_kept
        return kept.take(keys)

    def trueweight_kept_scores(self) -> int:
        """How many scores wait to be taken."""
        return len(self.model_runner.trueweight_kept)


def _is_v2(runner: Any) -> bool:
    return hasattr(runner, "prompt_logprobs_worker")

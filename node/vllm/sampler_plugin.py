"""The canonical sampler inside vLLM's Model Runner V1, as a logits processor.

The engine samples greedily. Per step this processor computes each request's canonical token from
its row and sets that one logit to plus infinity: one write per row, whatever the vocabulary, and
rows of other requests stay untouched. V1 fills the output-token lists before it calls processors,
so their lengths give the position; async scheduling is off (see ``engine_args``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from trueweight.node import kernels
from trueweight.node.canonical import RowSampler, Scratch, is_plain
from trueweight.node.vllm.grammars import cursor_of, grammars_of
from trueweight.node.vllm.wire import unpack
from trueweight.protos.errors import EngineError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

    from trueweight.node.grammar import Grammars


class _Slot:
    """One request's place in the batch."""

    __slots__ = ("first_position", "output", "rich", "seed", "temperature")

    def __init__(
        self,
        params: SamplingParams,
        prompt: list[int],
        output: list[int],
        scratch: Scratch,
        grammars: Grammars | None,
    ) -> None:
        order = unpack(params.extra_args)
        if order is None or order.score_key:
            raise LookupError
        self.output = output
        self.first_position = len(prompt) - 1
        self.seed = order.seed
        self.temperature = order.sampling.temperature
        self.rich = (
            None
            if is_plain(order.sampling)
            else RowSampler(
                order.sampling,
                order.seed,
                prompt[: order.prompt_len],
                prompt[order.prompt_len :],
                scratch,
                grammar=cursor_of(order, grammars),
            )
        )


class _PlainRows:
    """The plain requests of the batch as arrays for one kernel call."""

    def __init__(self, slots: dict[int, _Slot]) -> None:
        plain = [(index, slot) for index, slot in sorted(slots.items()) if slot.rich is None]
        self.rows = np.array([index for index, _ in plain], dtype=np.int64)
        self.seeds = np.array([slot.seed for _, slot in plain], dtype=np.int64)
        self.temperatures = np.array([slot.temperature for _, slot in plain], dtype=np.float32)
        self.first = np.array([slot.first_position for _, slot in plain], dtype=np.int64)
        self.outputs = [slot.output for _, slot in plain]

    def positions(self) -> np.ndarray:
        """Noise positions of this step."""
        return self.first + np.fromiter(map(len, self.outputs), np.int64, len(self.outputs))


class CanonicalSampler(LogitsProcessor):  # type: ignore[misc]
    """See the module. Given to vLLM by name, instantiated in each worker."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._scratch = Scratch(vllm_config.model_config.get_vocab_size())
        self._grammars = grammars_of(vllm_config)
        self._slots: dict[int, _Slot] = {}
        self._plain = _PlainRows(self._slots)
        self._rich: list[tuple[int, _Slot]] = []

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._slots.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._slots.pop(index, None)
            try:
                self._slots[index] = _Slot(
                    params, prompt or [], output, self._scratch, self._grammars
                )
            except LookupError:
                continue
        for source, target, direction in batch_update.moved:
            self._move(source, target, direction is MoveDirectionality.SWAP)
        self._plain = _PlainRows(self._slots)
        self._rich = [(i, slot) for i, slot in self._slots.items() if slot.rich is not None]

    def _move(self, source: int, target: int, swap: bool) -> None:
        moved = self._slots.pop(source, None)
        displaced = self._slots.pop(target, None)
        if moved is not None:
            self._slots[target] = moved
        if swap and displaced is not None:
            self._slots[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._slots:
            return logits
        # A padded vocabulary makes a strided view; the kernels want whole rows.
        rows = logits.cpu().contiguous().numpy()
        indices, tokens = self._plain_winners(rows)
        if self._rich:
            found = [slot.rich.winner(rows[i], slot.output) for i, slot in self._rich if slot.rich]
            indices = np.concatenate([indices, [i for i, _ in self._rich]])
            tokens = np.concatenate([tokens, found])
        if logits.device.type == "cpu":  # numpy indexing costs a third of torch's
            logits.numpy()[indices, tokens] = np.inf
        else:
            where = (torch.from_numpy(indices).to(logits.device), torch.from_numpy(tokens))
            logits[where[0], where[1].to(logits.device)] = torch.inf
        return logits

    def _plain_winners(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plain = self._plain
        winners = np.empty(plain.rows.size, dtype=np.int64)
        if not winners.size:
            return plain.rows, winners
        kernels.sample_plain_rows(
            rows, plain.rows, plain.seeds, plain.positions(), plain.temperatures, winners,
            self._scratch.rows[1],
        )  # fmt: skip
        if winners.min() == kernels.INVALID_ROW:
            raise EngineError("the logits hold NaN or +inf")
        return plain.rows, winners

"""What requests ask for, as tables on the device, and the launches of ``triton_kernels`` over them.

A *slot* is a request's place: the runner's own index when generating, 0 for the one request of a
scored block. Tables are rebuilt on the host when a slot changes and sent once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trueweight.node.vllm import triton_kernels as kernels
from trueweight.protos.sampling import CLIP_LOGIT, MASS_LADDER, Sampling
from trueweight.protos.sampling_parameters import MAX_BAD_WORD_IDS, check_token_ids

INVALID_ROW = -1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of logits and where they belong. ``slots``: int32, a slot each; ``positions``: int64, of
    the last context token each; ``tokens``: int32, (slots, length), prompt and outputs; ``longest``
    bounds ``positions`` from above; ``masks``: bool (n, vocabulary), ``mask_rows`` int32 names the
    mask of each row, -1 for none."""

    logits: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    longest: int
    masks: torch.Tensor
    mask_rows: torch.Tensor

    @property
    def rows(self) -> int:
        return int(self.logits.shape[0])


class DeviceRules:
    """The tables. ``put`` on the host, then ``flush``, then any number of launches."""

    def __init__(self, slots: int, vocabulary_size: int, device: torch.device) -> None:
        self.size, self.device = vocabulary_size, device
        self._samplings: list[Sampling | None] = [None] * slots
        self._seeds = np.zeros(slots, dtype=np.int64)
        self._prompt_lens = np.zeros(slots, dtype=np.int32)
        self._tables: dict[str, torch.Tensor] = {}
        self._is_dirty = True
        self.no_mask = torch.zeros((1, 1), dtype=torch.bool, device=device)

    def put(self, slot: int, sampling: Sampling | None, seed: int, prompt_len: int) -> None:
        """A request enters ``slot``; None if it is not ours. Raises InvalidRequest for ids outside
        the vocabulary."""
        if sampling is not None:
            check_token_ids(sampling, self.size)
        elif self._samplings[slot] is None:
            return
        self._samplings[slot] = sampling
        self._seeds[slot], self._prompt_lens[slot] = seed, prompt_len
        self._is_dirty = True

    def flush(self) -> None:
        """Sends the tables if they changed."""
        if self._is_dirty:
            tables = self._columns() | self._dense() | self._words()
            self._tables = {
                name: torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
                for name, array in tables.items()
            }
            self._is_dirty = False

    def _columns(self) -> dict[str, NDArray[Any]]:
        plain = Sampling()
        each = [plain if s is None else s for s in self._samplings]

        def column(name: str, kind: type[np.generic]) -> NDArray[Any]:
            return np.array([getattr(s, name) for s in each], dtype=kind)

        min_p = column("min_p", np.float32)
        with np.errstate(divide="ignore"):
            log_min_p = np.where(min_p > 0, np.log(min_p), np.float32(-np.inf)).astype(np.float32)
        return {
            "kinds": np.array([s is not None for s in self._samplings], dtype=np.int32),
            "seeds": self._seeds,
            "prompt_lens": self._prompt_lens,
            "temperatures": column("temperature", np.float32),
            "log_min_ps": log_min_p,
            "top_ks": column("top_k", np.int32),
            "top_ps": column("top_p", np.float32),
            "repetitions": column("repetition_penalty", np.float32),
            "frequencies": column("frequency_penalty", np.float32),
            "presences": column("presence_penalty", np.float32),
            "penalised": np.array([s.has_penalties for s in each], dtype=np.int32),
            "min_tokens": column("min_tokens", np.int32),
        }

    def _dense(self) -> dict[str, NDArray[Any]]:
        """One row of the vocabulary's size per request that has biases, allowed ids or min_tokens:
        what to add, and what is a stop id."""
        static, stops = [np.zeros(self.size, np.float32)], [np.zeros(self.size, np.int8)]
        static_rows = np.full(len(self._samplings), -1, dtype=np.int32)
        stop_rows = static_rows.copy()
        for slot, sampling in enumerate(self._samplings):
            if sampling is None:
                continue
            if sampling.logit_bias or sampling.allowed_token_ids:
                static_rows[slot] = len(static)
                static.append(_static_row(sampling, self.size))
            if sampling.min_tokens and sampling.stop_token_ids:
                stop_rows[slot] = len(stops)
                row = np.zeros(self.size, np.int8)
                row[list(sampling.stop_token_ids)] = 1
                stops.append(row)
        return {
            "static": np.stack(static),
            "static_rows": static_rows,
            "stops": np.stack(stops),
            "stop_rows": stop_rows,
        }

    def _words(self) -> dict[str, NDArray[Any]]:
        pairs = [
            (slot, word)
            for slot, sampling in enumerate(self._samplings)
            if sampling is not None
            for word in sampling.bad_words
        ]
        return {
            "word_slots": np.array([slot for slot, _ in pairs], dtype=np.int32),
            "word_starts": np.cumsum([0, *(len(word) for _, word in pairs)]).astype(np.int32),
            "word_ids": np.array([t for _, word in pairs for t in word], dtype=np.int32),
        }

    # --- launches ----------------------------------------------------------------------------

    def sample(self, batch: Batch) -> torch.Tensor:
        """Canonical tokens, int64: ``INVALID_ROW`` for NaN or infinity, -2 for rows of nobody."""
        x, floors = self._forward(batch)
        t, winners = self._tables, torch.empty(batch.rows, dtype=torch.int64, device=self.device)
        kernels.sample[(batch.rows,)](
            winners, batch.logits, batch.logits.stride(0), x, floors, batch.slots, t["kinds"],
            t["seeds"], t["temperatures"], batch.positions, self.size, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        return winners

    def score(
        self, batch: Batch, claimed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Margins (fp64), log-probabilities (fp64) and ranks (int64, -1 for an invalid row) of the
        claimed tokens (int64)."""
        x, floors = self._forward(batch)
        t, rows, size = self._tables, batch.rows, self.size
        noisy = torch.empty((rows, size), dtype=torch.float32, device=self.device)
        margins = torch.empty(rows, dtype=torch.float64, device=self.device)
        logprobs, ranks = torch.empty_like(margins), torch.empty_like(claimed)
        common = (batch.slots, t["seeds"], t["temperatures"], batch.positions, claimed)
        kernels.score_raw[(rows,)](
            logprobs, ranks, batch.logits, batch.logits.stride(0), claimed, size,
            BLOCK=kernels.BLOCK,
        )  # fmt: skip
        kernels.find_rivals[(rows, self._blocks(size))](
            noisy, x, floors, *common, size, BLOCK=kernels.BLOCK
        )
        kernels.score_margins[(rows,)](
            margins, x, noisy, floors, *common, CLIP_LOGIT, size, BLOCK=kernels.BLOCK
        )
        if any(s is not None and s.top_p < 1.0 for s in self._samplings):
            for rounding in MASS_LADDER:
                kernels.explain_margins[(rows,)](
                    margins, x, noisy, floors, *common, t["log_min_ps"], t["top_ks"], t["top_ps"],
                    rounding, size, BLOCK=kernels.BLOCK,
                )  # fmt: skip
        return margins, logprobs, ranks

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows after masks, biases, penalties and bad words, and their cuts. What no request of the
        tables asks for is not launched."""
        t, rows, size = self._tables, batch.rows, self.size
        grid = (rows, self._blocks(size))
        x = torch.empty((rows, size), dtype=torch.float32, device=self.device)
        floors = torch.full((rows,), -torch.inf, dtype=torch.float32, device=self.device)
        kernels.copy_rows[grid](
            x, batch.logits, batch.logits.stride(0), batch.slots, t["kinds"], t["static"],
            t["static_rows"], batch.masks, batch.mask_rows, size, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        ours = [s for s in self._samplings if s is not None]
        if any(s.min_tokens and s.stop_token_ids for s in ours):
            kernels.forbid_stops[(rows,)](
                x, batch.slots, batch.positions, t["prompt_lens"], t["min_tokens"], t["stops"],
                t["stop_rows"], batch.mask_rows, size, BLOCK=kernels.BLOCK,
            )  # fmt: skip
        if any(s.has_penalties for s in ours):
            self._penalise(batch, x)
        if t["word_slots"].numel():
            kernels.forbid_words[(rows, t["word_slots"].numel())](
                x, batch.slots, batch.positions, t["prompt_lens"], t["word_slots"],
                t["word_starts"], t["word_ids"], batch.tokens, batch.tokens.stride(0), size,
                MOST=MAX_BAD_WORD_IDS,
            )  # fmt: skip
        if any(s.cuts for s in ours):
            kernels.find_cuts[(rows,)](
                floors, x, batch.slots, t["temperatures"], t["log_min_ps"], t["top_ks"],
                t["top_ps"], size, BLOCK=kernels.BLOCK,
            )  # fmt: skip
        return x, floors

    def _penalise(self, batch: Batch, x: torch.Tensor) -> None:
        t, rows, size = self._tables, batch.rows, self.size
        counts = torch.zeros((rows, size), dtype=torch.int32, device=self.device)
        kernels.count_tokens[(rows, self._blocks(batch.longest + 1))](
            counts, batch.slots, batch.positions, t["prompt_lens"], t["penalised"], batch.tokens,
            batch.tokens.stride(0), size, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        kernels.penalise[(rows, self._blocks(size))](
            x, counts, batch.slots, t["penalised"], t["repetitions"], t["frequencies"],
            t["presences"], size, BLOCK=kernels.BLOCK,
        )  # fmt: skip

    @staticmethod
    def _blocks(count: int) -> int:
        return -(-count // kernels.BLOCK)


def _static_row(sampling: Sampling, size: int) -> NDArray[np.float32]:
    row = np.zeros(size, dtype=np.float32)
    for token, bias in sampling.logit_bias:
        row[token] = bias
    if sampling.allowed_token_ids:
        allowed = np.zeros(size, dtype=np.bool_)
        allowed[list(sampling.allowed_token_ids)] = True
        row[~allowed] = -np.inf
    return row

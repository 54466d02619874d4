"""Another implementation as reference: transformers computes the logits, the contract's sampler
scores them. Shares no code with vLLM's kernels, so agreement is not vacuous."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from trueweight.node.canonical import BlockScorer, Scratch
from trueweight.node.engine import Score, ScoreJob
from trueweight.node.grammar import GrammarCursor, Grammars
from trueweight.protos.errors import UnsupportedParameter

# Rows of logits kept at once, and tokens of one forward pass: bound memory at any vocabulary.
_BLOCK_ROWS = 512
_BATCH_TOKENS = 4096


class HfReference:
    """Scores claimed outputs by plain prefill. ``dtype``: "bfloat16" or "float32"."""

    def __init__(self, model_directory: Path, dtype: str) -> None:
        self.name = f"transformers {dtype}"
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_directory), dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        self._vocabulary = int(self._model.config.vocab_size)
        self._scratch = Scratch(self._vocabulary)
        self._grammars = Grammars.from_directory(model_directory, self._vocabulary)

    def score(self, jobs: Sequence[ScoreJob]) -> list[Score]:
        """Same meaning as ``Engine.score``."""
        found: dict[int, Score] = {}
        for batch in _batches([len(_tokens(job)) for job in jobs]):
            hidden = self._hidden([_tokens(jobs[index])[:-1] for index in batch])
            for index, states in zip(batch, hidden, strict=True):
                found[index] = self._score_one(jobs[index], states)
        return [found[index] for index in range(len(jobs))]

    def _score_one(self, job: ScoreJob, hidden: Any) -> Score:
        tokens = _tokens(job)
        history = [*job.prefix, *job.output]
        scorer = BlockScorer(
            job.sampling, job.seed, job.prompt, history, self._scratch, grammar=self._masks(job)
        )
        start = len(job.prompt) + len(job.prefix) - 1
        margins: list[float] = []
        logprobs: list[float] = []
        ranks: list[int] = []
        for first in range(start, len(tokens) - 1, _BLOCK_ROWS):
            rows = self._logits(hidden, first, min(first + _BLOCK_ROWS, len(tokens) - 1))
            block = scorer.score(rows, first + 1 - len(job.prompt))
            margins.extend(float(m) for m in block.margins)
            logprobs.extend(float(p) for p in block.logprobs)
            ranks.extend(int(r) for r in block.ranks)
        return Score(tuple(margins), tuple(logprobs), tuple(ranks))

    def _masks(self, job: ScoreJob) -> GrammarCursor | None:
        if not job.grammar_source:
            return None
        if self._grammars is None:
            raise UnsupportedParameter("this model has no grammars", param="response_format")
        return self._grammars.cursor(job.grammar_source, job.sampling.stop_token_ids)

    def _hidden(self, rows: Sequence[Sequence[int]]) -> Any:
        """Last hidden states. Attention is causal, so padding on the right changes nothing."""
        longest = max(map(len, rows))
        with torch.inference_mode():
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
            return self._model.model(input_ids=ids).last_hidden_state

    def _logits(self, hidden: Any, first: int, end: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = self._model.lm_head(hidden[first:end]).float()
        return np.ascontiguousarray(rows.numpy())


def _tokens(job: ScoreJob) -> list[int]:
    return [*job.prompt, *job.prefix, *job.output]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indexes of similar length together, at most ``_BATCH_TOKENS`` with padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

"""Proof at start that an engine samples tw-gumbel-1 and scores it as it samples it.

``python -m trueweight.node.vllm.self_test`` runs the first part alone and so compiles the kernels
once for all engines of this machine.

Two parts. In the process that will sample, the fused kernels are compared with the reference on
rows of the model's own vocabulary size. Then the engine generates with every kind of parameter and
scores its own outputs, which goes through everything a paid request goes through: batch slots,
positions, chunks, the scorer. An engine that fails does not serve.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trueweight.node import kernels
from trueweight.node.canonical import BlockScorer, RowSampler, Scratch, is_plain
from trueweight.node.engine import GenerateJob, Score, ScoreJob, SelfTest
from trueweight.node.golden import GoldenCase, golden_cases, prove_sampler
from trueweight.protos.errors import EngineError
from trueweight.protos.sampling import CLIP_LOGIT, Sampling, resolve, rows_of, sample_rows

SAMPLINGS = tuple(
    resolve(sampling)
    for sampling in (
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(temperature=0.7),
        Sampling(top_p=0.9),
        Sampling(top_k=20, min_p=0.02),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
    )
)
TOKENS_PER_JOB = 16
_KERNEL_ROWS = 4
_SEED = 0x7477_6775_6D62_656C  # any fixed 64-bit value with all bytes used
# Rounding moves a few tokens when a batch is computed in another order; a wrong sampler moves most.
_LEAST_EQUAL = 0.85
_MOST_MEAN_CLIPPED = 0.05


def check_kernels(vocabulary_size: int) -> SelfTest:
    """Fused kernels against the golden vectors, and against the reference on rows of the model's
    size. Raises EngineError at the first other token or score."""
    golden = prove_sampler(_fused_token)
    cases, tolerance = golden_cases()
    if not all(_scores_agree(case, tolerance) for case in cases):
        raise EngineError("the fused scorer differs from the golden vectors on this machine")
    if not all(_batch_token(case) == case.token for case in cases if is_plain(case.sampling)):
        raise EngineError("the batched sampler differs from the golden vectors on this machine")
    positions = _check_large_rows(vocabulary_size)
    return SelfTest(golden.positions + positions, golden.equal + positions)


def _fused_token(case: GoldenCase) -> int:
    scratch = Scratch(case.logits.size)
    sampler = RowSampler(case.sampling, case.seed, case.prompt, [], scratch, grammar=_masks(case))
    return sampler.winner(case.logits, case.output)


class _SameMask:
    """The mask of a golden case, whatever the output."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._mask = mask

    def mask_after(self, _output: NDArray[np.int32], _length: int) -> NDArray[np.bool_]:
        return self._mask


def _masks(case: GoldenCase) -> _SameMask | None:
    return None if case.mask is None else _SameMask(case.mask)


def _batch_token(case: GoldenCase) -> int:
    """The kernel that serves all plain rows of a step at once."""
    winners = np.empty(1, dtype=np.int64)
    kernels.sample_plain_rows(
        case.logits[None, :], np.zeros(1, np.int64), np.array([case.seed], np.int64),
        np.array([len(case.prompt) + len(case.output) - 1], np.int64),
        np.array([case.sampling.temperature], np.float32), winners,
        Scratch(case.logits.size).rows[0],
    )  # fmt: skip
    return int(winners[0])


def _scores_agree(case: GoldenCase, tolerance: float) -> bool:
    scratch = Scratch(case.logits.size)
    for claimed, margin, logprob, rank in case.scores:
        output = [*case.output, claimed]
        scorer = BlockScorer(
            case.sampling, case.seed, case.prompt, output, scratch, grammar=_masks(case)
        )
        found = scorer.score(case.logits[None, :], len(case.output))
        close = np.allclose(
            (found.margins[0], found.logprobs[0]), (margin, logprob), rtol=0.0, atol=tolerance
        )
        if not close or found.ranks[0] != rank:
            return False
    return True


def _check_large_rows(vocabulary_size: int) -> int:
    logits = np.random.default_rng(7).standard_normal((_KERNEL_ROWS, vocabulary_size)) * 3
    rows = logits.astype(np.float32)
    scratch = Scratch(vocabulary_size)
    for sampling in SAMPLINGS:
        sampler = RowSampler(sampling, _SEED, [1, 2, 3], [], scratch)
        output: list[int] = []
        for row in rows:
            output.append(sampler.winner(row, output))
        claims = rows_of(sampling, _SEED, [1, 2, 3], [], output, count=_KERNEL_ROWS)
        if output != sample_rows(rows, claims):
            raise EngineError("the fused sampler differs from the reference on this machine")
    return len(SAMPLINGS) * _KERNEL_ROWS


def probe_jobs(vocabulary_size: int, max_context_tokens: int) -> list[GenerateJob]:
    """One job per kind of parameters."""
    length = max(1, min(24, max_context_tokens - TOKENS_PER_JOB))
    tokens = max(1, min(TOKENS_PER_JOB, max_context_tokens - length))
    return [
        GenerateJob(
            job_id=f"self-test-{index}",
            prompt=tuple((7919 * (i + index) + 11) % vocabulary_size for i in range(length)),
            prefix=(),
            sampling=sampling,
            seed=_SEED - index,
            max_tokens=tokens,
        )
        for index, sampling in enumerate(SAMPLINGS)
    ]


def score_job(job: GenerateJob, output: tuple[int, ...]) -> ScoreJob:
    """The claim that ``output`` is what ``job`` gives."""
    return ScoreJob(job.prompt, job.prefix, output, job.sampling, job.seed)


def judge(fused: SelfTest, scores: Sequence[Score]) -> SelfTest:
    """Both parts together. Raises EngineError if the engine does not sample what it scores."""
    margins = np.array([margin for score in scores for margin in score.margins])
    equal = int(np.count_nonzero(margins == 0))
    clipped = float(np.minimum(margins, CLIP_LOGIT).mean()) / CLIP_LOGIT if margins.size else 1.0
    if equal < _LEAST_EQUAL * margins.size or clipped > _MOST_MEAN_CLIPPED:
        raise EngineError(
            f"the engine failed its self-test: {equal} of {margins.size} tokens canonical, "
            f"mean clipped margin {clipped:.3f}",
            hint="This build of vLLM or this accelerator is not supported; nothing was served.",
        )
    return SelfTest(fused.positions + margins.size, fused.equal + equal)


def main() -> None:
    """Compile and check the kernels."""
    found = check_kernels(2048)
    sys.stdout.write(f"canonical sampler: {found.equal} of {found.positions} positions equal\n")


if __name__ == "__main__":
    main()

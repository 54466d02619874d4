"""Score requests of verifiers: bounded work on foreign data, one error per bad item."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from trueweight.node.engine import Engine, Score, ScoreJob
from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    OverCapacity,
    TrueweightError,
)
from trueweight.protos.grammar import check_grammar
from trueweight.protos.sampling import Sampling
from trueweight.protos.sampling_parameters import check_token_ids
from trueweight.protos.v1.node_pb2 import ScoreItem, ScoreRequest, ScoreResponse, ScoreResult

_MAX_ITEMS = 64
MAX_DEADLINE_MS = 600_000
MAX_WAITING = 32
NO_SEED = -1


class Scorer:
    """Scores batches one after another; at most ``MAX_WAITING`` requests wait."""

    def __init__(self, engine: Engine, manifest_digest: bytes, max_context_tokens: int) -> None:
        self._engine, self._manifest_digest = engine, manifest_digest
        self._max_context_tokens = max_context_tokens
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Raises NotFound, InvalidRequest, OverCapacity, DeadlineExceeded or EngineError; an item
        that cannot be scored gets its own error instead."""
        if request.manifest_digest != self._manifest_digest:
            raise NotFound("these weights are not served here")
        if not 1 <= len(request.items) <= _MAX_ITEMS:
            raise InvalidRequest(f"score 1 to {_MAX_ITEMS} items at once")
        if not 1 <= request.deadline_ms <= MAX_DEADLINE_MS:
            raise InvalidRequest(f"deadline_ms must be from 1 to {MAX_DEADLINE_MS}")
        if self._waiting >= MAX_WAITING:
            raise OverCapacity("too many score requests are waiting", hint="Try again later.")
        jobs = [self._job(item) for item in request.items]
        good = [job for job in jobs if isinstance(job, ScoreJob)]
        scores = iter(await self._run(good, request.deadline_ms) if good else [])
        results = [_result(job if isinstance(job, str) else next(scores)) for job in jobs]
        return ScoreResponse(results=results, fingerprint=self._engine.fingerprint)

    async def _run(self, jobs: Sequence[ScoreJob], deadline_ms: int) -> list[Score | str]:
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline_ms / 1000), self._turn:
                return await self._one_by_one_if_refused(jobs)
        except TimeoutError:
            raise DeadlineExceeded(
                "scoring did not end in time", hint="Send fewer items."
            ) from None
        finally:
            self._waiting -= 1

    async def _one_by_one_if_refused(self, jobs: Sequence[ScoreJob]) -> list[Score | str]:
        """Scores all at once. If the engine cannot take one of them, that one alone fails."""
        try:
            return list(await self._engine.score(jobs))
        except InvalidRequest as error:
            if len(jobs) == 1:
                return [str(error)]
        return [found for job in jobs for found in await self._one_by_one_if_refused([job])]

    def _job(self, item: ScoreItem) -> ScoreJob | str:
        try:
            return self._checked_job(item)
        except TrueweightError as error:
            return str(error)

    def _checked_job(self, item: ScoreItem) -> ScoreJob:
        total = len(item.prompt_token_ids) + len(item.prefix_token_ids) + len(item.output_token_ids)
        if not item.prompt_token_ids or not item.output_token_ids:
            raise InvalidRequest("an item needs prompt and output")
        if total > self._max_context_tokens:
            raise InvalidRequest("the item does not fit the context")
        if item.seed == NO_SEED:
            raise InvalidRequest("seed -1 is never used")
        vocabulary_size = self._engine.limits.vocabulary_size
        sampling = Sampling.from_proto(item.sampling)
        check_token_ids(sampling, vocabulary_size)
        check_grammar(sampling, item.grammar_source)
        for ids in (item.prompt_token_ids, item.prefix_token_ids, item.output_token_ids):
            if ids and max(ids) >= vocabulary_size:
                raise InvalidRequest(f"token ids must be below {vocabulary_size}")
        return ScoreJob(
            prompt=tuple(item.prompt_token_ids),
            prefix=tuple(item.prefix_token_ids),
            output=tuple(item.output_token_ids),
            sampling=sampling,
            seed=item.seed,
            grammar_source=item.grammar_source,
        )


def _result(score: Score | str) -> ScoreResult:
    if isinstance(score, str):
        return ScoreResult(error=score)
    return ScoreResult(margins=score.margins, logprobs=score.logprobs, ranks=score.ranks)

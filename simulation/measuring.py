"""Serves and scores traffic with real engines, slice by slice, one engine after another.

Used by calibration, by the power bench and by the honest run; they differ in what serves, in the
seed, and in what they make of the margins. A time limit ends a run between two slices; another run
goes on from there.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

import click

from trueweight.node.engine import Engine, GenerateJob, Score, ScoreJob
from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.protos.evidence import clipped_nano
from trueweight.protos.manifest import build_manifest
from trueweight.simulation.adversaries import Adversary
from trueweight.simulation.calibration_traffic import (
    Prompts,
    draw_jobs,
    load_prompts,
    random_prompts,
)
from trueweight.simulation.margin_store import MarginStore, Ragged, SliceKey
from trueweight.verifier.calibration import PairSample
from trueweight.verifier.calibration_file import weights_sha256

# One prefill batch of the size that verifiers use.
SCORE_BATCH = 32
TRANSFORMERS = "transformers float32"


MakeEngine = Callable[[Path, VllmOptions], Engine]


def _as_it_is(engine: Engine) -> Engine:
    return engine


@dataclass(frozen=True)
class Source:
    """One way to serve. Only cheats have ``weights`` (writes altered ones) or ``wrap``.

    Sources with one ``name`` are one kind of node: batching and caching change from one minute to
    the next, so their requests are one sample. ``tokens_share`` of the wanted tokens come from
    here.
    """

    name: str
    detail: str = ""
    options: VllmOptions = field(default_factory=lambda: VllmOptions(max_running=64))
    slice_requests: int = 1000
    tokens_share: float = 1.0
    wrap: Callable[[Engine], Engine] = _as_it_is
    weights: Callable[[Path, Path], Path] | None = None
    # Served by transformers in this process and dtype; by vLLM if empty.
    transformers_dtype: str = ""


def by_transformers(source: Source) -> Source:
    """The same cheat served by transformers: no engine to start, fewer tokens a second."""
    return replace(
        source,
        detail="served by transformers",
        slice_requests=250,
        transformers_dtype="float32",
    )


def _changed_request(source: Source) -> Callable[[GenerateJob], GenerateJob] | None:
    """What a source makes of a request, if that is all it does besides other weights."""
    if source.wrap is _as_it_is:
        return lambda job: job
    serving = source.wrap(SyntheticEngine(SyntheticModel(ModelShape())))
    if isinstance(serving, Adversary) and type(serving).generate is Adversary.generate:
        return serving.change
    return None


class Traffic:
    """Jobs by class and slice: the same seed gives the same jobs everywhere, at any time."""

    def __init__(self, prompts: Prompts, max_context: int, seed: int) -> None:
        self._prompts, self._context, self.seed = prompts, max_context, seed

    @classmethod
    def of_model(cls, model: Path, seed: int) -> Traffic:
        """Prompts in the model's own tokens; random ones for a model without a tokeniser."""
        manifest = build_manifest(
            model, market_id="", name="", revision="", licence="", now_unix_ms=0
        )
        draw = load_prompts if (model / "tokenizer.json").exists() else random_prompts
        prompts = draw(model, manifest.eos_token_ids, 2000, seed)
        return cls(prompts, manifest.max_context_tokens, seed)

    def jobs(self, key: SliceKey, count: int) -> list[GenerateJob]:
        """The jobs of one slice; no two slices share any."""
        name = f"{self.seed}/{key.source}/{key.detail}/{key.number}"
        drawn = draw_jobs(self._prompts, key.traffic, name, self._context)
        return list(islice(drawn, count))


def weights_of(model: Path) -> bytes:
    """Names what computes the logits."""
    return weights_sha256(
        build_manifest(model, market_id="", name="", revision="", licence="", now_unix_ms=0)
    )


class Measurement:
    """Answers and scores of one model under one seed."""

    def __init__(
        self,
        model: Path,
        store: MarginStore,
        traffic: Traffic,
        minutes: float = float("inf"),
        make_engine: MakeEngine = VllmEngine,
    ) -> None:
        self._model, self._store, self._traffic = model, store, traffic
        self._end = time.monotonic() + 60 * minutes
        self._make_engine = make_engine

    def out_of_time(self) -> bool:
        """True once no other slice should be begun."""
        return time.monotonic() >= self._end

    # --- what is there, what is missing -----------------------------------------------------

    def keys(self, source: Source, classes: Iterable[str]) -> list[SliceKey]:
        """Slices of a source that have been answered."""
        return [
            key for name in classes for key in self._store.slices(source.name, source.detail, name)
        ]

    def tokens(self, source: Source, traffic: str) -> int:
        """Answered so far."""
        answers = [self._store.answers(key) for key in self.keys(source, [traffic])]
        return sum(int(a.lengths.sum()) for a in answers if a is not None)

    def missing_answers(self, source: Source, tokens: Mapping[str, int]) -> list[str]:
        """Classes that lack tokens of this source."""
        return [
            name
            for name, wanted in tokens.items()
            if self.tokens(source, name) < wanted * source.tokens_share
        ]

    def unscored(
        self, sources: Iterable[Source], classes: Sequence[str], reference: str
    ) -> list[tuple[Source, SliceKey]]:
        """Answered slices that a reference has not scored."""
        return [
            (source, key)
            for source in sources
            for key in self.keys(source, classes)
            if self._store.margins(key, reference) is None
        ]

    def margins(self, source: Source, traffic: str, reference: str) -> Iterator[list[int]]:
        """x per token in 10^-9 of every scored request with an output."""
        for key in self.keys(source, [traffic]):
            found = self._store.margins(key, reference)
            if found is not None:
                yield from (row for row in found.rows() if row)

    def sample(self, sources: Sequence[Source], traffic: str, reference: str) -> PairSample:
        """All requests of one kind of node, as one reference saw them."""
        rows = [r for s in sources for r in self.margins(s, traffic, reference)]
        return PairSample(f"{sources[0].name} / {reference}", tuple(map(tuple, rows)))

    # --- work -------------------------------------------------------------------------------

    async def run(
        self,
        source: Source,
        tokens: Mapping[str, int],
        judged: Sequence[Source] = (),
    ) -> None:
        """Answers what this source lacks and lets its engine score what ``judged`` answered.

        Starts no engine if there is nothing to do or no time left."""
        if source.transformers_dtype:
            self.answer_by_transformers(source, tokens)
            return

        def to_score() -> list[tuple[Source, SliceKey]]:
            return self.unscored(judged, list(tokens), source.name)

        if self.out_of_time() or not (self.missing_answers(source, tokens) or to_score()):
            return
        engine, started = self._make_engine(self._model, source.options), time.monotonic()
        await engine.start()
        try:
            _say(f"{source.name} {source.detail}: ready, {time.monotonic() - started:.0f} s")
            await self._answer(engine, source, tokens)
            for owner, key in to_score():
                if self.out_of_time():
                    break
                scores = await _score_all(engine, self._claims(owner, key))
                self._store.keep_margins(key, source.name, _to_rows(scores))
            _say(f"  done, {time.monotonic() - started:.0f} s")
        finally:
            await engine.close()

    async def run_cheats(self, wanted: Sequence[tuple[Source, Mapping[str, int]]]) -> None:
        """Answers what these sources lack, in their order: neighbours with the same weights share
        an engine, and must have the same options."""
        missing = [(s, tokens) for s, tokens in wanted if self.missing_answers(s, tokens)]
        for write, same in groupby(missing, key=lambda each: each[0].weights):
            if self.out_of_time():
                return
            with tempfile.TemporaryDirectory() as place:
                model = write(self._model, Path(place) / "weights") if write else self._model
                await self._answer_all(model, list(same))

    async def _answer_all(
        self, model: Path, wanted: Sequence[tuple[Source, Mapping[str, int]]]
    ) -> None:
        engine = self._make_engine(model, wanted[0][0].options)
        await engine.start()
        try:
            for source, tokens in wanted:
                _say(source.name)
                await self._answer(engine, source, tokens)
        finally:
            await engine.close()

    def answer_by_transformers(self, source: Source, tokens: Mapping[str, int]) -> None:
        """Answers what a source of transformers lacks, in this process. Does nothing for a cheat
        that is more than other weights or another request."""
        change = _changed_request(source)
        if change is None or self.out_of_time() or not self.missing_answers(source, tokens):
            return
        # Needs transformers, which takes seconds to import.
        from trueweight.simulation.hf_decoder import HfDecoder  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as place:
            write, target = source.weights, Path(place) / "weights"
            model = write(self._model, target) if write else self._model
            decoder = HfDecoder(model, source.transformers_dtype)
        for name, wanted in tokens.items():
            for key in self._next_slices(source, name, wanted):
                jobs = self._traffic.jobs(key, source.slice_requests)
                outputs = decoder.answer([change(job) for job in jobs])
                self._store.keep_answers(key, Ragged.of(outputs))
        _say(f"{source.name}, {source.detail}: {dict(tokens)}")

    def _next_slices(self, source: Source, traffic: str, tokens: int) -> Iterator[SliceKey]:
        """One after the other, while answers are missing and there is time."""
        while self.missing_answers(source, {traffic: tokens}) and not self.out_of_time():
            number = len(self.keys(source, [traffic]))
            yield SliceKey(source.name, source.detail, traffic, number)

    async def _answer(self, engine: Engine, source: Source, tokens: Mapping[str, int]) -> None:
        serving, turns = source.wrap(engine), asyncio.Semaphore(source.options.max_running)
        for name, wanted in tokens.items():
            for key in self._next_slices(source, name, wanted):
                await self._answer_slice(serving, source, key, turns)
            _say(f"  {name}: {self.tokens(source, name):,} tokens")

    async def _answer_slice(
        self, engine: Engine, source: Source, key: SliceKey, turns: asyncio.Semaphore
    ) -> None:
        jobs = self._traffic.jobs(key, source.slice_requests)

        async def one(job: GenerateJob) -> list[int]:
            async with turns:
                return [token async for step in engine.generate(job) for token in step.token_ids]

        outputs = await asyncio.gather(*map(one, jobs))
        self._store.keep_answers(key, Ragged.of(outputs))

    def _claims(self, source: Source, key: SliceKey) -> list[ScoreJob]:
        answers = self._store.answers(key)
        if answers is None:
            return []
        jobs = self._traffic.jobs(key, source.slice_requests)
        return [
            ScoreJob(
                job.prompt, job.prefix, tuple(output), job.sampling, job.seed, job.grammar_source
            )
            for job, output in zip(jobs, answers.rows(), strict=True)
        ]

    def judge_by_transformers(self, sources: Sequence[Source], classes: Sequence[str]) -> None:
        """Scores by the other implementation, on the honest weights."""
        missing = self.unscored(sources, classes, TRANSFORMERS)
        if not missing or self.out_of_time():
            return
        # Needs transformers, which takes seconds to import.
        from trueweight.simulation.hf_reference import HfReference  # noqa: PLC0415

        reference, started = HfReference(self._model, "float32"), time.monotonic()
        for source, key in missing:
            if self.out_of_time():
                break
            scores = reference.score(self._claims(source, key))
            self._store.keep_margins(key, TRANSFORMERS, _to_rows(scores))
        _say(f"{TRANSFORMERS}: {time.monotonic() - started:.0f} s")


def _to_rows(scores: Sequence[Score]) -> Ragged:
    """x of every token in 10^-9, one row per request."""
    return Ragged.of([[clipped_nano(m) for m in score.margins] for score in scores])


async def _score_all(engine: Engine, jobs: Sequence[ScoreJob]) -> list[Score]:
    """Scores in batches of the size that verifiers use."""
    found: list[Score] = []
    for start in range(0, len(jobs), SCORE_BATCH):
        found.extend(await engine.score(jobs[start : start + SCORE_BATCH]))
    return found


def _say(text: str) -> None:
    click.echo(text, err=True)

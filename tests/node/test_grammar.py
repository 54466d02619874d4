"""Grammars: one walk for generation and scoring, and hostile ones stay within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import trueweight.simulation
from tests.node.test_kernels import SEEDS, samplings
from trueweight.node import grammar as grammar_module
from trueweight.node.canonical import BlockScorer, RowSampler, Scratch
from trueweight.node.engine import EngineFinish, EngineLimits, GenerateJob, Score, ScoreJob
from trueweight.node.grammar import Grammars
from trueweight.node.scoring import Scorer
from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.node.vllm.engine import VllmEngine
from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.protos.grammar import source_of, with_grammar
from trueweight.protos.sampling import (
    MAX_MARGIN,
    Sampling,
    resolve,
    rows_of,
    sample_rows,
    score_rows,
)
from trueweight.protos.v1.node_pb2 import ScoreItem, ScoreRequest

DEMO = Path(trueweight.simulation.__path__[0]) / "models" / "tw-demo"
SIZE = 2048
STOP = 2
PERSON = source_of(
    "json_schema",
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
)
SOURCES = (
    PERSON,
    source_of("json_schema", {"type": "object"}),
    source_of("regex", r"[a-f]{2,6}(-\d+)?"),
    source_of("choice", ["yes", "no", r"a(b)|c{1}[x]*#&~<>@^$.?+\é"]),
)
# A source like any other until it is compiled.
BROKEN = source_of("regex", "(")
SCRATCH = Scratch(SIZE)
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def grammars():
    found = Grammars.from_directory(DEMO, SIZE)
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SOURCES), samplings(), SEEDS, st.data())
def test_generate_then_score_is_margin_zero_for_any_parameters(
    grammars, source, sampling, seed, data
):
    noise_seed = data.draw(st.integers(0, 2**32))
    sampling = with_grammar(replace(sampling, stop_token_ids=(STOP,)), source)
    count = 10
    logits = np.random.default_rng(noise_seed).standard_normal((count, SIZE)) * 4
    rows = logits.astype(np.float32)
    prefix = data.draw(st.sampled_from([[], ids_of('{"na'), [7, 8, 9]]))
    prompt = [1, 5, 6]
    cursor = grammars.cursor(source, [STOP])
    sampler = RowSampler(sampling, seed, prompt, prefix, SCRATCH, grammar=cursor)
    output: list[int] = []
    for row in rows:
        output.append(sampler.winner(row, output))

    walk = grammars.cursor(source, [STOP])
    history = [*prefix, *output]
    masks = [walk.mask_after(history, len(prefix) + i) for i in range(count)]
    claims = rows_of(sampling, seed, prompt, prefix, output, count=count, masks=masks)
    assert sample_rows(rows, claims) == output
    assert all(score.margin == 0.0 for score in score_rows(rows, claims, output))

    # In blocks, the second one first: as preemption repeats them.
    again = grammars.cursor(source, [STOP])
    scorer = BlockScorer(sampling, seed, prompt, history, SCRATCH, grammar=again)
    for first, end in ((4, 10), (0, 4), (0, 10)):
        assert not scorer.score(rows[first:end], len(prefix) + first).margins.any()


def test_an_output_that_ends_is_what_the_grammar_describes(grammars):
    sampling = with_grammar(resolve(Sampling(temperature=1.5, stop_token_ids=(STOP,))), PERSON)
    rng = np.random.default_rng(3)
    for seed in range(5):
        cursor = grammars.cursor(PERSON, [STOP])
        sampler = RowSampler(sampling, seed, [1], [], SCRATCH, grammar=cursor)
        output: list[int] = []
        while STOP not in output and len(output) < 80:
            row = rng.standard_normal(SIZE).astype(np.float32) * 2
            output.append(sampler.winner(row, output))
        person = json.loads(TOKENIZER.decode(output[:-1]))
        assert list(person) == ["name", "age", "tags"]
        assert 0 <= person["age"] <= 150


def test_attack_output_that_leaves_the_grammar_is_as_far_as_can_be(grammars):
    source = source_of("regex", "[0-9]{4,}")
    sampling = with_grammar(Sampling(stop_token_ids=(STOP,)), source)
    digits, letters = ids_of("1234"), ids_of("abc")
    claimed = [*digits, *letters, *digits, STOP]
    rows = np.zeros((len(claimed), SIZE), dtype=np.float32)
    cursor = grammars.cursor(source, [STOP])
    margins = BlockScorer(sampling, 5, [1], claimed, SCRATCH, grammar=cursor).score(rows, 0).margins
    left = len(digits)
    assert (margins[:left] < MAX_MARGIN).all()
    assert (margins[left:-1] == MAX_MARGIN).all()  # there is no way back into a grammar
    assert margins[-1] == 0.0


def test_a_stop_before_the_grammar_may_end_is_not_allowed(grammars):
    cursor = grammars.cursor(source_of("choice", ["yes"]), [STOP])
    assert not cursor.mask_after([], 0)[STOP]
    ids = ids_of("yes")
    assert np.flatnonzero(cursor.mask_after(ids, len(ids))).tolist() == [STOP]
    assert np.flatnonzero(cursor.mask_after([*ids, STOP, 9], len(ids) + 2)).tolist() == [STOP]


def test_a_request_with_a_grammar_is_never_served_without_its_masks():
    sampling = with_grammar(Sampling(stop_token_ids=(STOP,)), PERSON)
    with pytest.raises(InvalidRequest):
        RowSampler(sampling, 1, [1], [], SCRATCH)
    with pytest.raises(InvalidRequest):
        BlockScorer(sampling, 1, [1], [3], SCRATCH)


def doubling(key):
    deep = {"$ref": "#/$defs/d0", "$defs": {"d24": {"type": "null"}}}
    for i in range(24):
        deep["$defs"][f"d{i}"] = {key: [{"$ref": f"#/$defs/d{i + 1}"}] * 2}
    return deep


REFUSED = {
    "unbalanced": ("regex", "(a"),
    "deep parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "lookahead": ("regex", "(?=a)b"),
    "a product of alternatives": (
        "json_schema",
        {
            "allOf": [
                {"anyOf": [{"properties": {f"k{i}_{j}": {"type": "integer"}}} for j in range(4)]}
                for i in range(12)
            ]
        },
    ),
    "arithmetic": ("json_schema", {"type": "integer", "multipleOf": 7919 * 104729}),
    "remote reference": ("json_schema", {"$ref": "http://127.0.0.1/x"}),
    "unsupported keyword": ("json_schema", {"type": "string", "not": {"const": "a"}}),
    "nothing fits": ("json_schema", {"$ref": "#"}),
}
EXPENSIVE = {
    "nested repetition": ("regex", "((a{0,99}){0,99}){0,99}"),
    "a million": ("regex", "a{1000000}"),
    "exponential states": ("regex", "(?:.*[a-f].{30}|.*[c-z].{31}){10}"),
    "unicode": ("regex", r"[\w\p{L}]{1,500}\s*[^\d]{3,400}"),
    "doubling references": ("json_schema", doubling("anyOf")),
    "doubling conjunctions": ("json_schema", doubling("allOf")),
    "long": ("json_schema", {"type": "string", "maxLength": 10**7, "pattern": "^.*a.*b.*$"}),
    "many optional keys": (
        "json_schema",
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(900)}},
    ),
    "many items": ("json_schema", {"type": "array", "items": {}, "minItems": 10**5}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_attack_grammars_that_do_not_compile_are_refused(grammars, name):
    with pytest.raises(InvalidRequest) as refused:
        await grammars.check(source_of(*REFUSED[name]))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", EXPENSIVE)
async def test_attack_expensive_grammars_are_refused_or_end_at_a_limit(grammars, name):
    source = source_of(*EXPENSIVE[name])
    with contextlib.suppress(InvalidRequest):
        await grammars.check(source)
        cursor = grammars.cursor(source, [STOP])
        rng, output = np.random.default_rng(1), []
        for _ in range(40):
            mask = cursor.mask_after(output, len(output))
            assert mask.any()
            output.append(int(rng.choice(np.flatnonzero(mask))))
        # A limit that strikes on the way strikes the scorer at the same place.
        again = grammars.cursor(source, [STOP])
        assert all(again.mask_after(output, i)[token] for i, token in enumerate(output))


async def test_another_compiler_than_the_signed_one_serves_no_grammars(monkeypatch):
    grammar_module._guidance.cache_clear()
    monkeypatch.setattr(grammar_module, "COMPILER_VERSION", "0.0.1")
    try:
        assert Grammars.from_directory(DEMO, SIZE) is None
    finally:
        grammar_module._guidance.cache_clear()


@contextlib.asynccontextmanager
async def engine_with(grammars):
    shape = ModelShape(vocabulary_size=SIZE, eos_token_ids=(STOP,))
    engine = SyntheticEngine(SyntheticModel(shape), grammars=grammars)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def job(source, **changes):
    sampling = with_grammar(resolve(Sampling(stop_token_ids=(STOP,))), source)
    return GenerateJob("g", (5, 6), (), sampling, 11, 60, source, **changes)


async def collect(engine, a_job):
    tokens, finish = [], None
    async for step in engine.generate(a_job):
        tokens.extend(step.token_ids)
        finish = step.finish
    return tuple(tokens), finish


async def test_the_synthetic_engine_generates_continues_and_scores(grammars):
    async with engine_with(grammars) as engine:
        whole = job(PERSON)
        tokens, finish = await collect(engine, whole)
        assert finish is EngineFinish.EOS
        json.loads(TOKENIZER.decode(tokens[:-1]))
        rest, _ = await collect(engine, replace(whole, prefix=tokens[:9]))
        assert rest == tokens[9:]
        claims = [
            ScoreJob(whole.prompt, (), tokens, whole.sampling, whole.seed, PERSON),
            ScoreJob(whole.prompt, tokens[:9], rest, whole.sampling, whole.seed, PERSON),
        ]
        for score in await engine.score(claims):
            assert not any(score.margins)


async def test_a_grammar_that_is_over_ends_the_output_before_min_tokens(grammars):
    source = source_of("choice", ["yes", "no"])
    sampling = resolve(Sampling(stop_token_ids=(STOP,), min_tokens=40))
    short = replace(job(source), sampling=with_grammar(sampling, source))
    async with engine_with(grammars) as engine:
        tokens, finish = await collect(engine, short)
        assert finish is EngineFinish.EOS
        assert tokens.index(STOP) == len(tokens) - 1 < 5
        claim = ScoreJob(short.prompt, (), tokens, short.sampling, short.seed, source)
        assert not any((await engine.score([claim]))[0].margins)


def claim_with(source):
    """As a verifier asks for it: no router compiles grammars, and a cheat serves any."""
    sampling = with_grammar(resolve(Sampling(stop_token_ids=(STOP,))), source)
    return ScoreItem(
        prompt_token_ids=(5, 6),
        output_token_ids=(9, STOP),
        sampling=sampling.to_proto(),
        seed=3,
        grammar_source=source,
    )


class StubProcess:
    """The engine's processes as far as ``VllmEngine.score`` sees them."""

    facts = SimpleNamespace(limits=EngineLimits(SIZE, 512, 8))

    def __init__(self):
        self.jobs = []

    async def score(self, jobs, keys):
        self.jobs += jobs
        return [Score((0.0, 0.0), (0.0, 0.0), (0, 0)) for _ in keys]


async def test_attack_a_cheat_serves_a_grammar_that_ends_every_audit_beside_it(grammars):
    async with engine_with(grammars) as engine:
        items = [claim_with(BROKEN), claim_with(PERSON), claim_with(PERSON)]
        request = ScoreRequest(manifest_digest=b"m", items=items, deadline_ms=60_000)
        answer = await Scorer(engine, b"m", 512).score(request)
    assert [bool(result.error) for result in answer.results] == [True, False, False]
    assert [len(result.margins) for result in answer.results] == [0, 2, 2]


async def test_attack_a_cheat_serves_a_grammar_that_would_end_the_reference_engine(grammars):
    """An error in vLLM's worker ends the engine, so what does not compile must not get there."""
    engine, process = VllmEngine("model"), StubProcess()
    engine._grammars, engine._process = grammars, process
    good, bad = (
        ScoreJob((5, 6), (), (9, STOP), job(source).sampling, 3, source)
        for source in (PERSON, BROKEN)
    )
    with pytest.raises(InvalidRequest):
        await engine.score([good, bad])
    assert process.jobs == []
    await engine.score([good])
    assert process.jobs == [good]


async def test_an_engine_refuses_a_grammar_before_its_first_step(grammars):
    bad = job(source_of("regex", "(a"))
    async with engine_with(grammars) as engine:
        with pytest.raises(InvalidRequest):
            await collect(engine, bad)
        assert engine.load().running == engine.load().waiting == 0
        others = await asyncio.gather(*[collect(engine, job(PERSON)) for _ in range(4)])
        assert len(set(others)) == 1
    async with engine_with(None) as engine:
        with pytest.raises(UnsupportedParameter):
            await collect(engine, job(PERSON))

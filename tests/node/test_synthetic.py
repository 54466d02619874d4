"""The synthetic engine: deterministic, canonical, paced, bounded, honest about what it is."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.node.engine import EngineFinish, GenerateJob, ScoreJob
from trueweight.node.synthetic import Speed, SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel, shape_from_directory
from trueweight.protos.errors import EngineError, InvalidRequest, WeightsRefused
from trueweight.protos.sampling import Sampling, resolve
from trueweight.runtime.clock import ManualClock

SHAPE = ModelShape(vocabulary_size=128, eos_token_ids=(2,), silent_ids=(0, 1))


@contextlib.asynccontextmanager
async def running(model=None, **settings):
    engine = SyntheticEngine(model or SyntheticModel(SHAPE), **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def job(index=0, **changes):
    values = {
        "job_id": str(index),
        "prompt": (5, 6, 7 + index),
        "prefix": (),
        "sampling": Sampling(stop_token_ids=(2,)),
        "seed": 1000 + index,
        "max_tokens": 60,
        **changes,
    }
    return GenerateJob(**values)


async def output_of(engine, a_job):
    tokens, finish = [], None
    async for step in engine.generate(a_job):
        assert finish is None
        tokens.extend(step.token_ids)
        finish = step.finish
    return tokens, finish


async def test_alone_and_in_a_batch_the_same_tokens_come_out():
    async with running() as engine:
        alone = [await output_of(engine, job(i)) for i in range(16)]
        together = await asyncio.gather(*[output_of(engine, job(i)) for i in range(16)])
        assert alone == together
        assert len({tuple(tokens) for tokens, _ in alone}) == 16


async def test_outputs_end_by_themselves_and_say_why():
    async with running() as engine:
        done = await asyncio.gather(*[output_of(engine, job(i, max_tokens=200)) for i in range(40)])
        ended = [tokens for tokens, finish in done if finish is EngineFinish.EOS]
        assert 25 <= len(ended) <= 40
        assert all(tokens[-1] == 2 and 2 not in tokens[:-1] for tokens in ended)
        cut = [tokens for tokens, finish in done if finish is EngineFinish.LENGTH]
        assert all(len(tokens) == 200 for tokens in cut)


async def test_other_weights_are_another_model(world):
    first = shape_from_directory(world.model_dir)
    assert (first.vocabulary_size, first.eos_token_ids, first.silent_ids) == (300, (2,), (1,))
    path = world.model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    second = shape_from_directory(world.model_dir)
    one, two = (SyntheticModel(s).logits([3, 4, 5]) for s in (first, second))
    assert np.abs(one - two).max() > 1


def test_a_directory_that_describes_no_model_is_refused(tmp_path):
    with pytest.raises(WeightsRefused):
        shape_from_directory(tmp_path)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.5]),
    top_k=st.sampled_from([0, 3, 40]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    min_tokens=st.sampled_from([0, 10]),
    stop_token_ids=st.sampled_from([(), (2,)]),
)


@settings(max_examples=25, deadline=None)
@given(samplings, st.integers(-(2**63), 2**63 - 1), st.integers(0, 12))
def test_generating_then_scoring_gives_margin_zero(sampling, seed, prefix_len):
    async def run():
        async with running() as engine:
            prefix = tuple(range(10, 10 + prefix_len))
            made = job(seed=seed, sampling=resolve(sampling), prefix=prefix, max_tokens=25)
            tokens, _ = await output_of(engine, made)
            claim = ScoreJob(made.prompt, prefix, tuple(tokens), made.sampling, seed)
            (score,) = await engine.score([claim])
            assert score.margins == (0.0,) * len(tokens)
            assert all(p <= 0 for p in score.logprobs)
            return tokens

    asyncio.run(run())


async def test_score_convicts_other_seed_and_other_model():
    other = SyntheticModel(ModelShape(vocabulary_size=128, eos_token_ids=(2,), model_seed=9))
    async with running() as engine, running(other) as liar:
        tokens, _ = await output_of(engine, job(sampling=Sampling()))
        claim = ScoreJob((5, 6, 7), (), tuple(tokens), Sampling(), 1001)
        (wrong_seed,) = await engine.score([claim])
        lie, _ = await output_of(liar, job(sampling=Sampling()))
        (wrong_model,) = await engine.score([ScoreJob((5, 6, 7), (), tuple(lie), Sampling(), 1000)])
        for score in (wrong_seed, wrong_model):
            assert np.mean(np.minimum(score.margins, 0.5)) > 0.35


async def test_numeric_noise_moves_few_tokens_and_little():
    async with running(noise=0.01) as engine, running(noise=0.01, noise_seed=5) as reference:
        made = [job(i, sampling=Sampling(), max_tokens=100) for i in range(10)]
        outputs = await asyncio.gather(*[output_of(engine, j) for j in made])
        claims = [
            ScoreJob(j.prompt, (), tuple(tokens), j.sampling, j.seed)
            for j, (tokens, _) in zip(made, outputs, strict=True)
        ]
        margins = np.array([m for s in await reference.score(claims) for m in s.margins])
        assert 0 < np.count_nonzero(margins) < 0.05 * margins.size
        assert np.minimum(margins, 0.5).mean() / 0.5 < 0.002


async def test_speed_follows_the_injected_clock():
    clock = ManualClock()
    speed = Speed(decode_tokens_per_s=10, prefill_tokens_per_s=1000)
    async with running(clock=clock, speed=speed) as engine:
        tokens = []

        async def consume():
            async for step in engine.generate(job(sampling=Sampling(), max_tokens=50)):
                tokens.extend(step.token_ids)

        task = asyncio.create_task(consume())
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(tokens) == 1
        for expected in (2, 3, 4):
            clock.advance_ms(104)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(tokens) == expected
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.load().running == 0


async def test_at_most_max_running_and_the_rest_waits():
    clock = ManualClock()
    speed = Speed(decode_tokens_per_s=10)
    async with running(clock=clock, speed=speed, max_running=3) as engine:
        tasks = [asyncio.create_task(output_of(engine, job(i))) for i in range(5)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert (engine.load().running, engine.load().waiting) == (3, 2)
        assert 0 < engine.load().kv_use < 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (engine.load().running, engine.load().waiting) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ()},
        {"prompt": (128,)},
        {"prompt": (-1,)},
        {"prefix": (128,)},
        {"max_tokens": 0},
        {"max_tokens": 5000},
    ],
)
async def test_impossible_jobs_are_refused(changes):
    async with running() as engine:
        with pytest.raises(InvalidRequest):
            await output_of(engine, job(**changes))


async def test_a_failing_model_fails_its_callers_instead_of_hanging():
    class Broken:
        vocabulary_size = 128

        def logits(self, context):
            raise RuntimeError("no")

    async with running(Broken()) as engine:
        with pytest.raises(EngineError):
            await asyncio.wait_for(output_of(engine, job()), 5)
        with pytest.raises(EngineError):
            await output_of(engine, job())


async def test_closing_fails_running_jobs_and_says_what_it_is():
    clock = ManualClock()
    async with running(clock=clock, speed=Speed(decode_tokens_per_s=1)) as engine:
        assert engine.fingerprint.engine == "synthetic"
        assert engine.self_test.positions == engine.self_test.equal >= 80
        task = asyncio.create_task(output_of(engine, job()))
        await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(EngineError):
            await asyncio.wait_for(task, 5)

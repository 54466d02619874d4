"""The engine on real vLLM: a tiny random Llama, chunks of 64 tokens, a cache that preempts."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace

import pytest

from tests.byte_tokenizer import EOS, byte_tokenizer
from trueweight.node.engine import EngineFinish, GenerateJob, ScoreJob
from trueweight.protos.errors import ContextOverflow, EngineError, InvalidRequest
from trueweight.protos.grammar import source_of, with_grammar
from trueweight.protos.sampling import Sampling, resolve

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

MIXED = tuple(
    resolve(sampling)
    for sampling in (
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(temperature=0.6),
        Sampling(top_p=0.9),
        Sampling(top_k=5),
        Sampling(min_p=0.1, temperature=0.7),
        Sampling(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.1),
        Sampling(bad_words=((5,), (7, 9)), logit_bias=((7, 3.0), (300, -5.0)), top_p=0.8, top_k=40),
        Sampling(stop_token_ids=tuple(range(0, 512, 16)), min_tokens=8),
        Sampling(allowed_token_ids=tuple(range(100, 140))),
    )
)


def job(index: int, *, sampling: Sampling | None = None, length: int = 4, tokens: int = 24):
    prompt = tuple(random.Random(index).randrange(512) for _ in range(length))
    chosen = sampling or MIXED[index % len(MIXED)]
    return GenerateJob(f"job-{index}", prompt, (), chosen, 1000 + index, tokens)


async def collect(engine, work):
    steps = [step async for step in engine.generate(work)]
    assert all(step.token_ids for step in steps)
    assert all(step.finish is None for step in steps[:-1])
    return tuple(token for step in steps for token in step.token_ids), steps[-1].finish


def claim(work, output, seed=None):
    seed = work.seed if seed is None else seed
    return ScoreJob(work.prompt, work.prefix, output, work.sampling, seed)


async def test_start_proved_the_engine_and_says_what_it_is(engine):
    assert engine.self_test.positions == engine.self_test.equal > 100
    assert engine.limits.vocabulary_size == 512
    assert engine.limits.max_context_tokens == 512
    fingerprint = engine.fingerprint
    assert (fingerprint.engine, fingerprint.sampler_id) == ("vllm", "tw-gumbel-1")
    assert "0.32.0" in fingerprint.engine_version
    assert (fingerprint.dtype, fingerprint.quantization) == ("bfloat16", "none")


async def test_a_full_batch_of_mixed_parameters_is_canonical_under_chunks_and_preemption(engine):
    """Long and short prompts, 32 at once, in a cache that cannot hold them all: what was generated
    scores as canonical, and is what each request gives when it is alone."""
    jobs = [job(i, length=(100, 4, 220)[i % 3], tokens=60) for i in range(32)]
    together = await asyncio.gather(*(collect(engine, work) for work in jobs))
    for work, (output, finish) in zip(jobs, together, strict=True):
        ended = finish is EngineFinish.EOS
        assert ended == (output[-1] in work.sampling.stop_token_ids)
        assert ended or (finish is EngineFinish.LENGTH and len(output) == 60)
    claims = [claim(work, output) for work, (output, _) in zip(jobs, together, strict=True)]
    scores = await engine.score(claims)
    margins = [margin for score in scores for margin in score.margins]
    assert [len(s.margins) for s in scores] == [len(output) for output, _ in together]
    assert sum(margin == 0 for margin in margins) >= 0.99 * len(margins)
    assert max(margins) < 0.2
    for i in (0, 5, 7, 10):
        assert (await collect(engine, jobs[i]))[0] == together[i][0]


async def test_stop_ids_end_the_output_and_are_its_last_token(engine):
    output, finish = await collect(engine, job(8, sampling=MIXED[8], tokens=200))
    assert finish is EngineFinish.EOS
    assert len(output) > 8
    assert output[-1] % 16 == 0
    assert all(token % 16 for token in output[:-1])


async def test_eos_of_the_model_does_not_end_an_output_that_ignores_it(engine):
    sampling = resolve(Sampling(logit_bias=((1, 50.0),)))
    output, finish = await collect(engine, job(1, sampling=sampling, tokens=5))
    assert (output, finish) == ((1,) * 5, EngineFinish.LENGTH)


async def test_only_allowed_ids_and_no_bad_words_come_out(engine):
    output, _ = await collect(engine, job(9, sampling=MIXED[9]))
    assert set(output) <= set(range(100, 140))
    sampling = resolve(Sampling(temperature=0.0, logit_bias=((7, 60.0),), bad_words=((7, 7),)))
    output, _ = await collect(engine, job(3, sampling=sampling, tokens=6))
    assert output[0] == 7
    assert (7, 7) not in set(itertools.pairwise(output))


@pytest.mark.parametrize("index", [0, 6, 7, 8])
async def test_a_continuation_goes_on_where_the_first_leg_ended(engine, index):
    whole, _ = await collect(engine, job(index, sampling=MIXED[index], tokens=30))
    first = job(index, sampling=MIXED[index])
    cut = min(12, len(whole) - 1)
    leg = GenerateJob("leg", first.prompt, whole[:cut], first.sampling, first.seed, 30 - cut)
    rest, _ = await collect(engine, leg)
    assert rest == whole[cut:]
    (score,) = await engine.score([claim(leg, rest)])
    assert max(score.margins) == 0.0


LIST = source_of("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 5})


async def test_grammars_mask_amid_other_requests_continue_and_score(engine):
    """Under preemption and chunks: valid JSON comes out, it scores as canonical, a second leg goes
    on where the first ended, and who did not ask for a grammar does not notice."""
    stops = Sampling(stop_token_ids=(EOS,))
    kinds = (stops, replace(stops, temperature=0.0), replace(stops, top_p=0.9, min_tokens=20))
    jobs = [job(i, length=(100, 4)[i % 2], tokens=60) for i in range(24)]
    alone = [(await collect(engine, work))[0] for work in jobs[:3]]
    under = [
        replace(
            job(40 + i, sampling=with_grammar(resolve(kinds[i % 3]), LIST), tokens=80),
            grammar_source=LIST,
        )
        for i in range(8)
    ]
    done = await asyncio.gather(*(collect(engine, work) for work in [*jobs, *under]))
    assert [output for output, _ in done[:3]] == alone
    claims = []
    for work, (output, finish) in zip(under, done[24:], strict=True):
        if finish is EngineFinish.EOS:
            assert len(json.loads(byte_tokenizer().decode(output[:-1]))) >= 5
        claims.append(replace(claim(work, output), grammar_source=LIST))
    assert any(finish is EngineFinish.EOS for _, finish in done[24:])
    scores = await engine.score(claims)
    margins = [margin for score in scores for margin in score.margins]
    assert sum(margin == 0 for margin in margins) >= 0.99 * len(margins)
    assert max(margins) < 0.2
    leg = replace(under[0], prefix=done[24][0][:6], max_tokens=74)
    assert (await collect(engine, leg))[0] == done[24][0][6:]
    refused = replace(under[0], grammar_source=source_of("regex", "(a"))
    with pytest.raises(InvalidRequest):
        await collect(engine, refused)


async def test_a_wrong_seed_or_temperature_is_far_outside(engine):
    work = job(0, sampling=MIXED[0], tokens=100)
    output, _ = await collect(engine, work)
    wrong_seed, colder = await engine.score(
        [
            claim(work, output, seed=work.seed + 1),
            ScoreJob(work.prompt, (), output, resolve(Sampling(temperature=0.8)), work.seed),
        ]
    )
    clipped = [min(margin, 0.5) for margin in wrong_seed.margins]
    assert sum(clipped) / len(clipped) > 0.4
    assert sum(margin > 0 for margin in colder.margins) > 3


async def test_a_token_outside_the_allowed_set_scores_the_largest_margin(engine):
    work = job(9, sampling=MIXED[9], tokens=3)
    output, _ = await collect(engine, work)
    (score,) = await engine.score([claim(work, (output[0], 400, output[2]))])
    assert score.margins[0] == 0.0
    assert score.margins[1] == 1000.0


async def test_scoring_in_the_middle_of_generation_disturbs_neither(engine):
    alone = [await collect(engine, job(i, length=110)) for i in range(4)]
    claims = [claim(job(i, length=110), alone[i][0]) for i in range(4)]
    generating = [
        asyncio.create_task(collect(engine, job(100 + i, length=100, tokens=60))) for i in range(20)
    ]
    await asyncio.sleep(0.05)
    scores = [score for _ in range(3) for score in await engine.score(claims)]
    outputs = [(await task)[0] for task in generating]
    assert max(margin for score in scores for margin in score.margins) < 0.2
    scored = await engine.score(
        [claim(job(100 + i, length=100, tokens=60), outputs[i]) for i in range(20)]
    )
    assert max(margin for score in scored for margin in score.margins) < 0.2


async def test_scores_cover_every_output_token_with_logprobs_and_ranks(engine):
    work = job(1, sampling=MIXED[1], length=130, tokens=20)
    output, _ = await collect(engine, work)
    score, nothing = await engine.score([claim(work, output), claim(work, ())])
    assert len(score.margins) == len(score.logprobs) == len(score.ranks) == 20
    assert set(score.ranks) == {0}
    assert all(-7 < logprob < 0 for logprob in score.logprobs)
    assert nothing.margins == ()


async def test_closing_the_iterator_frees_the_engine(engine):
    for _ in range(40):
        steps = engine.generate(job(2, tokens=400))
        await anext(steps)
        await steps.aclose()
    assert engine.load().running == 0
    task = asyncio.create_task(collect(engine, job(2, tokens=400)))
    await asyncio.sleep(0.1)
    assert engine.load().running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.load().running == engine.load().waiting == 0
    # Were the aborted ones still running, this would wait for their 16,000 tokens.
    async with asyncio.timeout(20):
        await collect(engine, job(3, tokens=5))


async def test_abandoned_scores_are_forgotten(engine):
    work = job(0, length=400, tokens=100)
    task = asyncio.create_task(engine.score([claim(work, tuple(range(100)))] * 8))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    kept = await engine._process._llm.collective_rpc("trueweight_kept_scores")
    assert kept == [0]


async def test_what_does_not_fit_is_refused_by_name(engine):
    with pytest.raises(ContextOverflow):
        await collect(engine, job(0, length=500, tokens=13))
    with pytest.raises(InvalidRequest):
        await collect(engine, GenerateJob("x", (512,), (), Sampling(), 1, 4))
    with pytest.raises(InvalidRequest):
        await collect(engine, GenerateJob("x", (), (), Sampling(), 1, 4))
    with pytest.raises(InvalidRequest):
        await engine.score([ScoreJob((1,), (), (-1,), Sampling(), 1)])
    beyond = Sampling(logit_bias=((512, 1.0),))
    with pytest.raises(InvalidRequest):
        await collect(engine, job(0, sampling=beyond))
    with pytest.raises(InvalidRequest):
        await engine.score([ScoreJob((1,), (), (2,), beyond, 1)])
    assert (await collect(engine, job(0)))[1] is EngineFinish.LENGTH


async def test_load_counts_running_waiting_kv_and_generated(engine):
    before = engine.load().generated_tokens_total
    jobs = [job(i, sampling=MIXED[0], tokens=100) for i in range(48)]
    tasks = [asyncio.create_task(collect(engine, work)) for work in jobs]
    await asyncio.sleep(0.05)
    load = engine.load()
    assert (load.running, load.waiting) == (32, 16)
    assert 48 * 4 / 4096 < load.kv_use <= 1
    outputs = await asyncio.gather(*tasks)
    assert engine.load().generated_tokens_total - before == sum(len(o) for o, _ in outputs)
    idle = engine.load()
    assert (idle.running, idle.waiting, idle.kv_use, engine._held_tokens) == (0, 0, 0.0, 0)


async def test_an_engine_that_is_not_started_says_so(tiny_model):
    from trueweight.node.vllm.engine import VllmEngine

    idle = VllmEngine(tiny_model)
    with pytest.raises(EngineError):
        _ = idle.fingerprint
    await idle.close()


async def test_a_killed_worker_is_an_engine_error_and_not_a_hang(engine):
    """Last in this file: the engine of the session does not survive it."""
    running = asyncio.create_task(collect(engine, job(0, sampling=MIXED[0], tokens=400)))
    await asyncio.sleep(0.2)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        with pytest.raises(EngineError):
            await running
        with pytest.raises(EngineError):
            await collect(engine, job(1))
        with pytest.raises(EngineError):
            await engine.score([claim(job(1), (1, 2))])
    assert engine.load().running == 0

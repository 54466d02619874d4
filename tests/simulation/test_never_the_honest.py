"""Never the honest, always the cheat: real models, real noise, the production wealth.

The short version decodes with transformers in bfloat16 and is judged in float32; the long ones run
``make bench-verify``'s own code with vLLM at full size.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from trueweight.node.engine import ScoreJob
from trueweight.protos.evidence import CONVICT, Item, sum_nano, wealth_of
from trueweight.simulation import bench_power, honest_run
from trueweight.simulation.calibration_traffic import Prompts, draw_jobs
from trueweight.simulation.cheats import ROWS, SERVED
from trueweight.simulation.demo_files import DEMO_MODEL as MODEL
from trueweight.simulation.margin_store import MarginStore
from trueweight.simulation.measuring import Measurement, Traffic, weights_of
from trueweight.verifier.calibration_file import read_measured

CALIBRATION = MODEL.with_name(f"{MODEL.name}.calibration.json")
CLASSES = ("plain", "top_p", "penalties")
PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 24, 48, 24


def items_of(scores, entry):
    """As a verifier adds them up."""
    return [
        Item(sum_nano(s.margins, entry.ignored_below_nano), len(s.margins), entry.mu0_nano)
        for s in scores
    ]


def claims_of(decoder, name):
    """Held-out answers; prompts of different lengths share a batch."""
    chance = np.random.default_rng(5)
    heads = tuple(
        tuple(chance.integers(3, 2048, chance.integers(4, PROMPT_TOKENS)).tolist())
        for _ in range(REQUESTS)
    )
    jobs = list(islice(draw_jobs(Prompts(heads, (2,)), name, 99, 2048), REQUESTS))
    jobs = [
        replace(job, sampling=replace(job.sampling, stop_token_ids=()), max_tokens=tokens)
        for job, tokens in zip(jobs, (OUTPUT_TOKENS, 5) * REQUESTS, strict=False)
    ]
    outputs = decoder.answer(jobs)
    assert [len(output) for output in outputs] == [job.max_tokens for job in jobs]
    return [
        ScoreJob(j.prompt, (), tuple(o), j.sampling, j.seed)
        for j, o in zip(jobs, outputs, strict=True)
    ]


@pytest.fixture
def one_thread():
    """Batches this small only spin on more."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_real_honest_noise_convicts_nobody_and_a_wrong_seed_is_convicted_within_ten_requests():
    pytest.importorskip("transformers")
    from trueweight.simulation.hf_decoder import HfDecoder
    from trueweight.simulation.hf_reference import HfReference

    decoder = HfDecoder(MODEL, "bfloat16")
    reference = HfReference(MODEL, "float32")
    entries = {e.parameter_class: e for e in read_measured(CALIBRATION).entries}
    honest, exact = [], 0
    for name in CLASSES:
        claims = claims_of(decoder, name)
        scores = reference.score(claims)
        exact += sum(m == 0 for s in scores for m in s.margins)
        honest += items_of(scores, entries[name])
        if name == "plain":
            other = reference.score([replace(c, seed=c.seed ^ 1) for c in claims[:10]])
            wrong = items_of(other, entries[name])
    tokens = sum(item.n for item in honest)
    assert tokens == len(CLASSES) * REQUESTS * (OUTPUT_TOKENS + 5) // 2
    assert 0.97 * tokens < exact < tokens, "float32 against bfloat16 is never all equal"
    convicted, largest = honest_run.lifetimes(honest, 100, seed=1)
    assert convicted == 0 and largest < 100
    assert wealth_of(wrong).value >= CONVICT


def test_every_row_of_the_table_has_a_pool_and_every_named_cheat_is_in_it():
    kinds = {s.source.name: s.traffic for s in SERVED}
    assert all(row.traffic in kinds[row.pool] for row in ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)
    targets = {row.name: row.target for row in ROWS if row.target}
    assert targets == {
        "4-bit weights": 1500,
        "T = 0.95 for 1": 1500,
        "fp8 weights": 8000,
        "1 % weight noise": 18_000,
    }
    assert [row.name for row in ROWS if row.target_requests == 10] == [
        "wrong seed",
        "text from another seed (the same thing)",
        "another model",
    ]
    assert all(s.traffic.get("plain", 0) == 1.0 or "top_p" in s.traffic for s in SERVED)


@pytest.fixture
def kept(request):
    """Where measurements of hours stay, so that the next run goes on instead of starting over."""
    place = Path(__file__).parents[2] / ".trueweight" / "soak" / request.node.name.split("[")[0]
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.mark.soak
def test_a_million_honest_tokens_convict_nobody(kept):
    seed = honest_run.HONEST_SEED
    store = MarginStore(kept, weights_of(MODEL), seed)
    measurement = Measurement(MODEL, store, Traffic.of_model(MODEL, seed))
    entries = {e.parameter_class: e for e in read_measured(CALIBRATION).entries}
    run = honest_run.HonestRun(MODEL.name, measurement, entries)
    asyncio.run(run.collect(1_000_000))
    rows = run.rows(20)
    honest_run.show(rows)
    by_transformers = [r for r in rows if "transformers" in r.pair]
    assert sum(r.tokens for r in by_transformers) >= 1_000_000
    assert sum(r.convicted for r in rows) == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", honest_run.WIDE)
def test_a_hundred_thousand_honest_tokens_of_a_wide_model_convict_nobody(name, kept):
    place = kept / name.rsplit(maxsplit=1)[-1]
    rows = asyncio.run(honest_run.wide_run(name, place, tokens=100_000, orders=20, minutes=1e6))
    honest_run.show(rows)
    assert sum(r.tokens for r in rows if "transformers" in r.pair) >= 100_000
    assert sum(r.convicted for r in rows) == 0


@pytest.mark.soak
def test_every_cheat_with_a_target_meets_it(kept):
    bench = bench_power.PowerBench(MODEL, CALIBRATION, kept, 1e6)
    asyncio.run(bench.collect(100_000))
    shown = bench.rows(40)
    bench_power.show(shown, 40)
    assert [s.row.name for s in shown] == [row.name for row in ROWS], "a pool is missing"
    assert all(s.found.pool_tokens >= 100_000 for s in shown if s.row.traffic == "plain")
    missed = [
        (s.row.name, s.found.median_tokens)
        for s in shown
        if s.row.target and s.found.median_tokens > s.row.target
    ]
    missed += [
        (s.row.name, s.found.p95_requests)
        for s in shown
        if s.row.target_requests and s.found.p95_requests > s.row.target_requests
    ]
    assert not missed
    assert not [s.row.name for s in shown if s.row.pool == "honest" and s.found.convicted]

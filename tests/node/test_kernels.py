"""The fused kernels equal the numpy reference: same tokens, same margins."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.node import kernels
from trueweight.node.canonical import BlockScorer, RowSampler, Scratch, is_plain
from trueweight.node.engine import Score, SelfTest
from trueweight.node.vllm.self_test import check_kernels, judge
from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.sampling import (
    MASS_LADDER,
    Sampling,
    resolve,
    rows_of,
    sample_rows,
    score_rows,
)

VOCABULARY = 96
SCRATCH = Scratch(VOCABULARY)
TOKEN = st.integers(0, VOCABULARY - 1)
TOKENS = st.lists(TOKEN, max_size=12)
SEEDS = st.integers(-(2**63), 2**63 - 1).filter(lambda seed: seed != -1)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    maybe = lambda strategy, off: draw(st.one_of(st.just(off), strategy))  # noqa: E731
    return resolve(
        Sampling(
            temperature=maybe(st.floats(0.05, 3), 1.0) * draw(st.sampled_from([0.0, 1.0, 1.0])),
            top_p=maybe(st.floats(0.05, 1.0), 1.0),
            top_k=maybe(st.integers(2, VOCABULARY + 3), 0),
            min_p=maybe(st.floats(0.001, 1.0), 0.0),
            presence_penalty=maybe(st.floats(-2, 2), 0.0),
            frequency_penalty=maybe(st.floats(-2, 2), 0.0),
            repetition_penalty=maybe(st.floats(0.3, 2), 1.0),
            min_tokens=maybe(st.integers(1, 20), 0),
            logit_bias=tuple(
                draw(st.dictionaries(TOKEN, st.floats(-20, 20, width=32), max_size=4)).items()
            ),
            allowed_token_ids=tuple(draw(st.one_of(st.just([]), st.lists(TOKEN, max_size=40)))),
            bad_words=tuple(
                tuple(word)
                for word in draw(st.lists(st.lists(TOKEN, min_size=1, max_size=3), max_size=3))
            ),
            stop_token_ids=tuple(draw(st.lists(TOKEN, max_size=3))),
        )
    )


@st.composite
def blocks(draw: st.DrawFn) -> np.ndarray:
    """Logits with ties (half of the time on a coarse grid, as bf16 makes them)."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(1, 6))
    logits = generator.standard_normal((rows, VOCABULARY)) * draw(st.floats(0.1, 8))
    if draw(st.booleans()):
        logits = np.round(logits * 2) / 2
    return logits.astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(samplings(), blocks(), SEEDS, st.lists(TOKEN, min_size=1, max_size=12), st.data())
def test_kernels_equal_the_reference(sampling, logits, seed, prompt, data):
    prefix = data.draw(TOKENS)
    count = len(logits)
    output = data.draw(st.lists(TOKEN, min_size=count, max_size=count))
    rows = rows_of(sampling, seed, prompt, prefix, output, count=count)
    expected = sample_rows(logits, rows)
    sampler = RowSampler(sampling, seed, prompt, prefix, SCRATCH)
    assert [sampler.winner(logits[i], output[:i]) for i in range(count)] == expected

    claimed = [data.draw(st.sampled_from([token, output[i]])) for i, token in enumerate(expected)]
    for tokens in (output, claimed):
        rows = rows_of(sampling, seed, prompt, prefix, tokens, count=count)
        scores = score_rows(logits, rows, tokens)
        got = BlockScorer(sampling, seed, prompt, [*prefix, *tokens], SCRATCH).score(
            logits, len(prefix)
        )
        assert got.margins == pytest.approx([s.margin for s in scores], rel=1e-6, abs=1e-6)
        assert got.logprobs == pytest.approx([s.logprob for s in scores], rel=1e-5, abs=1e-5)
        assert got.ranks.tolist() == [s.rank for s in scores]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(0.3, 0, 0.0), (1.0, 20, 0.0), (2.0, 0, 0.05), (1.0, 30, 0.02)]),
    st.integers(0, 8),
    st.sampled_from([1e-3, -1e-3, 0.02, -0.02]),
    SEEDS,
    st.integers(0, 2**32),
)
def test_kernels_equal_the_reference_beside_a_cumulative_mass(
    others, index, offset, seed, row_seed
):
    """Every claim of a row whose top_p lies beside the mass of its likeliest tokens; not at it,
    where fp32 sums may fall on either side."""
    assert kernels.MASS_LADDER == MASS_LADDER
    logits = np.random.default_rng(row_seed).normal(0, 1.5, VOCABULARY).astype(np.float32)
    temperature, top_k, min_p = others
    scaled = np.sort(logits.astype(np.float64))[::-1] / temperature
    scaled = scaled[: top_k or None]
    weights = np.exp(scaled - scaled[0])
    weights = weights[weights >= min_p]
    mass = min(float(weights[: index + 1].sum() / weights.sum()), 0.95)
    sampling = resolve(
        Sampling(temperature=temperature, top_k=top_k, min_p=min_p, top_p=mass * (1 + offset))
    )
    claims = np.argsort(-logits)[:24].tolist()
    for claim in claims:
        rows = rows_of(sampling, seed, [1], [], [claim], count=1)
        wanted = score_rows(logits[None, :], rows, [claim])[0].margin
        found = BlockScorer(sampling, seed, [1], [claim], SCRATCH).score(logits[None, :], 0)
        assert found.margins[0] == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(blocks(), SEEDS, st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_plain_batch_kernel_equals_the_reference(logits, seed, pos, temperature):
    count = len(logits)
    sampling = resolve(Sampling(temperature=temperature))
    assert is_plain(sampling)
    winners = np.zeros(count, dtype=np.int64)
    positions = np.array([pos + i for i in range(count)])
    kernels.sample_plain_rows(
        logits, np.arange(count), np.full(count, seed), positions,
        np.full(count, sampling.temperature, np.float32), winners, SCRATCH.rows[0],
    )  # fmt: skip
    prompt = range(pos + 1)
    rows = rows_of(sampling, seed, prompt, [], [0] * count, count=count)
    assert winners.tolist() == sample_rows(logits, rows)


def test_noise_bound_is_above_the_noise_everywhere_near_the_float_steps():
    steps = np.float32(2.0) ** -np.arange(0, 33, dtype=np.float32)
    u = np.concatenate([steps, np.linspace(2**-33, 1, 5000)]).astype(np.float32)
    u = np.concatenate([u, np.nextafter(u, np.float32(0)), np.nextafter(u, np.float32(1))])
    u = u[(u > 0) & (u <= 1)]
    gaps = [float(kernels._noise_bound(x)) - float(kernels._noise(x)) for x in u]
    assert min(gaps) >= 0
    # The bound must also be close, or every token would need its logarithms.
    assert np.mean(gaps) < 0.6


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.nan])
def test_rows_with_nan_or_infinity_are_refused(poison):
    row = np.zeros(VOCABULARY, dtype=np.float32)
    row[17] = poison
    with pytest.raises(EngineError):
        RowSampler(Sampling(), 1, [1], [], SCRATCH).winner(row, [])
    with pytest.raises(EngineError):
        BlockScorer(Sampling(), 1, [1], [3], SCRATCH).score(row[None, :], 0)


def test_minus_infinity_everywhere_is_token_zero():
    row = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5)):
        assert RowSampler(sampling, 1, [1], [], SCRATCH).winner(row, []) == 0


@pytest.mark.parametrize("low", [-3.4e38, -1e30, -1e4])
def test_models_that_mask_with_huge_finite_values(low):
    logits = np.random.default_rng(3).standard_normal((4, VOCABULARY)).astype(np.float32)
    logits[:, ::2] = low
    warm = Sampling(temperature=2.0)
    for sampling in map(resolve, (Sampling(top_p=0.999), Sampling(top_k=80, min_p=0.01), warm)):
        rows = rows_of(sampling, 9, [1], [], [5, 6, 7, 8], count=4)
        sampler = RowSampler(sampling, 9, [1], [], SCRATCH)
        claims = [5, 6, 7, 8]
        assert [sampler.winner(row, claims[:i]) for i, row in enumerate(logits)] == sample_rows(
            logits, rows
        )
        score = BlockScorer(sampling, 9, [1], claims, SCRATCH).score(logits, 0)
        expected = [s.margin for s in score_rows(logits, rows, claims)]
        assert score.margins == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_claims_outside_the_vocabulary_are_refused():
    for token in (-1, VOCABULARY):
        with pytest.raises(InvalidRequest):
            BlockScorer(Sampling(), 1, [1], [token], SCRATCH)


def test_history_longer_than_its_first_buffer():
    logits = np.random.default_rng(1).standard_normal((200, VOCABULARY)).astype(np.float32)
    sampling = resolve(Sampling(frequency_penalty=0.7, repetition_penalty=1.3, top_p=0.9))
    sampler = RowSampler(sampling, 5, [1, 2], [3], SCRATCH)
    output: list[int] = []
    for row in logits:
        output.append(sampler.winner(row, output))
    score = BlockScorer(sampling, 5, [1, 2], [3, *output], SCRATCH).score(logits, 1)
    assert score.margins.max() == 0.0
    rows = rows_of(sampling, 5, [1, 2], [3], output, count=200)
    assert sample_rows(logits, rows) == output


def test_kernels_give_the_golden_vectors():
    found = check_kernels(VOCABULARY)
    assert found.positions == found.equal >= 99 + 24


def test_the_self_test_notices_a_sampler_that_is_off_by_one_position(monkeypatch):
    honest = kernels.sample_row
    monkeypatch.setattr(
        kernels, "sample_row", lambda row, rules, mask, prompt, *rest: honest(
            row, rules, mask, np.append(prompt, 1).astype(np.int32), *rest
        ),
    )  # fmt: skip
    with pytest.raises(EngineError):
        check_kernels(VOCABULARY)


def test_the_self_test_judges_margins():
    passed = SelfTest(10, 10)
    good = Score((0.0,) * 99 + (0.01,), (-1.0,) * 100, (0,) * 100)
    assert judge(passed, [good]) == SelfTest(110, 109)
    bad = Score((0.0,) * 90 + (0.6,) * 10, (-1.0,) * 100, (0,) * 100)
    for scores in ([bad], [Score((), (), ())], [Score((0.001,) * 100, (-1.0,) * 100, (0,) * 100)]):
        with pytest.raises(EngineError, match="self-test"):
            judge(passed, scores)


def test_without_a_writable_cache_the_kernels_compile_in_memory(monkeypatch):
    real = numba.njit

    def refusing(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", refusing)
    assert kernels._compile(_increment)(1) == 2


def _increment(x):
    return x + 1

"""Canonical sampling against slow, independent readings of the same rules."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.sampling import (
    CLIP_LOGIT,
    MASS_LADDER,
    MAX_MARGIN,
    Perturbed,
    Row,
    Sampling,
    cut_threshold,
    gumbel,
    hash_u32,
    margin_of,
    parameter_class,
    perturb,
    process_row,
    resolve,
    rows_of,
    sample,
    sample_rows,
    score_row,
    score_rows,
    shifted_top_p,
)
from trueweight.protos.sampling_noise import gumbel_of, uniform
from trueweight.protos.sampling_parameters import MIN_TEMPERATURE, check_token_ids, to_fp32
from trueweight.protos.v1.market_pb2 import SamplingParams

INT64 = st.integers(-(2**63), 2**63 - 1)


# --- noise -----------------------------------------------------------------------------------


def murmur3_x86_32(data: bytes) -> int:
    """Textbook MurmurHash3, whole blocks only."""
    h = 0
    for (word,) in struct.iter_unpack("<I", data):
        k = word * 0xCC9E2D51 & 0xFFFFFFFF
        k = (k << 15 | k >> 17) & 0xFFFFFFFF
        h ^= k * 0x1B873593 & 0xFFFFFFFF
        h = (h << 13 | h >> 19) & 0xFFFFFFFF
        h = (h * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def test_the_textbook_hash_knows_a_published_vector():
    # MurmurHash3_x86_32("test", seed 0), widely published.
    assert murmur3_x86_32(b"test") == 0xBA6BD213


@given(INT64, st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_hash_is_murmur3_over_the_little_endian_words(seed, pos, tokens):
    got = hash_u32(seed, pos, np.array(tokens))
    assert got.dtype == np.uint32
    words = struct.pack("<qI", seed, pos)
    assert [int(h) for h in got] == [murmur3_x86_32(words + struct.pack("<I", t)) for t in tokens]


@given(st.integers(0, 2**32 - 1))
def test_uniform_is_the_correctly_rounded_value(h):
    got = uniform(np.array([h], dtype=np.uint32))[0]
    # (h + 0.5) * 2^-32 is exact in fp64, so this rounds once.
    assert got == np.float32((h + 0.5) * 2.0**-32)
    assert 0 < got <= 1


@given(st.integers(0, 2**32 - 1))
def test_gumbel_is_within_a_millionth_of_the_fp64_value(h):
    u = uniform(np.array([h], dtype=np.uint32))
    inner = max(1.0 - float(u[0]), 2.0**-24)
    exact = -math.log(-math.log1p(-float(u[0])) if inner > 2.0**-24 else 24 * math.log(2))
    assert float(gumbel_of(u)[0]) == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_both_ends_of_the_noise_are_finite():
    low, high = uniform(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert high == 1.0  # rounds up: the naive ln(1 - u) would be -inf
    assert gumbel_of(np.array([low]))[0] == pytest.approx(33 * math.log(2), rel=1e-6)
    assert gumbel_of(np.array([high]))[0] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_noise_has_the_moments_of_a_gumbel():
    noise = np.concatenate([gumbel(seed, 5, 20_000) for seed in range(20)]).astype(np.float64)
    assert noise.mean() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_sampled_frequencies_are_the_softmax():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -30.0], dtype=np.float32)
    parameters, count = resolve(Sampling(temperature=0.8)), 20_000
    rows = [Row(parameters, 99, (), range(count), j) for j in range(count)]
    drawn = np.bincount(sample_rows(np.tile(logits, (count, 1)), rows), minlength=5)
    wanted = np.exp(logits / 0.8)
    wanted = wanted / wanted.sum() * count
    chi2 = float(((drawn[:4] - wanted[:4]) ** 2 / wanted[:4]).sum())
    assert chi2 < 20  # 3 degrees of freedom: far beyond the 99.9th percentile
    assert drawn[4] == 0


# --- forward half ----------------------------------------------------------------------------


def slow_token(logits, s, seed, prompt, output):
    """The order of docs/sampling.md in plain Python."""
    size = len(logits)
    value = [float(v) for v in logits]
    f32 = np.float32
    for token, bias in s.logit_bias:
        value[token] = float(f32(value[token]) + f32(bias))
    if s.allowed_token_ids:
        value = [x if v in s.allowed_token_ids else -math.inf for v, x in enumerate(value)]
    if len(output) < s.min_tokens:
        for token in s.stop_token_ids:
            value[token] = -math.inf
    for v in range(size):
        count = list(output).count(v)
        x = f32(value[v])
        if s.repetition_penalty != 1 and (count or v in prompt):
            r = f32(s.repetition_penalty)
            x = x * (f32(1) / r) if x > 0 else x * r
        x = x - f32(s.frequency_penalty) * f32(count)
        value[v] = float(x - f32(s.presence_penalty) * f32(count > 0))
    for word in s.bad_words:
        head = list(word[:-1])
        if len(head) <= len(output) and list(output)[len(output) - len(head) :] == head:
            value[word[-1]] = -math.inf
    if s.temperature == 0:
        return value.index(max(value))
    scaled = [float(f32(x) / f32(s.temperature)) for x in value]
    kept = slow_cut(scaled, s)
    noise = gumbel(seed, len(prompt) + len(output) - 1, size)
    noisy = [float(f32(scaled[v]) + noise[v]) if v in kept else -math.inf for v in range(size)]
    return noisy.index(max(noisy))


def slow_cut(scaled, s, top_p=None, lift=0.0):
    """What is kept; with another ``top_p``, and with the cuts before it lifted."""
    top_p, best = s.top_p if top_p is None else top_p, max(scaled)
    kept = {v for v, x in enumerate(scaled) if x > -math.inf}
    lines = [-math.inf]
    if s.min_p > 0:
        lines.append(float(np.float32(best) + np.log(np.float32(s.min_p))))
    if 0 < s.top_k < len(kept):
        lines.append(sorted(scaled, reverse=True)[s.top_k - 1])
    kept = {v for v in kept if scaled[v] >= min(max(lines) + lift, best)}
    if top_p < 1:
        weight = {v: math.exp(scaled[v] - best) for v in kept}
        total, line, before = sum(weight.values()), None, 0.0
        for v in sorted(kept, key=lambda v: -scaled[v]):
            if line is not None and before >= top_p * total:
                break
            line = scaled[v]
            before += weight[v]
        kept = {v for v in kept if scaled[v] >= line}
    return kept


@st.composite
def cases(draw):
    size = draw(st.integers(4, 24))
    ids = st.integers(0, size - 1)
    step = draw(st.sampled_from([0.5, 0.015625]))
    logits = draw(st.lists(st.integers(-300, 300), min_size=size, max_size=size))
    parameters = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])),
        top_k=draw(st.sampled_from([0, 2, 3, 100])),
        min_p=draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -0.25])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.25, 0.7])),
        min_tokens=draw(st.integers(0, 6)),
        logit_bias=tuple(draw(st.dictionaries(ids, st.sampled_from([-5.0, 2.5]))).items()),
        allowed_token_ids=tuple(draw(st.sets(ids, max_size=size))),
        bad_words=tuple(draw(st.lists(st.lists(ids, min_size=1, max_size=2).map(tuple)))),
        stop_token_ids=tuple(draw(st.sets(ids, max_size=2))),
    )
    row = (np.array(logits) * step).astype(np.float32)
    prompt = draw(st.lists(ids, min_size=1, max_size=5))
    output = draw(st.lists(ids, max_size=5))
    return row, resolve(parameters), draw(INT64), prompt, output


@settings(max_examples=400, deadline=None)
@given(cases())
def test_sampling_equals_the_slow_reading(case):
    logits, parameters, seed, prompt, output = case
    assert sample(logits, parameters, seed, prompt, output) == slow_token(*case)
    token = sample(logits, parameters, seed, prompt, output)
    assert score_row(logits, parameters, seed, prompt, output, token).margin == 0.0


def brute_margin(case, claimed):
    """The design's formula, minimised over a fine grid and every place where it can jump."""
    logits, parameters, seed, prompt, output = case
    row = perturb(logits, Row(parameters, seed, prompt, output, len(output)))
    if row.processed[claimed] == -np.inf:
        return 0.0 if np.max(row.processed) == -np.inf and claimed == 0 else MAX_MARGIN
    t = parameters.temperature or 1.0
    noisy, own = row.noisy.astype(np.float64), float(row.noisy[claimed])
    if row.threshold == -np.inf:
        return min(t * float(np.max(noisy) - own), MAX_MARGIN)
    heights = row.scaled.astype(np.float64) * t
    theta, claim = row.threshold * t, heights[claimed]
    jumps = heights - theta
    moves = np.concatenate([np.linspace(-0.5, 0.5, 401), jumps, jumps + 1e-9])
    best = math.inf
    for s in moves[np.abs(moves) <= CLIP_LOGIT + 1e-8]:
        inside = heights >= theta + s
        gap = max(0.0, t * (float(np.max(noisy[inside], initial=own)) - own))
        best = min(best, max(abs(s), gap, theta + s - claim, 0.0))
    return min(best, MAX_MARGIN)


def brute_explained(case, claimed, rounding, slack):
    """Whether any cut that a rounding allows explains the claim: between the cuts of both shifted
    masses, give or take a step, not above the claim by more than a step, no rival far ahead."""
    logits, parameters, seed, prompt, output = case
    row = perturb(logits, Row(parameters, seed, prompt, output, len(output)))
    scaled, noisy = row.scaled.astype(np.float64), row.noisy.astype(np.float64)
    step, p = rounding / parameters.temperature, parameters.top_p
    ends = []
    for sign in (1, -1):
        odds = p / (1 - p) * math.exp(sign * step)
        kept = slow_cut([float(x) for x in scaled], parameters, odds / (1 + odds), -sign * step)
        ends.append(min(scaled[v] for v in kept))
    near = slack / parameters.temperature + 2e-7 * float(np.max(np.abs(scaled[scaled > -np.inf])))
    for cut in {end + way * step for end in (*ends, *scaled) for way in (-1, 0, 1)}:
        inside = noisy[scaled >= cut + near]
        if (
            ends[0] - step - near <= cut <= ends[1] + step + near
            and cut <= scaled[claimed] + step + near
            and np.max(inside, initial=-np.inf) <= noisy[claimed] + step + near
        ):
            return True
    return False


def at_a_mass(case, index, offset):
    """The case with top_p beside the mass of its likeliest tokens, or as it is."""
    logits, parameters, seed, prompt, output = case
    row = perturb(logits, Row(parameters, seed, prompt, output, len(output)))
    before = cut_threshold(row.scaled, replace(parameters, top_p=1.0))
    left = np.sort(row.scaled[(row.scaled >= before) & (row.scaled > -np.inf)])[::-1]
    if parameters.temperature == 0 or not len(left):
        return case
    weights = np.exp(left.astype(np.float64) - float(left[0]))
    mass = weights[: index + 1].sum() / weights.sum()
    top_p = to_fp32(mass * (1 + offset))
    top_p = top_p if 0 < top_p < 1 else to_fp32(0.5)
    return (logits, resolve(replace(parameters, top_p=top_p)), seed, prompt, output)


OFFSETS = st.sampled_from([0.0, 1e-7, -1e-7, 1e-3, -1e-3, 0.02, -0.02, 0.06])


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(0, 3), st.booleans(), st.integers(0, 5), OFFSETS)
def test_margin_equals_the_brute_force_minimum(case, claimed, is_at_a_mass, index, offset):
    if is_at_a_mass:
        case = at_a_mass(case, index, offset)
    logits, parameters, seed, prompt, output = case
    score = score_row(logits, parameters, seed, prompt, output, claimed)
    wanted = brute_margin(case, claimed)
    is_laddered = parameters.top_p < 1 and wanted < MAX_MARGIN
    for rounding in MASS_LADDER if is_laddered else ():
        if rounding < wanted and brute_explained(case, claimed, rounding, -1e-5):
            assert score.margin <= rounding
        if rounding == score.margin and abs(score.margin - wanted) > 0.0013:
            assert brute_explained(case, claimed, rounding, 1e-5)
            wanted = rounding
    # The grid can only miss the minimum by half a step.
    assert wanted - 0.0013 <= score.margin <= wanted + 1e-6
    raw = logits.astype(np.float64)
    log_total = float(np.log(np.exp(raw - raw.max()).sum()) + raw.max())
    assert score.logprob == pytest.approx(float(raw[claimed]) - log_total, abs=1e-6)
    assert score.rank == int((raw > raw[claimed]).sum())


def margin_in_logits(case, claimed):
    """The margin if the cut could move in logits only."""
    logits, parameters, seed, prompt, output = case
    row = perturb(logits, Row(parameters, seed, prompt, output, len(output)))
    return margin_of(row, claimed, replace(parameters, top_p=1.0))


@settings(max_examples=1000, deadline=None)
@given(cases(), st.sampled_from([1.0, 0.1, 0.001]), st.floats(0, CLIP_LOGIT), st.integers(0, 2**31))
def test_a_rounding_costs_at_most_itself_without_top_p(case, spread, size, noise_seed):
    """What honest hardware does: logits off by at most e/2 each make a margin of at most e."""
    logits, parameters, seed, prompt, output = case
    logits = (logits * np.float32(spread)).astype(np.float32)
    parameters = resolve(
        Sampling(temperature=parameters.temperature, top_k=parameters.top_k, min_p=parameters.min_p)
    )
    shift = np.random.default_rng(noise_seed).uniform(-size / 2, size / 2, len(logits))
    other = (logits + shift).astype(np.float32)
    token = sample(other, parameters, seed, prompt, output)
    margin = score_row(logits, parameters, seed, prompt, output, token).margin
    assert margin <= size + 1e-4


@st.composite
def roundings(draw):
    """A case with top-p beside a cumulative mass, alone or after other cuts, a size of rounding and
    logits that are off by at most half of it."""
    logits, other, *where = draw(cases())
    # Logits that are close, as a vocabulary's are: many cuts and rivals within a rounding.
    logits = (logits * np.float32(draw(st.sampled_from([1.0, 0.1, 0.01])))).astype(np.float32)
    kept = ("temperature", "top_k", "min_p", "logit_bias", "allowed_token_ids", "bad_words")
    plain = Sampling(**{name: getattr(other, name) for name in kept})
    case = at_a_mass((logits, resolve(plain), *where), draw(st.integers(0, 8)), draw(OFFSETS))
    size = draw(st.one_of(st.sampled_from(MASS_LADDER), st.floats(1e-3, 0.125)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shift = generator.uniform(-1, 1, len(logits))
    if draw(st.booleans()):
        shift = np.sign(np.round(1.5 * shift))  # as far as may be, or not at all
    # Less what fp32 rounds once more.
    return case, size, (case[0] + shift * (size / 2 - 1e-4)).astype(np.float32)


@settings(max_examples=1000, deadline=None)
@given(roundings())
def test_a_rounding_costs_at_most_its_step_of_the_ladder_under_top_p(drawn):
    """Logits off by at most e/2 each, e at most 1/8: the margin of what they sample is at most the
    lowest step of the ladder that is not below e. Exact, whatever the cuts and the mass."""
    case, size, other = drawn
    logits, parameters, *where = case
    if parameters.top_p == 1.0:
        return
    token = sample(other, parameters, *where)
    margin = score_row(logits, parameters, *where, token).margin
    assert margin <= min(step for step in MASS_LADDER if step >= size)
    assert margin <= margin_in_logits(case, token)


def test_attack_a_client_chooses_top_p_at_a_cumulative_mass():
    """The client knows the logits and asks for a top_p at which every rounding adds or drops a
    token. In logits alone honest nodes would look like cheats."""
    generator = np.random.default_rng(5)
    before, after = [], []
    for seed in range(1500):
        logits = generator.normal(0, 2, 40).astype(np.float32)
        case = (logits, resolve(Sampling()), seed, [1], [])
        case = at_a_mass(case, int(generator.integers(0, 6)), 0.0)
        shift = np.sign(generator.normal(0, 1, len(logits))) / 64
        token = sample((logits + 0.99 * shift).astype(np.float32), *case[1:])
        before.append(margin_in_logits(case, token))
        after.append(score_row(*case, token).margin)
    assert np.count_nonzero(np.array(before) > 0.4) >= 5
    assert max(after) <= 1 / 32
    # What lies far outside the cut is explained by no rounding.
    far = int(np.argsort(logits)[0])
    assert score_row(*case, far).margin == margin_in_logits(case, far) > CLIP_LOGIT


def test_a_cut_between_both_shifted_masses_explains_a_token():
    """Token 1 is in for the node and out for the verifier; whatever shift of top_p lets it in at
    the verifier also lets in token 2, which is far ahead of it."""
    logits = np.array([0.0, -5.5, -7.0, *[-7.6] * 1900], dtype=np.float32)
    mass = 1 / np.exp(logits.astype(np.float64)).sum()
    parameters = resolve(Sampling(top_p=shifted_top_p(mass, -0.9 / 8)))
    noisy = (logits - 5).astype(np.float32)
    noisy[:3] = 0, 5, 6
    row = Perturbed(logits, logits, noisy, cut_threshold(logits, parameters))
    assert row.threshold == 0.0
    other = (logits + np.where(logits == 0, -0.057, 0.057)).astype(np.float32)
    assert np.flatnonzero(other >= cut_threshold(other, parameters)).tolist() == [0, 1]
    assert margin_of(row, 1, parameters) == 1 / 8
    assert margin_of(row, 1, replace(parameters, top_p=1.0)) == 5.0


def test_a_shifted_top_p_stays_between_its_ends():
    ends = (np.nextafter(np.float32(0), np.float32(1)), np.nextafter(np.float32(1), np.float32(0)))
    for top_p in map(float, ends):
        for shift in (-0.125 / MIN_TEMPERATURE, 0.0, 0.125 / MIN_TEMPERATURE):
            assert 0.0 < shifted_top_p(top_p, shift) < 1.0
    assert shifted_top_p(0.5, math.log(3)) == pytest.approx(0.75)


def test_rows_of_a_block_are_rows_one_by_one():
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, (6, 40)).astype(np.float32)
    parameters = resolve(Sampling(repetition_penalty=1.2, top_k=9, presence_penalty=0.3))
    prompt, prefix, output = [1, 2, 3], [4, 4], [5, 6, 7, 8, 9, 10]
    rows = rows_of(parameters, 11, prompt, prefix, output, count=6)
    tokens, scores = sample_rows(logits, rows), score_rows(logits, rows, output)
    for j in range(6):
        history = [*prefix, *output[:j]]
        assert tokens[j] == sample(logits[j], parameters, 11, prompt, history)
        assert scores[j] == score_row(logits[j], parameters, 11, prompt, history, output[j])


def test_a_continuation_samples_what_the_whole_would_have():
    """Prefix tokens count as output: positions, penalties and min_tokens go on, not start over."""
    logits = np.random.default_rng(2).normal(0, 1, (8, 30)).astype(np.float32)
    parameters = resolve(
        Sampling(frequency_penalty=0.7, min_tokens=5, stop_token_ids=(0,), repetition_penalty=1.1)
    )
    whole: list[int] = []
    for row in logits:
        whole.append(sample(row, parameters, 3, [1, 2], whole))
    rest = rows_of(parameters, 3, [1, 2], whole[:3], whole[3:], count=5)
    assert sample_rows(logits[3:], rest) == whole[3:]


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_attack_a_client_multiplies_logits_until_their_distance_is_no_number(cut, temperature):
    logits = np.linspace(-3e4, 3e4, 32, dtype=np.float32)
    for penalty in (1e-45, 1e-38, 1e-30, 1e-6):
        wanted = Sampling(repetition_penalty=penalty, temperature=temperature, **cut)
        if penalty < 1e-6:
            with pytest.raises(InvalidRequest):
                resolve(wanted)
            continue
        case = logits, resolve(wanted), 7, [31, 30, 29], [28]
        assert score_row(*case, sample(*case)).margin == 0.0


def test_logits_that_are_not_numbers_are_an_engine_error():
    for bad in (np.nan, np.inf):
        logits = np.zeros(4, dtype=np.float32)
        logits[2] = bad
        with pytest.raises(EngineError):
            sample(logits, Sampling(), 1, [1], [])


def test_a_grammar_without_its_mask_is_refused_not_ignored():
    parameters = Sampling(grammar_sha256=b"\x01" * 32, grammar_compiler="x")
    with pytest.raises(InvalidRequest):
        sample(np.zeros(4, dtype=np.float32), parameters, 1, [1], [])


def test_when_nothing_is_allowed_token_zero_is_canonical():
    parameters = Sampling(allowed_token_ids=(3,), bad_words=((3,),))
    logits = np.zeros(4, dtype=np.float32)
    assert sample(logits, parameters, 1, [1], []) == 0
    assert score_row(logits, parameters, 1, [1], [], 0).margin == 0.0
    assert score_row(logits, parameters, 1, [1], [], 3).margin == MAX_MARGIN


def test_claims_outside_the_vocabulary_are_refused():
    for claimed in (-1, 4):
        with pytest.raises(InvalidRequest):
            score_row(np.zeros(4, dtype=np.float32), Sampling(), 1, [1], [], claimed)


def test_the_input_logits_are_not_changed():
    logits = np.zeros(4, dtype=np.float32)
    parameters = Sampling(logit_bias=((1, 5.0),), presence_penalty=1.0)
    process_row(logits, Row(parameters, 1, [1], [2], 1))
    assert not logits.any()


def test_ties_at_a_cut_are_kept():
    scaled = np.array([3, 2, 2, 2, 1], dtype=np.float32)
    assert cut_threshold(scaled, Sampling(top_k=2)) == 2.0
    assert cut_threshold(scaled, Sampling(top_p=0.55)) == 2.0
    assert cut_threshold(scaled, Sampling(top_p=0.4)) == 3.0


# --- parameters ------------------------------------------------------------------------------


def test_resolution():
    assert resolve(Sampling(temperature=0.001)).temperature == to_fp32(0.01)
    assert resolve(Sampling(temperature=1e-60)).temperature == to_fp32(0.01)
    greedy = resolve(Sampling(top_k=1, top_p=0.5, min_p=0.3))
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.min_p) == (0.0, 0, 1.0, 0.0)
    assert resolve(Sampling(stop_token_ids=(5, 3, 5))).stop_token_ids == (3, 5)
    assert resolve(Sampling(top_p=0.9)).top_p == to_fp32(0.9) != 0.9


@settings(deadline=None)
@given(cases())
def test_resolved_parameters_survive_the_wire(case):
    parameters = case[1]
    wire = parameters.to_proto().SerializeToString()
    assert Sampling.from_proto(SamplingParams.FromString(wire)) == parameters
    assert resolve(parameters) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": 0.005},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": 1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 9.9e-7},
        {"repetition_penalty": float("inf")},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": tuple((i, 1.0) for i in range(1025))},
        {"allowed_token_ids": (2, 1)},
        {"allowed_token_ids": tuple(range(1025))},
        {"stop_token_ids": (1, 1)},
        {"stop_token_ids": tuple(range(129))},
        {"bad_words": ((),)},
        {"bad_words": ((1,),) * 129},
        {"bad_words": ((1,) * 65,)},
        {"grammar_sha256": b"short", "grammar_compiler": "x"},
        {"grammar_sha256": b"\x00" * 32},
    ],
)
def test_unresolved_or_absurd_parameters_are_refused(changes):
    parameters = Sampling(**changes)
    with pytest.raises(InvalidRequest):
        Sampling.from_proto(parameters.to_proto())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_resolve_refuses_what_fp32_cannot_hold(value):
    with pytest.raises(InvalidRequest):
        resolve(Sampling(temperature=value))


def test_ids_are_held_against_the_vocabulary():
    check_token_ids(Sampling(stop_token_ids=(9,)), 10)
    for parameters in (
        Sampling(stop_token_ids=(10,)),
        Sampling(logit_bias=((10, 1.0),)),
        Sampling(allowed_token_ids=(3, 10)),
        Sampling(bad_words=((1, 10),)),
    ):
        with pytest.raises(InvalidRequest):
            check_token_ids(parameters, 10)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (Sampling(), "plain"),
        (Sampling(temperature=0.0, top_k=5), "greedy"),
        (Sampling(top_p=0.9), "top_p"),
        (Sampling(top_k=5), "top_k"),
        (Sampling(min_p=0.1), "min_p"),
        (Sampling(top_k=5, min_p=0.1), "multi_cut"),
        (Sampling(presence_penalty=0.1, top_p=0.5), "penalties"),
        (Sampling(grammar_sha256=b"\x00" * 32, grammar_compiler="x"), "grammar"),
        (Sampling(logit_bias=((1, 1.0),), min_tokens=3), "plain"),
    ],
)
def test_parameter_classes(parameters, name):
    assert parameter_class(parameters) == name

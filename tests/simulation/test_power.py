"""Tokens to conviction from pools: more evidence, fewer tokens; honest pools never."""

import math

import pytest

from trueweight.protos.evidence import Item
from trueweight.protos.sampling_parameters import parameter_class
from trueweight.simulation.calibration_traffic import CLASSES, Prompts, draw_jobs
from trueweight.simulation.power import Mix, Pool, power

MU0 = 400_000


def pool(mean, name="cheat", tokens=200):
    items = tuple(Item(int(mean * tokens * 1e9 * f), tokens, MU0) for f in (0.5, 1, 1.5) * 20)
    return Pool(name, items, 0.99)


HONEST = pool(0.0001, "honest")


def test_stronger_cheats_are_convicted_sooner():
    found = [power(pool(mean), HONEST, Mix(), 10, seed=1) for mean in (0.5, 0.0089, 0.0009)]
    tokens = [p.median_tokens for p in found]
    assert tokens == sorted(tokens) and all(p.convicted == 10 for p in found)
    assert found[0].median_requests <= 3 and found[1].median_tokens <= 2500
    assert all(p.p95_tokens >= p.median_tokens for p in found)


@pytest.mark.parametrize("mix", [Mix(cheat_share=0.2), Mix(one_token_each=10), Mix(5000)])
def test_disguises_cost_more_but_do_not_help(mix):
    plain, hidden = (power(pool(0.0089), HONEST, m, 8, seed=2) for m in (Mix(), mix))
    assert hidden.convicted == 8
    assert hidden.median_tokens <= 12 * plain.median_tokens


def test_honest_pools_are_never_convicted(monkeypatch):
    monkeypatch.setattr("trueweight.simulation.power.MAX_REQUESTS", 500)
    found = power(HONEST, HONEST, Mix(), 6, seed=3)
    assert found.convicted == 0 and found.largest_wealth < 10
    assert math.isinf(found.median_tokens)


@pytest.mark.parametrize("name", CLASSES)
def test_calibration_traffic_covers_its_class_and_short_outputs(name):
    prompts = Prompts(heads=((1, 2, 3), (4, 5)), stop_ids=(0,))
    jobs = draw_jobs(prompts, name, seed=1, max_context=2048)
    drawn = [next(jobs) for _ in range(60)]
    assert {parameter_class(j.sampling) for j in drawn} == {name}
    assert {1, 8, 200} <= {j.max_tokens for j in drawn}
    again = draw_jobs(prompts, name, seed=1, max_context=2048)
    assert [next(again) for _ in range(60)] == drawn

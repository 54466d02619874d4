"""The cheats that wrap an engine do what they say, and nothing else."""

from __future__ import annotations

import pytest

from trueweight.node.engine import EngineFinish, GenerateJob
from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.protos.sampling_parameters import Sampling, resolve
from trueweight.simulation import adversaries

SHAPE = ModelShape(vocabulary_size=512, mean_output_tokens=200)
STOP = 0


def job(seed, max_tokens=40, stops=(STOP,)):
    sampling = resolve(Sampling(stop_token_ids=stops))
    return GenerateJob(f"j{seed}", (5, 6, 7), (), sampling, seed, max_tokens)


async def answer(engine, asked):
    tokens, finish = [], None
    async for step in engine.generate(asked):
        tokens.extend(step.token_ids)
        finish = step.finish or finish
    return tokens, finish


@pytest.fixture
async def honest():
    engine = SyntheticEngine(SyntheticModel(SHAPE))
    await engine.start()
    yield engine
    await engine.close()


async def test_an_early_end_looks_like_a_real_one(honest):
    cheat = adversaries.EarlyEnd(honest, 0.25)
    cut = 0
    for seed in range(20):
        true, _ = await answer(honest, job(seed))
        tokens, finish = await answer(cheat, job(seed))
        assert len(tokens) <= 10 and finish is EngineFinish.EOS and tokens[-1] == STOP
        assert tokens[:-1] == true[: len(tokens) - 1]
        cut += tokens != true
    assert cut >= 15
    assert await answer(cheat, job(1, stops=())) == await answer(honest, job(1, stops=()))


async def test_cheating_on_a_share_of_the_requests(honest):
    cheat = adversaries.Sometimes(honest, adversaries.WrongSeed(honest), 0.2)
    different = 0
    for seed in range(200):
        asked = job(seed, max_tokens=8, stops=())
        tokens = await answer(cheat, asked)
        assert (tokens != await answer(honest, asked)) <= cheat.cheats_on(asked)
        different += tokens != await answer(honest, asked)
        assert tokens == await answer(cheat, asked), "a retry meets the same node"
    assert 20 <= different <= 60


async def test_a_share_of_nothing_and_of_everything(honest):
    wrong = adversaries.WrongSeed(honest)
    for share, same_as in ((0.0, honest), (1.0, wrong)):
        cheat = adversaries.Sometimes(honest, wrong, share)
        for seed in range(20):
            assert await answer(cheat, job(seed)) == await answer(same_as, job(seed))

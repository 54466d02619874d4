"""A model whose context is longer than the cache: the node serves what fits, and says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trueweight.node.engine import GenerateJob
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.protos.errors import ContextOverflow, InvalidRequest
from trueweight.protos.sampling import Sampling, resolve
from trueweight.simulation.random_llama import TINY, write_random_llama

LONG = replace(TINY, max_context_tokens=131_072)


@pytest.mark.vllm
@pytest.mark.soak
async def test_a_context_longer_than_the_cache_is_cut_to_what_fits(tmp_path):
    model = write_random_llama(tmp_path / "long", LONG)
    # 256 bytes a token.
    engine = VllmEngine(model, VllmOptions(max_running=4, kv_cache_bytes=1024 * 1024))
    await engine.start()
    try:
        fits = engine.limits.max_context_tokens
        assert 1_000 < fits <= 4_096
        job = GenerateJob("a", (7,) * 30, (), resolve(Sampling()), 1, 8)
        tokens = [token async for step in engine.generate(job) for token in step.token_ids]
        assert len(tokens) == 8
        with pytest.raises((ContextOverflow, InvalidRequest)):
            async for _ in engine.generate(replace(job, job_id="b", prompt=(7,) * fits)):
                pass
    finally:
        await engine.close()

"""One engine for the whole session: each start costs half a minute."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.byte_tokenizer import byte_tokenizer
from trueweight.node.vllm.engine import VllmEngine, VllmOptions
from trueweight.simulation.random_llama import TINY, write_random_llama

# 256 bytes per token: room for about 2,000 tokens, so that 32 requests preempt one another, and
# chunks of 64 tokens, so that every longer prompt is prefilled in pieces.
TIGHT = VllmOptions(
    max_context_tokens=512, max_running=32, max_batched_tokens=64, kv_cache_bytes=512 * 1024
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_llama(tmp_path_factory.mktemp("tiny-llama"), TINY)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(tiny_model: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(tiny_model, TIGHT)
    await engine.start()
    yield engine
    await engine.close()

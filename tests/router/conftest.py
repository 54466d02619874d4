"""A whole market in this process, and a small tokenizer of our own."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trueweight.router.legs import LegTiming
from trueweight.router.lifecycle import Timing
from trueweight.simulation.inprocess import MODEL_ID, InProcessMarket, MarketSpec, NodeSpec

SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "Grüße aus 東京 🎉🎉 naïve café",
    "hello world " * 5,
]


@pytest.fixture(scope="session")
def tokenizer_json():
    """Byte-level BPE with control tokens, trained in a moment."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(s, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


QUICK = Timing(
    request_ms=20_000,
    queue_ms=5_000,
    leg=LegTiming(first_token_ms=5_000, between_tokens_ms=5_000, receipt_ms=3_000),
)


@pytest.fixture
def start_market(tmp_path):
    """``async with start_market(NodeSpec(...), ...) as market``: real ledger, router and nodes."""

    @contextlib.asynccontextmanager
    async def start(*nodes, **settings):
        settings.setdefault("timing", QUICK)
        spec = MarketSpec(nodes=nodes or (NodeSpec("n0"),), **settings)
        async with InProcessMarket(tmp_path / "market", spec) as market:
            yield market

    return start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def market(tmp_path_factory):
    """One honest node, shared by a module's tests; each takes a client of its own (``name``)."""
    spec = MarketSpec(nodes=(NodeSpec("n0"),), timing=QUICK)
    async with InProcessMarket(tmp_path_factory.mktemp("market") / "market", spec) as running:
        yield running


@pytest.fixture
def name(request):
    """A client name that no other test uses."""
    text = request.node.name.lower().encode()
    return f"c{hashlib.sha256(text).hexdigest()[:12]}"


@pytest.fixture
def connect(name):
    """``await connect(market)``: the unmodified OpenAI client of ``name``."""

    async def make(market, who="", **money):
        key = await market.client_key(who or name, **money)
        return AsyncOpenAI(base_url=market.base_url, api_key=key, max_retries=0, timeout=60)

    return make


@pytest.fixture
def model_id():
    return MODEL_ID

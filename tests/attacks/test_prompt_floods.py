"""Attacks by clients without a balance: 8 MiB that cost a router seconds."""

from __future__ import annotations

import pytest

from trueweight.protos.errors import InvalidRequest
from trueweight.router import openai_messages, openai_requests
from trueweight.router.openai_requests import parse_chat, parse_completion
from trueweight.simulation.inprocess import MODEL_ID

EMPTY = {"type": "text", "text": ""}


@pytest.fixture
def steps(monkeypatch):
    """How often something is done for one item of a body."""
    taken = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: taken.append(name) or real(*a))

    counted(openai_requests, "_is_token_id")
    counted(openai_messages, "_part")
    return taken


def test_attack_millions_of_token_ids_cost_no_step_each(steps):
    request = parse_completion({"model": "m", "prompt": [7] * 300_000})
    assert len(request.token_ids) == 300_000
    with pytest.raises(InvalidRequest):
        parse_completion({"model": "m", "prompt": [7] * 2_000_000})
    assert steps == []


@pytest.mark.parametrize("last", [True, -1, 2**40, 1.0, None, "7", [7]])
def test_attack_one_wrong_id_among_many_is_found(last):
    with pytest.raises(InvalidRequest):
        parse_completion({"model": "m", "prompt": [7] * 1000 + [last]})


def test_attack_millions_of_empty_parts_are_refused_before_the_first(steps):
    messages = [{"role": "user", "content": [EMPTY] * 1000}] * 4096
    with pytest.raises(InvalidRequest, match="8192 parts") as refusal:
        parse_chat({"model": "m", "messages": messages})
    assert refusal.value.param == "messages"
    assert steps == []


async def test_attack_floods_of_a_client_without_balance_are_refused_soon(bazaar, shopper, steps):
    async with bazaar() as market:
        broke = await shopper(market, "broke", credits=0)
        ids = {"model": MODEL_ID, "prompt": [7] * 1_000_000}
        status, answer, _ = await broke.post(ids, "/completions")
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        text = {"model": MODEL_ID, "prompt": "!" * 8_000_000}
        status, answer, _ = await broke.post(text, "/completions")
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        parts = [{"role": "user", "content": [EMPTY] * 1000}] * 270
        status, answer, _ = await broke.post({"model": MODEL_ID, "messages": parts})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert steps == []

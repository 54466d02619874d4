"""What users of OpenAI's own client rely on beyond the happy path."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import openai
import pytest

from trueweight.router import front
from trueweight.simulation.inprocess import MODEL_ID

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL_ID, "messages": USER, "max_tokens": 12, "seed": 7}
TEXT = {"model": MODEL_ID, "prompt": "def f", "max_tokens": 12, "seed": 7}

# Sent by clients and frameworks without meaning anything.
NEUTRAL_CHAT = {
    "n": 1,
    "stop": [],
    "logit_bias": {},
    "user": "u-1",
    "metadata": {"team": "a"},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "store": False,
    "logprobs": False,
    "top_logprobs": None,
    "stream": False,
    "stream_options": None,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "modalities": ["text"],
    "service_tier": "auto",
    "verbosity": "medium",
    "functions": [],
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "prediction": None,
    "reasoning_effort": None,
}


async def test_neutral_parameters_change_nothing(market, connect):
    client = await connect(market)
    plain = await client.chat.completions.create(**CHAT)
    neutral = await client.chat.completions.create(**CHAT, extra_body=NEUTRAL_CHAT)
    assert neutral.choices[0].message.content == plain.choices[0].message.content
    plain = await client.completions.create(**TEXT)
    neutral = await client.completions.create(
        **TEXT, n=1, best_of=1, echo=False, suffix=None, logprobs=None, stop=None, user="u"
    )
    assert neutral.choices[0].text == plain.choices[0].text


async def test_shapes_of_whole_answers(market, connect):
    client = await connect(market)
    answer = await client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.logprobs) == (0, "assistant", None)
    assert choice.message.refusal is None and not choice.message.tool_calls
    assert answer.model == MODEL_ID
    assert abs(answer.created - market.clock.now_unix_ms() / 1000) < 60
    completion = await client.completions.create(**TEXT)
    assert (completion.object, completion.choices[0].index) == ("text_completion", 0)
    # The id of the answer is the id of its receipt.
    assert answer.id.removeprefix("chatcmpl-") == answer._request_id


async def test_streams_without_usage_carry_none(market, connect):
    client = await connect(market)
    stream = await client.chat.completions.create(**CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "usage" not in chunks[-1].model_fields_set
    raw = await client.completions.with_raw_response.create(**TEXT, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-request-id"] == raw.headers["x-trueweight-receipt"]
    assert "".join([c.choices[0].text async for c in raw.parse()])


async def test_the_stream_helper_and_the_synchronous_client(market, connect):
    client = await connect(market)
    text = ""
    with contextlib.suppress(openai.LengthFinishReasonError):
        async with client.chat.completions.stream(**CHAT) as stream:
            async for event in stream:
                text += event.delta if event.type == "content.delta" else ""
    whole = await client.chat.completions.create(**CHAT)
    assert text == whole.choices[0].message.content

    def in_a_thread():
        with openai.OpenAI(base_url=market.base_url, api_key=client.api_key, max_retries=0) as sync:
            names = [m.id for m in sync.models.list()]
            pieces = sync.chat.completions.create(**CHAT, stream=True)
            return names, "".join(p.choices[0].delta.content or "" for p in pieces)

    names, again = await asyncio.to_thread(in_a_thread)
    assert names == [MODEL_ID] and again == whole.choices[0].message.content


async def test_seed_and_bias_and_both_names_of_the_limit(market, connect):
    client = await connect(market)
    ask = {"model": MODEL_ID, "messages": USER}
    one = await client.chat.completions.create(**ask, max_completion_tokens=9, seed=3)
    same = await client.chat.completions.create(**ask, max_tokens=9, seed=3)
    other = await client.chat.completions.create(**ask, max_tokens=9, seed=4)
    assert one.choices[0].message.content == same.choices[0].message.content
    assert one.choices[0].message.content != other.choices[0].message.content
    # A bias of 100 on one token and the answer is that token, again and again.
    forced = await client.completions.create(
        **TEXT, logit_bias={"300": 100}, extra_body={"ignore_eos": True}
    )
    decode = market.router.catalog.get(MODEL_ID).tokenizer.decode
    assert forced.choices[0].text == decode([300] * 12)


async def test_prompts_as_lists(market, connect):
    client = await connect(market)
    plain = await client.completions.create(**TEXT)
    listed = await client.completions.create(**{**TEXT, "prompt": ["def f"]})
    assert listed.choices[0].text == plain.choices[0].text
    tokenizer = market.router.catalog.get(MODEL_ID).tokenizer
    ids = list(tokenizer._encode_user_text("def f", add_special_tokens=True))
    for prompt in (ids, [ids]):
        by_ids = await client.completions.create(**{**TEXT, "prompt": prompt})
        assert by_ids.choices[0].text == plain.choices[0].text


REFUSED = [
    ({"n": 2}, "n", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"store": True}, "store", None),
    ({"audio": {}}, "audio", None),
    ({"user": 5}, "user", "invalid_request"),
    ({"metadata": "x"}, "metadata", "invalid_request"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_request"),
    ({"temperature": 3}, "temperature", "invalid_request"),
    ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
        "messages[0].content[0].y",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name", None),
]


@pytest.mark.parametrize(("change", "param", "code"), REFUSED, ids=[r[1] for r in REFUSED])
async def test_bad_requests_name_their_parameter(market, connect, change, param, code):
    client = await connect(market)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**CHAT | {"extra_body": change})
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


async def test_every_error_is_the_right_exception(market, connect, monkeypatch):
    client, poor = await connect(market), await connect(market, "beggar", credits=0)
    with pytest.raises(openai.AuthenticationError) as unknown:
        await client.with_options(api_key="tw-nobody").chat.completions.create(**CHAT)
    assert unknown.value.code == "unauthenticated" and unknown.value.request_id
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="tw-nobody").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**CHAT | {"model": "gpt-9"})
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model=MODEL_ID, input="x")
    with pytest.raises(openai.APIStatusError) as broke:
        await poor.chat.completions.create(**CHAT)
    assert (broke.value.status_code, broke.value.code) == (402, "insufficient_funds")
    with pytest.raises(openai.InternalServerError) as nobody:
        await client.chat.completions.create(**CHAT, extra_body={"provider": {"only": ["nobody"]}})
    assert nobody.value.status_code == 503 and nobody.value.response.headers["retry-after"]
    monkeypatch.setattr(front, "MAX_IN_FLIGHT", 0)
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(**CHAT)
    assert full.value.response.headers["retry-after"]


async def test_the_client_tries_again_when_told_to(market, connect, monkeypatch):
    client = (await connect(market)).with_options(max_retries=3)
    monkeypatch.setattr(front, "MAX_IN_FLIGHT", 0)
    answering = asyncio.create_task(client.chat.completions.create(**CHAT))
    await asyncio.sleep(0.2)
    monkeypatch.undo()
    assert (await asyncio.wait_for(answering, 10)).choices[0].message.content


async def test_an_internal_error_tells_its_id_and_no_more(market, connect, monkeypatch, caplog):
    client = await connect(market)

    def broken(*_):
        raise RuntimeError("the secret of " + USER[0]["content"])

    monkeypatch.setattr(market.router.front, "start", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(**CHAT)
    assert "secret" not in str(caught.value)
    assert caught.value.request_id in caplog.text


async def test_answers_are_plain_json_for_everybody_else(market, connect):
    client = await connect(market)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {client.api_key}"}) as http:
        answer = await http.post(f"{market.base_url}/chat/completions", content=json.dumps(CHAT))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert (await http.head(f"{market.base_url}/models")).status_code == 200
        assert (await http.put(f"{market.base_url}/models")).status_code == 405

"""The unmodified ``openai`` client against a real market: shapes, usage, money, errors."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from trueweight.node.synthetic import Speed
from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.grammar import digest_of_source, source_of
from trueweight.protos.receipt_bundle import parse_bundle
from trueweight.protos.v1.market_pb2 import Assignment
from trueweight.simulation.inprocess import MODEL_DIRECTORY, NodeSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")


def user(text):
    return [{"role": "user", "content": text}]


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_chat_answers_and_costs_what_usage_says(market, connect, name, model_id):
    client = await connect(market)
    raw = await client.chat.completions.with_raw_response.create(
        model=model_id, messages=user("hello"), max_tokens=20, seed=1, temperature=0.8, top_p=0.9
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    cost = -(-(used.prompt_tokens * 10**8 + used.completion_tokens * 3 * 10**8) // 10**6)
    assert used.cost_nano == cost
    balance = await market.balance(f"client:{name}")
    assert int(balance.debits_posted_nano) == cost
    assert await market.held_nano(name) == 0
    route = json.loads(raw.headers["x-trueweight-route"])
    assert route["node"] in {n.node_id for n in market.nodes.values()}
    assert route["why"]


async def test_streaming_equals_not_streaming_and_usage_comes_last(market, connect, model_id):
    client = await connect(market)
    ask = {"model": model_id, "messages": user("hello"), "max_tokens": 40, "seed": 5}
    whole = await client.chat.completions.create(**ask)
    stream = await client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = [c async for c in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.cost_nano == whole.usage.cost_nano
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1


async def test_completions_with_text_and_with_token_ids(market, connect, model_id):
    client = await connect(market)
    text = await client.completions.create(model=model_id, prompt="def f", max_tokens=5, seed=2)
    assert text.object == "text_completion"
    receipt = await read_receipt(market, client, text.id)
    ids = list(parse_bundle(json.dumps(receipt)).prompt_token_ids)
    same = await client.completions.create(model=model_id, prompt=ids, max_tokens=5, seed=2)
    assert same.choices[0].text == text.choices[0].text
    stream = await client.completions.create(
        model=model_id, prompt=ids, max_tokens=5, seed=2, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == text.choices[0].text


async def read_receipt(market, client, answer_id):
    async with httpx.AsyncClient(timeout=10) as http:
        answer = await http.get(
            f"{market.base_url}/receipts/{answer_id}",
            headers={"Authorization": f"Bearer {client.api_key}"},
        )
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_max_tokens_and_ignore_eos_give_exactly_that_many(market, connect, model_id):
    client = await connect(market)
    for n in (1, 33):
        answer = await client.chat.completions.create(
            model=model_id, messages=user("x"), max_tokens=n, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == n
        assert answer.choices[0].finish_reason == "length"


async def test_stop_string_cuts_text_and_bill_at_the_same_token(
    start_market, connect, name, model_id
):
    # Slow enough that the router's Stop comes before the node is done by itself.
    async with start_market(NodeSpec("slow", speed=Speed(100.0))) as market:
        client = await connect(market)
        ask = {"model": model_id, "prompt": "def f", "max_tokens": 200, "seed": 3}
        free = await client.completions.create(
            **{**ask, "max_tokens": 30}, extra_body={"ignore_eos": True}
        )
        text = free.choices[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        cut = await client.completions.create(**ask, stop=[stop], extra_body={"ignore_eos": True})
        assert cut.choices[0].text == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        used = cut.usage.completion_tokens
        assert 0 < used < 30
        found = await read_receipt(market, client, cut.id)
        bundle = parse_bundle(json.dumps(found))
        # The node signed exactly the tokens that are billed.
        assert len(bundle.output_token_ids[0]) == used
        assert found["finish_reason"] == "stopped"
        decoded = market.router.catalog.get(model_id).tokenizer.decode
        assert stop in decoded(bundle.output_token_ids[0])
        assert stop not in decoded(bundle.output_token_ids[0][:-1])


async def test_a_stop_string_in_what_is_done_already_is_billed_up_to_it(
    market, connect, model_id, name
):
    client = await connect(market)
    ask = {"model": model_id, "prompt": "def f", "max_tokens": 12, "seed": 3}
    free = await client.completions.create(**ask, extra_body={"ignore_eos": True})
    text = free.choices[0].text
    cut = await client.completions.create(**ask, stop=text[4:6], extra_body={"ignore_eos": True})
    used = cut.usage
    assert cut.choices[0].text == text[: text.index(text[4:6])]
    assert used.completion_tokens < 12
    assert used.cost_nano == -(
        -(used.prompt_tokens * 10**8 + used.completion_tokens * 3 * 10**8) // 10**6
    )


async def test_neutral_parameters_of_load_clients_change_nothing(market, connect, model_id):
    client = await connect(market)
    ask = {"model": model_id, "prompt": "def f", "max_tokens": 10, "seed": 3}
    plain = await client.completions.create(**ask)
    neutral = await client.completions.create(
        **ask, n=1, presence_penalty=0, logprobs=None, user="u",
        extra_body={"repetition_penalty": 1.0, "top_k": -1, "min_p": 0},
    )  # fmt: skip
    assert plain.choices[0].text == neutral.choices[0].text


async def test_models_are_listed_with_prices(market, connect, model_id):
    client = await connect(market)
    (listed,) = (await client.models.list()).data
    assert (listed.id, listed.object) == (model_id, "model")
    assert listed.ask_input_nano_per_mtok == 10**8
    assert not hasattr(listed, "model_card")
    one = await client.models.retrieve(model_id)
    assert (one.context_length, one.licence, one.revision) == (2048, "PSF-2.0", "1")
    assert one.model_card == (MODEL_DIRECTORY / "README.md").read_text()
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing/here")


async def test_health_and_metrics(market, connect, model_id):
    client = await connect(market)
    await client.completions.create(model=model_id, prompt="x", max_tokens=3)
    base = market.base_url.removesuffix("/v1")
    async with httpx.AsyncClient() as http:
        health = (await http.get(f"{base}/healthz")).json()
        metrics = (await http.get(f"{base}/metrics")).text
    assert health["ready"]
    assert 'trueweight_router_requests_total{status="200"}' in metrics
    assert "trueweight_router_charged_nanocredits_total" in metrics


async def test_200_requests_at_once_are_all_answered_and_billed_once(
    start_market, connect, name, model_id
):
    async with start_market(NodeSpec("a", capacity=16), NodeSpec("b", capacity=16)) as market:
        client = await connect(market)
        answers = await asyncio.gather(
            *(
                client.completions.create(model=model_id, prompt=f"def f{i}", max_tokens=4)
                for i in range(200)
            )
        )
        assert sum(a.usage.cost_nano for a in answers) == int(
            (await market.balance(f"client:{name}")).debits_posted_nano
        )
        assert await market.held_nano(name) == 0
        assert all(r.in_flight == 0 for r in market.router.fleet.all())
        assert await market.router.journal.pending() == []


async def test_concurrent_requests_cannot_overdraw(start_market, connect, name, model_id):
    # 0.9 credits for a thousand tokens.
    slow = NodeSpec("slow", ask_input=0, ask_output=9 * 10**11, speed=Speed(500.0))
    async with start_market(slow) as market:
        client = await connect(market, credits=3)
        # Only three holds fit into the balance.
        calls = [
            client.completions.create(
                model=model_id, prompt="def f", max_tokens=1000, extra_body={"ignore_eos": True}
            )
            for _ in range(10)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [r for r in results if isinstance(r, openai.APIStatusError)]
        assert {r.status_code for r in refused} == {402}
        assert 1 <= len(results) - len(refused) <= 3
        balance = await market.balance(f"client:{name}")
        assert int(balance.available_nano) >= 0
        assert await market.held_nano(name) == 0


async def test_a_disconnect_mid_stream_is_billed_for_what_was_delivered(
    start_market, connect, name, model_id
):
    async with start_market(NodeSpec("slow", speed=Speed(50.0))) as market:
        client = await connect(market)
        stream = await client.completions.create(
            model=model_id, prompt="def f", max_tokens=500, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for _ in stream:
            break
        await stream.close()

        async def settled():
            return await market.held_nano(name) == 0 and not market.router.front._runs

        await until(settled)
        charged = int((await market.balance(f"client:{name}")).debits_posted_nano)
        assert 0 < charged < 100 * 300 + 1000
        assert all(r.in_flight == 0 for r in market.router.fleet.all())
        (node,) = market.nodes.values()

        async def engine_idle():
            return node._engine.load().running == 0

        await until(engine_idle)


async def test_a_disconnect_without_streaming_ends_the_work(start_market, connect, name, model_id):
    async with start_market(NodeSpec("slow", speed=Speed(20.0))) as market:
        client = await connect(market)
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=1.0).completions.create(
                model=model_id, prompt="def f", max_tokens=500, extra_body={"ignore_eos": True}
            )

        async def settled():
            return await market.held_nano(name) == 0 and not market.router.front._runs

        await until(settled)
        charged = int((await market.balance(f"client:{name}")).debits_posted_nano)
        assert charged < 50 * 300 + 1000


async def test_receipt_is_complete_only_for_its_owner_and_erasable(market, connect, model_id):
    client, other = await connect(market), await connect(market, "stranger")
    raw = await client.chat.completions.with_raw_response.create(
        model=model_id, messages=user("my secret words"), max_tokens=5
    )
    receipt_id = raw.headers["x-trueweight-receipt"]
    receipt = await read_receipt(market, client, receipt_id)

    async def proven():
        return "inclusion" in await read_receipt(market, client, receipt_id)

    await until(proven)
    bundle = parse_bundle(json.dumps(receipt))
    assert "my secret words" in market.router.catalog.get(model_id).tokenizer.decode(
        bundle.prompt_token_ids
    )
    assert receipt["state"] == "captured"
    url = f"{market.base_url}/receipts/{receipt_id}"
    mine = {"Authorization": f"Bearer {client.api_key}"}
    async with httpx.AsyncClient() as http:
        stranger = {"Authorization": f"Bearer {other.api_key}"}
        assert (await http.get(url, headers=stranger)).status_code == 404
        assert (await http.delete(f"{url}/transcript", headers=stranger)).status_code == 404
        assert (await http.get(url)).status_code == 401
        assert (await http.delete(f"{url}/transcript", headers=mine)).json() == {"erased": 1}
        after = (await http.get(url, headers=mine)).json()
        assert (await http.get(f"{market.base_url}/receipts/xyz", headers=mine)).status_code == 400
    assert after["erased"] is True
    assert "salt" not in after
    assert "prompt_token_ids" not in after
    assert after["bill"] == receipt["bill"]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_structured_output_keeps_its_schema_and_is_what_was_signed(market, connect, model_id):
    client = await connect(market)
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(4):
        answer = await client.chat.completions.create(
            model=model_id, messages=user("who?"), seed=seed, max_tokens=80, response_format=wanted
        )
        assert answer.choices[0].finish_reason == "stop"
        assert sorted(json.loads(answer.choices[0].message.content)) == ["age", "name"]
    bundle = parse_bundle(json.dumps(await read_receipt(market, client, answer.id)))
    (envelope,) = bundle.assignments
    assignment = parse_payload(parse_envelope(envelope), Assignment)
    source = source_of("json_schema", PERSON)
    assert assignment.sampling.grammar.source_sha256 == digest_of_source(source)
    choice = await client.chat.completions.create(
        model=model_id,
        messages=user("?"),
        max_tokens=9,
        extra_body={"structured_outputs": {"choice": ["maybe", "never"]}},
    )
    assert choice.choices[0].message.content in ("maybe", "never")


async def test_a_grammar_that_no_node_compiles_is_the_clients_fault_and_free(
    market, connect, name, model_id
):
    client = await connect(market)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model=model_id,
            messages=user("?"),
            max_tokens=9,
            extra_body={"structured_outputs": {"regex": "(a"}},
        )
    assert refused.value.param == "response_format"
    assert await market.held_nano(name) == 0
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model=model_id,
            messages=user("?"),
            response_format={"type": "json_object"},
            extra_body={"ignore_eos": True},
        )

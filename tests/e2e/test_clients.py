"""Clients nobody here wrote, against a market of separate processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter

import httpx
import openai
import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = "tw-demo"
LOAD_REQUESTS = 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kit(run_market, node_plan, tmp_path_factory):
    nodes = (node_plan("dear", "0.30", "0.90"), node_plan("cheap"))
    clients = ("alice:5", "bob:5", "poor:0.002", "load:5")
    async with run_market(tmp_path_factory.mktemp("clients") / "m", nodes, clients) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client(kit):
    made = openai.AsyncOpenAI(base_url=kit.url, api_key=kit.key("alice"), max_retries=0)
    yield made
    await made.close()


def user(text):
    return [{"role": "user", "content": text}]


async def test_models(kit, client):
    models = (await client.models.list()).data
    assert [m.id for m in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).object == "model"


async def test_chat_is_billed_as_its_usage_says(kit, client):
    before = await kit.available("alice")
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hello"), max_tokens=24, seed=3
    )
    answer = raw.parse()
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 24
    await kit.no_open_holds("alice")
    assert before - await kit.available("alice") == answer.usage.cost_nano > 0
    bills = [
        b
        for b in (await kit.refresh()).bills
        if b.request_id.hex() == raw.headers["x-trueweight-receipt"]
    ]
    assert len(bills) == 1
    assert bills[0].charge_nano == answer.usage.cost_nano


async def test_streams_say_the_same_as_whole_answers(kit, client):
    ask = {"model": MODEL, "prompt": "def read(path):", "max_tokens": 40, "seed": 11}
    whole = await client.completions.create(**ask)
    stream = await client.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_stop_strings_end_the_text_and_the_bill(kit, client):
    ask = {"model": MODEL, "messages": user("again"), "max_tokens": 60, "seed": 5}
    whole = await client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = await client.chat.completions.create(**ask, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens <= whole.usage.completion_tokens


async def test_errors_are_openai_errors(kit, client):
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gpt-9", messages=user("x"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=10**7)
    stranger = openai.AsyncOpenAI(base_url=kit.url, api_key="tw-nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await stranger.chat.completions.create(model=MODEL, messages=user("x"))
    await stranger.close()
    assert await kit.open_holds("alice") == []


async def test_concurrent_requests_cannot_overrun_a_balance(kit):
    """0.002 credits pay for one request of 1,900 tokens at 0.90 a million, not for two at once."""
    poor = openai.AsyncOpenAI(base_url=kit.url, api_key=kit.key("poor"), max_retries=0)
    ask = {"model": MODEL, "messages": user("x"), "max_tokens": 1900}
    answers = await asyncio.gather(
        *(poor.chat.completions.create(**ask) for _ in range(6)), return_exceptions=True
    )
    refused = [a for a in answers if isinstance(a, openai.APIStatusError)]
    assert len(refused) >= 3
    assert {r.status_code for r in refused} == {402}
    assert {r.code for r in refused} == {"insufficient_funds"}
    answered = [a for a in answers if not isinstance(a, Exception)]
    await poor.close()
    await kit.no_open_holds("poor")
    spent = sum(a.usage.cost_nano for a in answered)
    assert await kit.available("poor") == 2_000_000 - spent


async def test_a_receipt_is_checked_offline(kit, client, command, tmp_path):
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("prove it"), max_tokens=16
    )
    receipt_id = raw.headers["x-trueweight-receipt"]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {kit.key('alice')}"}) as http:
        for _ in range(50):
            bundle = (await http.get(f"{kit.url}/receipts/{receipt_id}")).json()
            if bundle.get("inclusion"):
                break
            await asyncio.sleep(0.1)
        # Nobody else may read it.
        other = {"Authorization": f"Bearer {kit.key('bob')}"}
        assert (
            await http.get(f"{kit.url}/receipts/{receipt_id}", headers=other)
        ).status_code == 404
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(bundle))
    arguments = ("receipt", "verify", str(path), "--market", str(kit.market.market_file))
    good = await asyncio.to_thread(command, *arguments)
    assert good.returncode == 0, good.stderr
    bundle["output_token_ids"][0][0] ^= 1
    path.write_text(json.dumps(bundle))
    assert (await asyncio.to_thread(command, *arguments)).returncode != 0


async def test_vllm_bench_serve_loses_nothing_and_is_billed_once_each(kit, python, tmp_path):
    before = await kit.available("load")
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    tokenizer = str(kit.market.model_directory)
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", code, "--backend", "openai", "--base-url", kit.url.removesuffix("/v1")),
        *("--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "12"),
        *("--num-prompts", f"{LOAD_REQUESTS}", "--max-concurrency", "64", "--ignore-eos"),
        *("--ready-check-timeout-sec", "0", "--num-warmups", "0", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "load.json"),
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "OPENAI_API_KEY": kit.key("load"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 0, out.decode()[-3000:]
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["completed"] == LOAD_REQUESTS
    await kit.no_open_holds("load")
    transfers = await kit.transfers("load")
    captures = [t for t in transfers if t.reason == "capture"]
    assert len(captures) == LOAD_REQUESTS
    bill_of = {b.hold_id: b for b in (await kit.refresh()).bills}
    mine = [bill_of[t.pending_id] for t in captures]
    assert max(Counter(b.request_id for b in mine).values()) == 1
    assert before - await kit.available("load") == sum(b.charge_nano for b in mine)
    assert sum(leg.billed_output_tokens for b in mine for leg in b.legs) == 12 * LOAD_REQUESTS


async def test_everything_is_audited_nobody_is_convicted_and_the_books_balance(kit):
    observer = await kit.all_audited(within_s=120)
    assert observer.convicted == set()
    assert (await kit.fsck())["transfers"] > 400


async def test_no_log_of_any_role_holds_a_key_or_a_prompt(kit):
    logs = "".join(p.read_text() for p in kit.market.supervisor.log_directory.glob("*.log"))
    assert "session with node" in logs
    # The secret part may hold "-" itself: PREFIX-ID-SECRET.
    secrets = [key.split("-", 2)[2] for key in kit.market.api_keys.values()]
    assert all(len(secret) >= 43 for secret in secrets)
    for secret in (*secrets, "prove it", "def read(path)", "PRIVATE KEY"):
        assert secret not in logs

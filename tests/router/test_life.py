"""Nodes that die, lie, stall or are convicted; routers that restart; verifiers that look."""

from __future__ import annotations

import asyncio
import json
import os

import openai
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from trueweight.node import call_runner
from trueweight.node.receipts import build_receipt
from trueweight.node.synthetic import Speed
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.errors import NotFound, OverCapacity, PermissionDenied, TrueweightError
from trueweight.protos.receipt_bundle import parse_bundle
from trueweight.protos.transcript_box import WrappedKey, open_data, unwrap_key
from trueweight.protos.v1.audit_pb2 import AuditRequest, Conviction, Transcript, Verdict
from trueweight.protos.v1.market_pb2 import Suspension
from trueweight.protos.v1.model_pb2 import RegistryEntry
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest
from trueweight.protos.v1.router_pb2_grpc import RouterStub
from trueweight.router.journal import CAPTURED
from trueweight.router.lifecycle import Timing
from trueweight.runtime import rpc
from trueweight.simulation.inprocess import MODEL_ID, NodeSpec
from trueweight.simulation.ledger_world import make_signer

LONG = {"prompt": "def f", "max_tokens": 120, "seed": 9, "extra_body": {"ignore_eos": True}}
SLOW = Speed(decode_tokens_per_s=60.0)
CHEAP, DEAR = 10_000_000, 400_000_000


async def until(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def no_hold_left(market, name):
    await until(lambda: not market.router.front._runs)
    assert await market.held_nano(name) == 0
    assert all(r.in_flight == 0 for r in market.router.fleet.all())


def node_of(market, node_id):
    return next(n for n, app in market.nodes.items() if app.node_id == node_id)


async def receipt(market, answer_id, name):
    request_id = bytes.fromhex(answer_id.rpartition("-")[2])
    return await market.router.front.receipts.read(request_id, f"client:{name}")


async def test_a_name_is_sold_and_withdrawn_from_its_leaf_on(start_market, connect, model_id):
    async with start_market(NodeSpec("a", speed=SLOW)) as market:
        client = await connect(market)
        running = asyncio.create_task(client.completions.create(model=model_id, **LONG))
        await until(lambda: any(r.in_flight for r in market.router.fleet.all()))
        sold = market.router.catalog.get(model_id)
        page = await market.port("admin").read_log(sold.log_index, 1)
        entry = RegistryEntry.FromString(parse_envelope(page.entries[0].body).payload)
        entry.revoked = True
        stranger = market.signer("publisher")
        with pytest.raises(PermissionDenied):
            await market.port("publisher").publish(seal(entry, stranger))
        await market.port("market").publish(seal(entry, market.signer("market")))
        await until(lambda: not market.router.catalog.all())
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model=model_id, **LONG)
        # Work that was under way is finished and paid.
        assert (await running).usage.completion_tokens == 120
        await market.register_model()
        await until(lambda: bool(market.router.catalog.all()))
        assert market.router.catalog.get(model_id).log_index > sold.log_index


async def test_a_node_lost_mid_stream_is_continued_elsewhere_with_the_same_text(
    start_market, connect, name, model_id
):
    async with start_market(NodeSpec("a", speed=SLOW), NodeSpec("b", speed=SLOW)) as market:
        client = await connect(market)
        whole = await client.completions.create(model=model_id, **LONG)
        before = int((await market.balance(f"client:{name}")).debits_posted_nano)
        stream = await client.completions.create(
            model=model_id, **LONG, stream=True, stream_options={"include_usage": True}
        )
        text, killed, used = "", None, None
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            used = chunk.usage or used
            if killed is None and len(text) > 20:
                busy = [r for r in market.router.fleet.all() if r.in_flight]
                killed = node_of(market, busy[0].node_id)
                await market.nodes.pop(killed).close()
        # Honest nodes with the same logits: position and seed make the rest the same.
        assert text == whole.choices[0].text
        assert used.completion_tokens == 120
        charged = int((await market.balance(f"client:{name}")).debits_posted_nano) - before
        assert charged == used.cost_nano < whole.usage.cost_nano
        found = await receipt(market, chunk.id, name)
        bundle = parse_bundle(json.dumps(found))
        # One bill with the surviving leg; what the dead one sent is its prefix, and free.
        (prefix,), (output,) = bundle.prefix_token_ids, bundle.output_token_ids
        assert len(prefix) + len(output) == 120
        assert len(prefix) > 0
        assert charged == -(-(used.prompt_tokens * 10**8 + len(output) * 3 * 10**8) // 10**6)
        await no_hold_left(market, name)


async def test_the_only_node_lost_mid_stream_is_a_clear_error_and_free(
    start_market, connect, name, model_id
):
    async with start_market(NodeSpec("a", speed=SLOW)) as market:
        client = await connect(market)
        stream = await client.completions.create(model=model_id, **LONG, stream=True)
        with pytest.raises(openai.APIError, match="lost in the middle"):
            async for chunk in stream:
                if market.nodes and chunk.choices:
                    await market.nodes.pop("a").close()
        await no_hold_left(market, name)
        assert int((await market.balance(f"client:{name}")).debits_posted_nano) == 0


async def test_before_the_first_token_another_node_is_tried(
    start_market, connect, name, model_id, monkeypatch
):
    async with start_market(NodeSpec("a"), NodeSpec("b"), NodeSpec("c")) as market:
        client = await connect(market)
        for spec in ("a", "b"):
            # Their engines fail on every request.
            def broken(job):
                raise RuntimeError("no engine")

            monkeypatch.setattr(market.nodes[spec]._engine, "generate", broken)
        answer = await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        found = await receipt(market, answer.id, name)
        assert [node_of(market, n) for n in found["nodes"]] == ["c"]
        await no_hold_left(market, name)


async def test_after_three_failures_the_request_ends_and_is_free(
    start_market, connect, name, model_id, monkeypatch
):
    async with start_market(*(NodeSpec(n) for n in "abcd")) as market:
        client = await connect(market)
        calls = []
        for app in market.nodes.values():

            def broken(job):
                calls.append(job)
                raise RuntimeError("no engine")

            monkeypatch.setattr(app._engine, "generate", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"]
        assert "not charged" in str(caught.value)
        assert len(calls) == 3
        await no_hold_left(market, name)
        assert int((await market.balance(f"client:{name}")).debits_posted_nano) == 0


async def test_a_failing_node_is_left_alone_for_a_while(
    start_market, connect, name, model_id, monkeypatch
):
    async with start_market(
        NodeSpec("bad", ask_input=CHEAP, ask_output=CHEAP), NodeSpec("good")
    ) as (market):
        client = await connect(market)
        calls = []

        def broken(job):
            calls.append(job)
            raise RuntimeError("no engine")

        monkeypatch.setattr(market.nodes["bad"]._engine, "generate", broken)
        for _ in range(12):
            await client.completions.create(model=model_id, prompt="x", max_tokens=2)
        assert len(calls) <= 4
        await no_hold_left(market, name)


LIES = {
    "over-reports": lambda kw: {**kw, "output": (*kw["output"], 5)},
    "under-reports": lambda kw: {**kw, "output": kw["output"][:-1]},
    "other tokens": lambda kw: {**kw, "output": (*kw["output"][:-1], 7)},
    "inflates the prompt": lambda kw: {**kw, "prompt_tokens": kw["prompt_tokens"] + 1000},
    "another assignment": lambda kw: {**kw, "assignment_digest": b"x" * 32},
    "another node": lambda kw: {**kw, "node_id": "somebodyelse"},
}


@pytest.mark.parametrize("lie", LIES)
async def test_attack_lying_receipts_are_not_paid(start_market, connect, name, monkeypatch, lie):
    async with start_market() as market:
        client = await connect(market)
        monkeypatch.setattr(
            call_runner, "build_receipt", lambda **kw: build_receipt(**LIES[lie](kw))
        )
        for stream in (False, True):
            with pytest.raises(openai.APIError):
                answer = await client.completions.create(
                    model=MODEL_ID, prompt="x", max_tokens=9, stream=stream
                )
                [chunk async for chunk in answer]
        await no_hold_left(market, name)
        assert int((await market.balance(f"client:{name}")).debits_posted_nano) == 0


async def test_attack_a_liars_tokens_are_thrown_away_and_another_node_answers(
    start_market, connect, name, model_id, monkeypatch
):
    async with start_market(NodeSpec("liar"), NodeSpec("honest")) as market:
        client = await connect(market)
        ask = {"model": model_id, "prompt": "def f", "max_tokens": 9, "seed": 4}
        true = await client.completions.create(**ask)
        liar = market.nodes["liar"].node_id

        def lie(**kw):
            wrong = LIES["over-reports"](kw) if kw["node_id"] == liar else kw
            return build_receipt(**wrong)

        monkeypatch.setattr(call_runner, "build_receipt", lie)
        for _ in range(4):
            answer = await client.completions.create(**ask)
            assert answer.choices[0].text == true.choices[0].text
            assert answer.usage.cost_nano == true.usage.cost_nano
            found = await receipt(market, answer.id, name)
            assert [node_of(market, n) for n in found["nodes"]] == ["honest"]
        await no_hold_left(market, name)


async def test_a_stalled_node_is_given_up(start_market, connect, name, model_id, monkeypatch):
    async with start_market(NodeSpec("a")) as market:
        client = await connect(market)

        async def stalled(job):
            await asyncio.sleep(60)
            yield

        monkeypatch.setattr(market.nodes["a"]._engine, "generate", stalled)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        assert "did not answer in time" in str(caught.value)
        await no_hold_left(market, name)


async def test_a_full_market_lets_requests_wait_for_a_place(start_market, connect, name, model_id):
    async with start_market(NodeSpec("a", capacity=1, speed=Speed(300.0))) as market:
        client = await connect(market)
        answers = await asyncio.gather(
            *(
                client.completions.create(model=model_id, prompt="x", max_tokens=8)
                for _ in range(12)
            )
        )
        assert len(answers) == 12
        await no_hold_left(market, name)


async def test_a_node_behind_nat_attaches_and_works(start_market, connect, name, model_id):
    async with start_market(NodeSpec("nat", attach=True)) as market:
        client = await connect(market)
        answer = await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        assert answer.usage.completion_tokens > 0
        (record,) = market.router.fleet.all()
        await market.nodes.pop("nat").close()
        await until(lambda: record.session is None)
        await no_hold_left(market, name)


async def test_synthetic_engines_get_no_work_unless_allowed(start_market, connect, model_id):
    async with start_market(allow_synthetic=False) as market:
        client = await connect(market)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        assert caught.value.status_code == 503
        registrar = market.nodes["n0"].registrar
        await until(lambda: registrar.registered > 0)
        assert not registrar.eligible


async def test_only_bonded_nodes_get_work(start_market, connect, name, model_id):
    poor, rich = (
        NodeSpec("poor", ask_input=CHEAP, ask_output=CHEAP),
        NodeSpec("rich", bond_credits=5),
    )
    async with start_market(poor, rich, min_bond_nano=5 * 10**9) as market:
        client = await connect(market)
        await market.router.refresh_stakes()
        for _ in range(5):
            answer = await client.completions.create(model=model_id, prompt="x", max_tokens=2)
            found = await receipt(market, answer.id, name)
            assert [node_of(market, n) for n in found["nodes"]] == ["rich"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_router_that_goes_away_charges_for_what_it_gave_only(
    start_market, connect, name, stream
):
    async with start_market(NodeSpec("slow", speed=Speed(decode_tokens_per_s=50))) as market:
        client = await connect(market)

        async def ask():
            answer = await client.completions.create(
                model=MODEL_ID, prompt="def f", max_tokens=400, stream=stream,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return [chunk async for chunk in answer]

        asked = asyncio.ensure_future(ask())
        await until(lambda: market.router.front._runs)
        (run,) = market.router.front._runs.values()
        await until(lambda: len(run.answer.output) > 20)
        await market.router.close(drain_ms=0)
        with pytest.raises(openai.APIError):
            await asked
        account = await market.balance(f"client:{name}")
        assert not int(account.debits_pending_nano)
        assert (int(account.debits_posted_nano) > 0) == stream


async def test_a_router_that_goes_away_hands_out_what_it_has_billed(
    start_market, connect, name, monkeypatch
):
    """An answer that waits for its capture only is complete: it is paid and given."""
    async with start_market() as market:
        client, settler = await connect(market), market.router.settler
        capturing, go_on = asyncio.Event(), asyncio.Event()
        capture = settler.capture

        async def slow(operation, wait_ms):
            capturing.set()
            await go_on.wait()
            await capture(operation, wait_ms)

        monkeypatch.setattr(settler, "capture", slow)
        asked = asyncio.ensure_future(
            client.completions.create(model=MODEL_ID, prompt="def f", max_tokens=4)
        )
        await asyncio.wait_for(capturing.wait(), 5)
        closing = asyncio.ensure_future(market.router.close(drain_ms=0))
        await asyncio.sleep(0.1)
        go_on.set()
        answer = await asked
        await closing
        assert answer.usage.completion_tokens == 4
        account = await market.balance(f"client:{name}")
        assert int(account.debits_posted_nano) == answer.usage.cost_nano > 0


async def test_a_ledger_that_is_full_gets_no_voids_of_holds_that_never_were(
    start_market, connect, monkeypatch
):
    async with start_market() as market:
        client = await connect(market)
        ledger, sent = market.router.front._services.ledger, []

        async def full(operations):
            sent.extend(operation.WhichOneof("body") for operation in operations)
            raise OverCapacity("the ledger's queue is full")

        monkeypatch.setattr(ledger, "apply", full)
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model=MODEL_ID, prompt="x", max_tokens=4)
        assert sent == ["hold"]
        monkeypatch.undo()


async def test_a_leaf_that_meets_a_bug_does_not_make_the_router_deaf(start_market, monkeypatch):
    async with start_market(NodeSpec("a")) as market:
        met = []

        def buggy(event):
            met.append(event)
            raise RuntimeError("a bug")

        monkeypatch.setattr(market.router._feed._keys, "learn", buggy)
        newcomer = make_signer("newcomer", market.market.market_id)
        await market.port("market").publish(newcomer.key_event)
        node, verifier = market.nodes["a"].node_id, market.signer("verifier")
        suspension = Suspension(
            market_id=market.market.market_id, node_id=node, issuer=verifier.identity, reason="x"
        )
        await market.port("verifier").publish(seal(suspension, verifier))
        await until(lambda: market.router.fleet.is_suspended(node))
        assert met == [newcomer.key_event]


async def test_suspended_and_convicted_nodes_get_no_work_at_once(
    start_market, connect, name, model_id
):
    async with start_market(NodeSpec("a"), NodeSpec("b")) as market:
        client = await connect(market)
        a, b = market.nodes["a"].node_id, market.nodes["b"].node_id
        verifier = market.signer("verifier")
        suspension = Suspension(
            market_id=market.market.market_id, node_id=a, issuer=verifier.identity, reason="test"
        )
        await market.port("verifier").publish(seal(suspension, verifier))
        await until(lambda: market.router.fleet.is_suspended(a))
        for _ in range(5):
            answer = await client.completions.create(model=model_id, prompt="x", max_tokens=2)
            assert (await receipt(market, answer.id, name))["nodes"] == [b]
        conviction = Conviction(
            market_id=market.market.market_id, node_id=b, verifier_id=verifier.identity
        )
        await market.port("verifier").publish(seal(conviction, verifier))
        await until(lambda: market.router.fleet.is_suspended(b))
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model=model_id, prompt="x", max_tokens=2)
        assert caught.value.status_code == 503
        suspension.lifted = True
        await market.port("verifier").publish(seal(suspension, verifier))
        await until(lambda: not market.router.fleet.is_suspended(a))
        await client.completions.create(model=model_id, prompt="x", max_tokens=2)
        # A restarted router learns it from the log before it serves.
        await market.router.close(drain_ms=0)
        await market.start_router()
        assert market.router.fleet.is_suspended(b)
        assert not market.router.fleet.is_suspended(a)


async def test_refunded_audits_make_a_node_dearer(start_market):
    async with start_market() as market:
        node_id, verifier = market.nodes["n0"].node_id, market.signer("verifier")
        digest = market.router.catalog.all()[0].manifest_digest
        for outcome, low, high in ((Verdict.REFUND, 0.5, 0.95), (Verdict.SCORED, 0.9, 0.999)):
            verdict = Verdict(
                market_id=market.market.market_id,
                verifier_id=verifier.identity,
                node_id=node_id,
                receipt_digest=bytes([outcome]) * 32,
                outcome=outcome,
            )
            await market.port("verifier").publish(seal(verdict, verifier))

            def noted(low=low, high=high):
                return low < market.router.fleet.views(digest)[0].verified < high

            await until(noted)
        # Nobody else's word counts.
        verdict.epoch = 7
        with pytest.raises(TrueweightError):
            await market.port("router").publish(seal(verdict, market.signer("router")))


async def test_a_node_that_comes_back_at_its_address_is_dialled_again(
    start_market, connect, name, model_id
):
    async with start_market() as market:
        client = await connect(market)
        app = market.nodes.pop("n0")
        endpoint, spec = app.endpoint, NodeSpec("n0", listen=app.endpoint)
        await app.close()
        (record,) = market.router.fleet.all()
        await until(lambda: record.session is None)
        await market.add_node(spec)
        await until(lambda: record.session is not None and record.session.is_open)
        assert market.nodes["n0"].endpoint == endpoint
        answer = await client.completions.create(model=model_id, prompt="x", max_tokens=2)
        assert (await receipt(market, answer.id, name))["nodes"] == [record.node_id]


async def test_a_router_killed_between_journal_and_capture_captures_after_restart(
    start_market, connect, name, model_id, monkeypatch
):
    async with start_market() as market:
        client = await connect(market)

        async def unplugged(operation, until_unix_ms):
            await asyncio.sleep(3600)

        monkeypatch.setattr(market.router.settler, "_apply", unplugged)
        answer = await client.completions.create(model=model_id, prompt="x", max_tokens=5)
        assert await market.held_nano(name) > 0
        assert int((await market.balance(f"client:{name}")).debits_posted_nano) == 0
        found = await receipt(market, answer.id, name)
        assert found["state"] == "pending"
        await market.router.close(drain_ms=0)
        await market.start_router()
        request_id = bytes.fromhex(found["request_id"])

        async with asyncio.timeout(10):
            while (await market.router.journal.find(request_id))[1] != CAPTURED:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await market.held_nano(name) == 0
        charged = int((await market.balance(f"client:{name}")).debits_posted_nano)
        assert charged == answer.usage.cost_nano == found["charge_nano"]


async def test_a_hold_without_receipt_at_a_crash_expires(start_market, connect, name, model_id):
    timing = Timing(request_ms=2_000, hold_grace_ms=500)
    async with start_market(NodeSpec("a", speed=Speed(10.0)), timing=timing) as market:
        client = await connect(market)
        asking = asyncio.create_task(client.completions.create(model=model_id, **LONG))
        await until(lambda: any(r.in_flight for r in market.router.fleet.all()))
        # As kill -9 would: the request's task dies without a word.
        for task in list(market.router.front._runs):
            task.cancel()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await market.held_nano(name) > 0
        async with asyncio.timeout(15):
            while await market.held_nano(name):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


def open_transcript(market, envelope, index):
    tokens = rpc.AccessTokens(market.signer("verifier"), market.market.market_id, market.clock,
                              os.urandom)  # fmt: skip
    member = market.router_member()
    channel = rpc.make_channel(member.endpoint, member.tls_certificate_pem)
    return rpc.call(
        RouterStub(channel).OpenTranscript,
        OpenTranscriptRequest(audit_request=envelope, log_index=index),
        timeout_ms=5_000,
        metadata=tokens.metadata(member.identity),
    )


async def test_a_transcript_opens_only_to_the_verifier_of_a_logged_request(
    start_market, connect, name, model_id
):
    async with start_market() as market:
        client = await connect(market)
        answer = await client.completions.create(model=model_id, prompt="def f", max_tokens=5)
        found = await receipt(market, answer.id, name)
        bundle = parse_bundle(json.dumps(found))
        digest = digest_of(bundle.receipts[0])
        verifier, private = market.signer("verifier"), X25519PrivateKey.generate()
        request = AuditRequest(
            market_id=market.market.market_id,
            verifier_id=verifier.identity,
            receipt_digest=digest,
            assignment_digest=digest_of(bundle.assignments[0]),
            wrap_public_key=private.public_key().public_bytes_raw(),
        )
        envelope = seal(request, verifier)
        with pytest.raises(PermissionDenied, match="not in the log"):
            await open_transcript(market, envelope, 0)
        index = await market.port("verifier").publish(envelope)
        opened = await open_transcript(market, envelope, index)
        key = unwrap_key(
            WrappedKey(opened.ephemeral_public_key, opened.wrapped_key), private, digest
        )
        transcript = Transcript.FromString(open_data(key, opened.nonce, opened.ciphertext, digest))
        assert tuple(transcript.prompt_token_ids) == bundle.prompt_token_ids
        assert tuple(transcript.output_token_ids) == bundle.output_token_ids[0]
        assert transcript.delivered_tokens == answer.usage.completion_tokens
        # A node may not open anything, even with a request of its own in the right form.
        node = market.nodes["n0"].signer
        request.verifier_id = node.identity
        with pytest.raises(PermissionDenied):
            await open_transcript(market, seal(request, node), index)
        await market.router.front.receipts.erase(
            bytes.fromhex(found["request_id"]), f"client:{name}"
        )
        with pytest.raises(NotFound, match="erased"):
            await open_transcript(market, envelope, index)

"""Sessions over real gRPC and TLS, with the synthetic engine behind the real node."""

from __future__ import annotations

import asyncio
import contextlib
import os

import grpc.aio
import pytest

from trueweight.node import session
from trueweight.node.context import Timing
from trueweight.node.synthetic import Speed
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1 import market_pb2 as mp
from trueweight.protos.v1 import node_pb2 as pb
from trueweight.protos.v1.node_pb2_grpc import NodeStub

EOS = 2


async def reference(world, **job):
    from trueweight.node.engine import GenerateJob

    engine = world.engine()
    await engine.start()
    try:
        steps = engine.generate(
            GenerateJob(
                "x",
                job.get("prompt", (5, 6, 7)),
                job.get("prefix", ()),
                job.get("sampling", Sampling(stop_token_ids=(EOS,))),
                job.get("seed", 1234),
                job.get("max_tokens", 50),
            )
        )
        return [t async for step in steps for t in step.token_ids]
    finally:
        await engine.close()


async def test_32_concurrent_calls_give_the_canonical_tokens_and_valid_receipts(world):
    async with world.node() as app, world.session(app) as router:
        jobs = [{"seed": 100 + i, "prompt": (5, 6, 10 + i)} for i in range(32)]
        await router.run(*[router.dispatch(**job) for job in jobs])
        assert not router.rejected
        for call, job in enumerate(jobs, start=1):
            receipt = router.check(call)
            expected = await reference(world, **job)
            assert router.output[call] == expected
            ended = mp.EOS if expected[-1] == EOS else mp.LENGTH
            assert receipt.finish_reason == ended
            assert receipt.fingerprint.engine == "synthetic"
        tokens = sum(map(len, router.output.values()))
        assert router.frames < tokens / 3, "tokens of one step must share a frame"


async def test_offer_in_the_handshake_is_signed_and_names_what_is_served(world):
    from trueweight.node.describe import open_offer

    async with world.node() as app, world.session(app) as router:
        offer = open_offer(router.offer, world.market.market_id)
        assert (offer.node_id, offer.endpoint) == (app.node_id, app.endpoint)
        assert offer.models[0].manifest_digest == world.manifest_digest
        assert offer.fingerprint.engine == "synthetic"


async def test_stop_signs_exactly_k_even_if_the_engine_ran_past(world):
    sampling = Sampling()  # no stop ids: runs to max_tokens
    async with world.node() as app, world.session(app) as router:
        call = router.dispatch(sampling=sampling, max_tokens=400, window=30)
        await router.send(call)
        await router.until(lambda: len(router.output.get(1, [])) == 30)
        await router.send(stops=[pb.Stop(call=1, at=17)])
        await router.until(lambda: 1 in router.receipts)
        receipt = router.check(1, stop_at=17)
        assert (receipt.output_tokens, receipt.finish_reason) == (17, mp.STOPPED)


async def test_window_bounds_what_is_sent_until_it_grows(world):
    sampling = Sampling()
    async with world.node() as app, world.session(app) as router:
        await router.send(router.dispatch(sampling=sampling, max_tokens=60, window=10))
        await router.until(lambda: len(router.output.get(1, [])) == 10)
        await asyncio.sleep(0.2)
        assert len(router.output[1]) == 10
        assert not router.receipts
        await router.send(windows=[pb.Window(call=1, tokens=1000)])
        await router.until(lambda: 1 in router.receipts)
        assert router.check(1).output_tokens == 60


async def test_cancel_gives_a_partial_receipt_and_frees_the_engine(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=100))
    async with world.node(engine) as app, world.session(app) as router:
        await router.send(router.dispatch(sampling=Sampling(), max_tokens=400))
        await router.until(lambda: len(router.output.get(1, [])) >= 5)
        await router.send(cancels=[pb.Cancel(call=1)])
        await router.until(lambda: 1 in router.receipts)
        receipt = router.check(1, cancelled=True)
        assert receipt.finish_reason == mp.CANCELLED
        assert receipt.output_tokens == len(router.output[1]) < 400
        await asyncio.sleep(0.1)
        assert engine.load().running == 0


async def test_deadline_ends_the_call_with_a_receipt(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    async with world.node(engine) as app, world.session(app) as router:
        await router.run(router.dispatch(sampling=Sampling(), max_tokens=400, deadline_ms=300))
        receipt = router.check(1)
        assert receipt.finish_reason == mp.DEADLINE
        assert 5 <= receipt.output_tokens < 60


async def test_continuation_counts_the_prefix_as_output(world):
    sampling = Sampling()
    whole = await reference(world, sampling=sampling, max_tokens=40)
    async with world.node() as app, world.session(app) as router:
        rest = router.dispatch(sampling=sampling, prefix=tuple(whole[:15]), max_tokens=25)
        await router.run(rest)
        assert router.output[1] == whole[15:]
        router.check(1)


class BreakingEngine:
    """An engine that dies after a few tokens of each call."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def generate(self, job):
        made = 0
        async for step in self._inner.generate(job):
            yield step
            made += 1
            if made == 7:
                raise RuntimeError("broken")


async def test_engine_failure_gives_one_partial_receipt(world):
    engine = BreakingEngine(world.engine())
    async with world.node(engine) as app, world.session(app) as router:
        await router.run(router.dispatch(sampling=Sampling(), max_tokens=40))
        receipt = router.check(1)
        assert (receipt.finish_reason, receipt.output_tokens) == (mp.ENGINE_ERROR, 7)


async def test_lost_router_cancels_all_calls_and_keeps_claimable_receipts(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    path = world.root / "receipts.sqlite"
    async with world.node(engine, journal_path=path) as app:
        async with world.session(app) as router:
            calls = [router.dispatch(sampling=Sampling(), max_tokens=400) for _ in range(8)]
            await router.send(*calls)
            await router.until(lambda: len(router.output) == 8)
            router.stream.cancel()
            await router.until(lambda: router.ended)
        async with asyncio.timeout(10):
            while engine.load().running or engine.load().waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        from trueweight.node.journal import ReceiptJournal
        from trueweight.protos.envelope import open_envelope

        journal = ReceiptJournal(path)
        entries = journal.due(2**60)
        journal.close()
        assert len(entries) == 8
        for entry in entries:
            receipt = open_envelope(
                entry.receipt, mp.Receipt, router.ring, world.market.market_id, signer=app.node_id
            ).message
            assert receipt.finish_reason == mp.CANCELLED
            assert receipt.output_tokens >= 1


async def test_heartbeat_reports_load_every_second(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=20))
    async with world.node(engine) as app, world.session(app) as router:
        await router.send(router.dispatch(sampling=Sampling(), max_tokens=400))
        await router.until(lambda: len(router.loads) >= 3)
        assert router.loads[-1].running == 1
        gap = router.loads[-1].at_unix_ms - router.loads[-2].at_unix_ms
        assert 900 <= gap <= 1_500


async def test_drain_finishes_running_calls_refuses_new_ones_and_ends_the_session(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    async with world.node(engine) as app, world.session(app) as router:
        await router.send(router.dispatch(sampling=Sampling(), max_tokens=30))
        await router.until(lambda: 1 in router.output)
        draining = asyncio.create_task(app.drain())
        await router.until(lambda: router.draining)
        await router.run(router.dispatch())
        assert router.rejected[2] == "UNAVAILABLE"
        await router.until(lambda: 1 in router.receipts)
        assert router.check(1).output_tokens == 30
        await draining
        await router.until(lambda: router.ended)


async def test_over_capacity_is_refused_and_freed_places_are_reused(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=100))
    async with world.node(engine, capacity=2) as app, world.session(app) as router:
        calls = [router.dispatch(sampling=Sampling(), max_tokens=40) for _ in range(3)]
        await router.run(*calls)
        assert router.rejected == {3: "OVER_CAPACITY"}
        await router.run(router.dispatch(sampling=Sampling(), max_tokens=5))
        assert router.check(4).output_tokens == 5


async def test_capacity_counts_the_calls_of_all_sessions(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=100))
    async with world.node(engine, capacity=1) as app, world.session(app) as one:
        await one.send(one.dispatch(sampling=Sampling(), max_tokens=100))
        await one.until(lambda: 1 in one.output)
        async with world.session(app) as two:
            await two.run(two.dispatch())
            assert two.rejected == {1: "OVER_CAPACITY"}


async def test_attack_replayed_assignment_is_refused(world):
    async with world.node() as app:
        async with world.session(app) as router:
            first = router.dispatch(max_tokens=5)
            await router.run(first)
            again = pb.Dispatch()
            again.CopyFrom(first)
            again.call = 77
            await router.run(again)
            assert router.rejected == {77: "CONFLICT"}
        async with world.session(app) as later:
            await later.run(first)
            assert later.rejected == {1: "CONFLICT"}


async def test_attack_replay_after_a_restart_is_refused_by_the_journal(world):
    path = world.root / "receipts.sqlite"
    async with world.node(journal_path=path) as app, world.session(app) as router:
        first = router.dispatch(max_tokens=5)
        await router.run(first)
    async with world.node(journal_path=path) as app, world.session(app) as router:
        await router.run(first)
        assert router.rejected == {1: "CONFLICT"}


async def test_attack_assignment_signed_by_someone_else_is_refused(world):
    async with world.node() as app, world.session(app) as router:
        forged = router.dispatch(signer=world.signers["verifier"])
        stranger = router.dispatch(signer=world.signers["stranger"])
        await router.run(forged, stranger)
        assert router.rejected == {1: "BAD_SIGNATURE", 2: "BAD_SIGNATURE"}


async def test_attack_price_below_ask_is_refused(world):
    async with world.node() as app, world.session(app) as router:
        await router.run(
            router.dispatch(ask_input_nano_per_mtok=99_999_999),
            router.dispatch(ask_output_nano_per_mtok=0),
            router.dispatch(ask_output_nano_per_mtok=900_000_000, max_tokens=3),
        )
        assert router.rejected == {1: "CONFLICT", 2: "CONFLICT"}
        router.check(3)


@pytest.mark.parametrize("who", ["verifier", "stranger"])
async def test_attack_session_by_somebody_who_is_no_router_is_refused(world, who):
    async with world.node() as app, world.channel(app) as channel:
        from trueweight.runtime.handshake import make_proof

        stream = NodeStub(channel).Session()
        await stream.write(pb.RouterFrame(nonce=pb.SessionNonce(nonce=os.urandom(32))))
        first = await stream.read()
        proof = make_proof(
            world.signers[who], world.market.market_id, app.node_id, first.nonce.nonce
        )
        await stream.write(pb.RouterFrame(proof=proof))
        assert await final_code(stream) == grpc.StatusCode.PERMISSION_DENIED


async def test_attack_bad_proofs_end_the_session_unauthenticated(world):
    from trueweight.runtime.handshake import make_proof

    router = world.signers["router"]
    market_id = world.market.market_id

    def replayed(app, nonce):
        return make_proof(router, market_id, app.node_id, os.urandom(32))

    def for_another_node(app, nonce):
        return make_proof(router, market_id, world.signers["stranger"].identity, nonce)

    def garbage(app, nonce):
        return b"\x0a\xff" * 40

    async with world.node() as app, world.channel(app) as channel:
        for attack in (replayed, for_another_node, garbage):
            stream = NodeStub(channel).Session()
            await stream.write(pb.RouterFrame(nonce=pb.SessionNonce(nonce=os.urandom(32))))
            first = await stream.read()
            await stream.write(pb.RouterFrame(proof=attack(app, first.nonce.nonce)))
            assert await final_code(stream) == grpc.StatusCode.UNAUTHENTICATED


async def test_attack_a_frame_of_a_million_windows_ends_the_session(world, monkeypatch):
    monkeypatch.setattr(session, "_MAX_FRAME_ITEMS", 10)
    async with world.node() as app, world.session(app) as router:
        await router.stream.write(pb.RouterFrame(windows=[pb.Window()] * 11))
        await router.until(lambda: router.ended)


async def test_refusals_leave_while_a_frame_of_many_dispatches_is_read(world, monkeypatch):
    monkeypatch.setattr(session, "_DISPATCHES_AT_ONCE", 2)
    async with world.node() as app, world.session(app) as router:
        frame = pb.RouterFrame(dispatches=[pb.Dispatch(call=n) for n in range(100, 140)])
        await router.stream.write(frame)
        await router.until(lambda: len(router.rejected) == 40)


async def test_attack_work_before_the_proof_ends_the_session(world):
    async with world.node() as app, world.session(app) as honest:
        dispatch = honest.dispatch()
        async with world.channel(app) as channel:
            stream = NodeStub(channel).Session()
            nonce = pb.SessionNonce(nonce=os.urandom(32))
            await stream.write(pb.RouterFrame(nonce=nonce, dispatches=[dispatch]))
            assert await final_code(stream) == grpc.StatusCode.UNAUTHENTICATED


async def test_attack_silent_peer_is_dropped_after_the_handshake_time(world):
    timing = Timing(handshake_ms=300)
    async with world.node(timing=timing) as app, world.channel(app) as channel:
        stream = NodeStub(channel).Session()
        await stream.read()
        assert await final_code(stream) == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_attack_silent_strangers_cannot_keep_the_router_out(world, monkeypatch):
    from trueweight.node import service

    monkeypatch.setattr(service, "MAX_HANDSHAKES", 4)
    async with world.node() as app, world.channel(app) as channel:
        silent = [NodeStub(channel).Session() for _ in range(10)]
        for stream in silent:  # all are at the node before the router comes
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stream.read()
        codes = [asyncio.create_task(final_code(stream, 60)) for stream in silent]
        async with world.session(app) as router:
            await router.run(router.dispatch(max_tokens=3))
            router.check(1)
        await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
        ended = {task.result() for task in codes if task.done()}
        assert ended == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for task in codes:
            task.cancel()
        await asyncio.gather(*codes, return_exceptions=True)


async def test_attack_reused_call_number_ends_the_session_with_receipts_kept(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    async with world.node(engine) as app, world.session(app) as router:
        await router.send(router.dispatch(sampling=Sampling(), max_tokens=400))
        await router.until(lambda: 1 in router.output)
        await router.send(router.dispatch(tamper=lambda d: setattr(d, "call", 1)))
        await router.until(lambda: router.ended)
        assert await router.stream.code() == grpc.StatusCode.INVALID_ARGUMENT


async def final_code(stream, timeout_s=20):
    async with asyncio.timeout(timeout_s):
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await stream.code()


async def test_reports_of_captures_reach_the_journal_and_floods_end_the_session(world):
    path = world.root / "receipts.sqlite"
    async with world.node(journal_path=path) as app, world.session(app) as router:
        await router.run(router.dispatch(sampling=Sampling(), max_tokens=5))
        from trueweight.node.journal import ReceiptJournal

        journal = ReceiptJournal(path)
        (entry,) = journal.due(2**60)
        report = pb.Captured(assignment_digest=entry.assignment_digest, bill_id=b"b" * 16)
        await router.stream.write(pb.RouterFrame(captured=[report]))
        async with asyncio.timeout(10):
            while not journal.has_reports():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        journal.close()
        await router.stream.write(pb.RouterFrame(captured=[report] * 1025))
        await router.until(lambda: router.ended)

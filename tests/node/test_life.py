"""A node's whole life: broken engines, withdrawn weights, shutdown, bounded frames."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from trueweight.node import app as app_module
from trueweight.node import weights as weights_module
from trueweight.node.app import NodeApp, run_node
from trueweight.node.outbox import MAX_BACKLOG_ITEMS, MAX_FRAME_TOKENS, Outbox
from trueweight.node.synthetic import Speed
from trueweight.node.workload import Workload
from trueweight.protos.errors import EngineError, InvalidRequest, TrueweightError, WeightsRefused
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1 import market_pb2 as mp


class Wrapped:
    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


class DeadEngine(Wrapped):
    async def generate(self, job):
        raise EngineError("the engine's process is gone")
        yield


class PickyEngine(Wrapped):
    async def generate(self, job):
        raise InvalidRequest("not this one")
        yield


def life(world, engine, stop):
    """run_node as a task, and a future for the app once it is ready."""
    ready = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run_node(
            world.config(),
            engine,
            stop,
            ready.set_result,
            ledger=world.ledger,
            register=world.register,
        )
    )
    return task, ready


async def test_a_node_whose_engine_fails_every_call_ends_itself(world):
    task, ready = life(world, DeadEngine(world.engine()), asyncio.Event())
    app = await asyncio.wait_for(ready, 10)
    async with world.session(app) as router:
        for _ in range(3):
            await router.run(router.dispatch())
        for call in (1, 2, 3):
            receipt = router.check(call)
            assert (receipt.finish_reason, receipt.output_tokens) == (mp.ENGINE_ERROR, 0)
        await router.until(lambda: router.draining)
        with pytest.raises(EngineError, match="every call"):
            await asyncio.wait_for(task, 10)


async def test_attack_calls_that_the_engine_refuses_do_not_end_the_node(world):
    stop = asyncio.Event()
    task, ready = life(world, PickyEngine(world.engine()), stop)
    app = await asyncio.wait_for(ready, 10)
    async with world.session(app) as router:
        await router.run(*[router.dispatch() for _ in range(10)])
        assert len(router.rejected) == 10
        assert not router.receipts
        assert not router.draining
    stop.set()
    await asyncio.wait_for(task, 10)


async def test_withdrawn_weights_end_the_node(world, monkeypatch):
    monkeypatch.setattr(weights_module, "WATCH_MS", 50)
    task, ready = life(world, world.engine(), asyncio.Event())
    await asyncio.wait_for(ready, 10)
    await asyncio.sleep(0.2)
    assert not task.done()
    world.ledger.add("registry-entry", world.sign_registry(world.signers["stranger"], revoked=True))
    await asyncio.sleep(0.2)
    assert not task.done(), "only the market withdraws"
    world.ledger.add("registry-entry", world.sign_registry(revoked=True))
    with pytest.raises(WeightsRefused, match="withdrawn"):
        await asyncio.wait_for(task, 10)


async def test_a_bug_in_one_of_its_loops_ends_the_node(world, monkeypatch):
    async def buggy(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(app_module, "until_withdrawn", buggy)
    task, _ = life(world, world.engine(), asyncio.Event())
    with pytest.raises(TrueweightError, match="a bug ended the node's 'watch registry' loop"):
        await asyncio.wait_for(task, 10)


async def test_a_ledger_that_is_away_does_not_end_the_node(world, monkeypatch):
    monkeypatch.setattr(weights_module, "WATCH_MS", 20)
    stop = asyncio.Event()
    task, ready = life(world, world.engine(), stop)
    await asyncio.wait_for(ready, 10)
    world.ledger.down = True
    await asyncio.sleep(0.2)
    assert not task.done()
    stop.set()
    await asyncio.wait_for(task, 10)


async def test_stop_while_the_engine_starts_closes_it(world):
    class Slow(Wrapped):
        closed = False

        async def start(self):
            await asyncio.sleep(60)

        async def close(self):
            self.closed = True

    engine, stop = Slow(world.engine()), asyncio.Event()
    task, _ = life(world, engine, stop)
    await asyncio.sleep(0.2)
    stop.set()
    await asyncio.wait_for(task, 5)
    assert engine.closed


async def test_closing_without_time_to_drain_still_gives_receipts(world):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    async with world.node(engine) as app, world.session(app) as router:
        await router.send(*[router.dispatch(sampling=Sampling(), max_tokens=400) for _ in range(3)])
        await router.until(lambda: len(router.output) == 3)
        await app.close()
        await router.until(lambda: router.ended)
        for call in (1, 2, 3):
            receipt = router.check(call)
            assert receipt.finish_reason == mp.ENGINE_ERROR
            assert receipt.output_tokens == len(router.output[call])


async def test_an_engine_smaller_than_the_manifest_is_refused(world):
    class Small(Wrapped):
        @property
        def limits(self):
            return dataclasses.replace(self._inner.limits, vocabulary_size=299)

    with pytest.raises(WeightsRefused, match="vocabulary"):
        async with world.node(Small(world.engine())):
            pass


async def test_two_nodes_on_one_port_is_a_clear_error(world):
    async with world.node() as app:
        second = NodeApp(
            world.config("second", listen=app.endpoint),
            world.engine(),
            ledger=world.ledger,
            register=world.register,
        )
        with pytest.raises(Exception, match="cannot listen"):
            await second.start()


async def test_frames_are_bounded_and_lose_nothing():
    outbox = Outbox()
    tokens = tuple(range(MAX_FRAME_TOKENS + 10))
    outbox.add_tokens(1, tokens)
    outbox.add_finished(1, b"receipt")
    outbox.add_tokens(2, (7,))
    first = outbox.take()
    assert sum(len(t.token_ids) for t in first.tokens) == MAX_FRAME_TOKENS
    assert not first.finished
    second = outbox.take()
    got = [t for frame in (first, second) for part in frame.tokens for t in part.token_ids]
    assert got == [*tokens, 7]
    assert [f.call for f in second.finished] == [1]
    assert outbox.empty


async def test_attack_a_flood_of_refusals_stops_the_reading():
    outbox = Outbox()
    for call in range(MAX_BACKLOG_ITEMS):
        outbox.add_rejected(call, "OVER_CAPACITY", "x" * 10_000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.room(), 0.05)
    frame = outbox.take()
    assert len(frame.rejected[0].message) == 500
    await asyncio.wait_for(outbox.room(), 0.05)


def test_accepted_assignments_are_remembered_exactly_as_long_as_they_are_fresh():
    from trueweight.node.admission import FRESH_MS

    workload = Workload()
    issued = 1_000_000
    workload.remember(b"a", issued + FRESH_MS, issued)
    workload.remember(b"b", issued, issued + 2 * FRESH_MS)
    assert workload.was_seen(b"a"), "an assignment from the future is fresh for longer"
    workload.remember(b"c", issued, issued + 4 * FRESH_MS)
    assert not workload.was_seen(b"a")

"""Score, Challenge and Describe over real TLS: who may ask, what is bounded, what is true."""

from __future__ import annotations

import asyncio
import os

import grpc.aio
import pytest

from trueweight.node.describe import describe
from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from trueweight.protos.manifest import chunk_proof, read_chunk
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1 import node_pb2 as pb
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.runtime import rpc
from trueweight.runtime.handshake import make_proof


def caller(world, app, channel, role="verifier"):
    """Calls a method as a role, with a token for this node."""

    async def ask(method, request):
        metadata = world.tokens(role).metadata(app.node_id) if role else ()
        stub = getattr(NodeStub(channel), method)
        return await rpc.call(stub, request, timeout_ms=20_000, metadata=metadata)

    return ask


def item(**changes):
    values = {
        "prompt_token_ids": (5, 6, 7),
        "output_token_ids": (9, 10, 11),
        "sampling": Sampling().to_proto(),
        "seed": 5,
        **changes,
    }
    return pb.ScoreItem(**values)


def score_request(world, *items, **changes):
    return pb.ScoreRequest(
        manifest_digest=changes.pop("manifest_digest", world.manifest_digest),
        items=items,
        deadline_ms=changes.pop("deadline_ms", 10_000),
    )


async def test_a_served_output_scores_zero_and_an_altered_one_does_not(world):
    async with world.node() as app, world.session(app) as router, world.channel(app) as channel:
        await router.run(router.dispatch(sampling=Sampling(), max_tokens=30, seed=77))
        output = router.output[1]
        altered = [*output[:10], (output[10] + 1) % 300, *output[11:]]
        ask = caller(world, app, channel)
        answer = await ask(
            "Score",
            score_request(
                world,
                item(output_token_ids=output, seed=77),
                item(output_token_ids=altered, seed=77),
                item(output_token_ids=output, seed=78),
            ),
        )
        honest, one_wrong, wrong_seed = answer.results
        assert list(honest.margins) == [0.0] * 30
        assert one_wrong.margins[10] > 0
        assert sum(m > 0 for m in wrong_seed.margins) > 15
        assert answer.fingerprint.engine == "synthetic"


async def test_bad_items_get_their_own_error_and_spare_their_neighbours(world):
    bad = [
        item(prompt_token_ids=()),
        item(output_token_ids=()),
        item(output_token_ids=(300,)),
        item(prompt_token_ids=(5,) * 511),
        item(seed=-1),
        item(grammar_source=b"{}"),
        item(sampling=pb.ScoreItem().sampling),
    ]
    async with world.node() as app, world.channel(app) as channel:
        answer = await caller(world, app, channel)("Score", score_request(world, *bad, item()))
        assert all(result.error and not result.margins for result in answer.results[:-1])
        assert len(answer.results[-1].margins) == 3


async def test_attack_scores_and_challenges_by_others_are_refused(world):
    async with world.node() as app, world.channel(app) as channel:
        for role in ("router", "publisher", "stranger", None):
            ask = caller(world, app, channel, role)
            with pytest.raises(PermissionDenied):
                await ask("Score", score_request(world, item()))
            with pytest.raises(PermissionDenied):
                await ask("Challenge", pb.ChallengeRequest())


async def test_attack_token_for_another_node_is_refused(world):
    async with world.node() as app, world.channel(app) as channel:
        metadata = world.tokens("verifier").metadata(world.signers["stranger"].identity)
        with pytest.raises(Unauthenticated):
            await rpc.call(
                NodeStub(channel).Score,
                score_request(world, item()),
                timeout_ms=5_000,
                metadata=metadata,
            )


async def test_score_is_bounded(world):
    async with world.node() as app, world.channel(app) as channel:
        ask = caller(world, app, channel)
        for request, error in [
            (score_request(world), InvalidRequest),
            (score_request(world, *[item()] * 65), InvalidRequest),
            (score_request(world, item(), deadline_ms=0), InvalidRequest),
            (score_request(world, item(), deadline_ms=10**9), InvalidRequest),
            (score_request(world, item(), manifest_digest=b"x" * 32), NotFound),
        ]:
            with pytest.raises(error):
                await ask("Score", request)


class SleepingEngine:
    """Scores never end."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def score(self, jobs):
        await asyncio.sleep(60)


async def test_score_that_takes_too_long_ends_at_its_deadline(world):
    engine = SleepingEngine(world.engine())
    async with world.node(engine) as app, world.channel(app) as channel:
        with pytest.raises(DeadlineExceeded):
            await caller(world, app, channel)(
                "Score", score_request(world, item(), deadline_ms=200)
            )


def challenge(world, **changes):
    values = {
        "manifest_digest": world.manifest_digest,
        "nonce": os.urandom(32),
        "chunk_indices": (0, 3, 5),
        "deadline_ms": 5_000,
        **changes,
    }
    return pb.ChallengeRequest(**values)


async def test_challenge_proves_the_bytes_on_disk(world):
    assert world.manifest.chunk_count >= 6
    async with world.node() as app, world.channel(app) as channel:
        ask = caller(world, app, channel)
        request = challenge(world)
        answer = await ask("Challenge", request)
        for index, proof in zip(request.chunk_indices, answer.chunk_proofs, strict=True):
            chunk = read_chunk(world.model_dir, world.manifest, index)
            assert proof == chunk_proof(request.nonce, app.node_id, index, chunk)


async def test_attack_altered_chunk_gives_another_proof(world):
    async with world.node() as app, world.channel(app) as channel:
        last = world.manifest.chunk_count - 1
        request = challenge(world, chunk_indices=(0, 3, last))
        truth = [read_chunk(world.model_dir, world.manifest, i) for i in request.chunk_indices]
        path = world.model_dir / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        answer = await caller(world, app, channel)("Challenge", request)
        expected = [
            chunk_proof(request.nonce, app.node_id, i, chunk)
            for i, chunk in zip(request.chunk_indices, truth, strict=True)
        ]
        wrong = [a != b for a, b in zip(answer.chunk_proofs, expected, strict=True)]
        assert wrong == [False, False, True]


async def test_challenge_is_bounded(world):
    count = world.manifest.chunk_count
    async with world.node() as app, world.channel(app) as channel:
        ask = caller(world, app, channel)
        for changes, error in [
            ({"nonce": b"short"}, InvalidRequest),
            ({"chunk_indices": ()}, InvalidRequest),
            ({"chunk_indices": (3, 3)}, InvalidRequest),
            ({"chunk_indices": (4, 1)}, InvalidRequest),
            ({"chunk_indices": (count,)}, InvalidRequest),
            ({"chunk_indices": tuple(range(65))}, InvalidRequest),
            ({"deadline_ms": 0}, InvalidRequest),
            ({"manifest_digest": b"x" * 32}, NotFound),
        ]:
            with pytest.raises(error):
                await ask("Challenge", challenge(world, **changes))


async def test_describe_is_open_to_all_and_verified(world):
    async with world.node() as app:
        found = await describe(app.endpoint, world.market.market_id)
        assert found.offer.node_id == app.node_id
        assert found.offer.capacity == 64
        assert found.manifests[0].name == "toy"
        assert found.answer.self_test_equal == found.answer.self_test_positions > 0


async def test_describe_of_nothing_is_a_clear_error(world):
    async with world.node() as app:
        endpoint = app.endpoint
    with pytest.raises(Unavailable):
        await describe(endpoint, world.market.market_id, timeout_ms=2_000)
    with pytest.raises(InvalidRequest):
        await describe("nowhere", world.market.market_id)


async def test_a_reference_node_scores_but_takes_no_work(world):
    async with world.node(score_only=True, router=None) as app, world.channel(app) as channel:
        assert not world.registered
        answer = await caller(world, app, channel)("Score", score_request(world, item()))
        assert len(answer.results[0].margins) == 3
        with pytest.raises(grpc.aio.AioRpcError, match="not a router"):
            await dial_as_router(world, app, channel)


async def dial_as_router(world, app, channel):
    """A correct handshake by the market's router; reads until the node ends the session."""
    stream = NodeStub(channel).Session()
    await stream.write(pb.RouterFrame(nonce=pb.SessionNonce(nonce=b"n" * 32)))
    first = await stream.read()
    router, market_id = world.signers["router"], world.market.market_id
    proof = make_proof(router, market_id, app.node_id, first.nonce.nonce)
    await stream.write(pb.RouterFrame(proof=proof))
    while await stream.read() is not grpc.aio.EOF:
        pass

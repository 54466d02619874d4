"""Router, nodes, ledger, reference node and verifier over their real protocols."""

import asyncio
import os

import aiohttp
import pytest

from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel, shape_from_directory
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.tls import CERTIFICATE
from trueweight.simulation.adversaries import OtherEngine, PerturbedModel
from trueweight.simulation.audited_market import audit_everything
from trueweight.simulation.inprocess import (
    MODEL_DIRECTORY,
    MODEL_ID,
    InProcessMarket,
    MarketSpec,
    NodeSpec,
)
from trueweight.verifier.app import Connections, VerifierApp, access_tokens
from trueweight.verifier.calibration_file import Measured, weights_sha256
from trueweight.verifier.challenge import Challenger
from trueweight.verifier.command_support import at_endpoint
from trueweight.verifier.reference import GrpcNode
from trueweight.verifier.transcripts import GrpcTranscripts

BOND_CREDITS = 5


def quantised_engine():
    shape = shape_from_directory(MODEL_DIRECTORY, ModelShape(mean_output_tokens=90))
    honest = SyntheticEngine(SyntheticModel(shape))
    return OtherEngine(honest, SyntheticEngine(PerturbedModel(SyntheticModel(shape), 0.2)))


@pytest.fixture
async def market(tmp_path):
    nodes = (
        NodeSpec("good", mean_output_tokens=90, bond_credits=BOND_CREDITS),
        NodeSpec("bad", engine=quantised_engine(), bond_credits=BOND_CREDITS),
    )
    async with InProcessMarket(tmp_path, MarketSpec(nodes=nodes)) as running:
        yield running


class Verifying:
    """Verifiers over the real protocols; the honest node lends its engine as reference."""

    def __init__(self, market, kit):
        self.market, self.kit = market, kit
        self.signer = market.signer("verifier")
        self.tokens = access_tokens(market.market, self.signer, market.clock)
        self.good = market.nodes["good"]

    def node(self, name):
        pem = (self.market.directory / "nodes" / name / CERTIFICATE).read_text()
        return GrpcNode(self.market.nodes[name].endpoint, pem, "", self.tokens)

    async def manifests(self):
        app = self.app(())
        await app.service.catch_up()
        return app.service.view.registry.manifests

    def app(self, measured):
        router = self.market.router_member()
        market = at_endpoint(self.market.market, Member.ROUTER, router.endpoint)
        connections = Connections(
            self.market.port("verifier"), GrpcTranscripts(market, self.tokens), self.node("good")
        )
        directory = self.market.directory / "verifier-data"
        return VerifierApp(
            market, self.signer, connections, data_directory=directory, measured=measured
        )

    async def run(self):
        (manifest,) = (await self.manifests()).values()
        entries = tuple(self.kit.entry(name) for name in ("plain", "greedy"))
        app = self.app([Measured(weights_sha256(manifest), 1, "test", entries)])
        page = await self.market.port("admin").read_log(0, 1)
        await audit_everything(app, page.tree_size)
        return app


async def ask(market, key, count, *, only=()):
    """Paid requests, four at a time; in turn to each of the nodes in ``only``, if it names any."""
    gate = asyncio.Semaphore(4)

    async def one(session, number):
        body = {
            "model": MODEL_ID,
            "prompt": f"def f{number}(",
            "max_tokens": 150,
            "seed": number,
            "temperature": 1.0,
        }
        if only:
            body["provider"] = {"only": [only[number % len(only)]]}
        async with gate, session.post(f"{market.base_url}/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()

    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        await asyncio.gather(*(one(session, number) for number in range(count)))


async def captured(market, count):
    """Waits until every receipt is in the log."""
    async with asyncio.timeout(20):
        while True:
            page = await market.port("admin").read_log(0, 1000, ("receipt",))
            if len(page.entries) >= count:
                return
            await asyncio.sleep(0.05)


async def test_a_cheat_behind_a_real_router_is_convicted_and_gets_no_more_work(market, kit):
    verifying = Verifying(market, kit)
    await verifying.run()  # opens the epoch, publishes the calibration
    key = await market.client_key("acme")
    good, bad = (market.nodes[name].node_id for name in ("good", "bad"))
    # Which node is faster is up to the machine: without a preference either may get all of it.
    await ask(market, key, 70, only=(good, bad))
    await captured(market, 70)
    view = (await verifying.run()).service.view
    outcomes = [v.leaf.message.outcome for v in view.verdicts.values()]
    assert len(outcomes) == 70 and set(outcomes) <= {Verdict.SCORED, Verdict.REFUND}
    assert view.convicted(bad) and not view.convicted(good)
    assert view.nodes[good].pooled.wealth.value < 2
    assert await market.available_nano(f"node-bond:{bad}") == 0
    assert await market.available_nano(f"node-bond:{good}") == BOND_CREDITS * 10**9
    before = view.nodes[bad].receipts
    await asyncio.sleep(1.0)  # the router follows the log
    await ask(market, key, 10)
    await captured(market, 80)
    view = (await verifying.run()).service.view
    assert view.nodes[bad].receipts == before


async def test_the_weights_challenge_over_the_wire(market, kit):
    verifying = Verifying(market, kit)
    ((digest, manifest),) = (await verifying.manifests()).items()
    challenger = Challenger(MODEL_DIRECTORY, manifest, digest, market.clock, os.urandom)
    node = verifying.node("good")
    found = await challenger.challenge(node, market.nodes["good"].node_id, chunks=4)
    assert found.passed and len(found.chunks) == min(4, manifest.chunk_count)
    other = await challenger.challenge(node, "another node", chunks=4)
    assert not other.passed and other.wrong == other.chunks, "proofs are bound to the node"
    late = await challenger.challenge(node, market.nodes["good"].node_id, chunks=4, deadline_ms=0)
    assert not late.passed
    await node.close()

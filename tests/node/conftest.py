"""A market in memory around one real node: keys, registry log, a router's end of a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from trueweight.node.app import NodeApp
from trueweight.node.config import NodeConfig
from trueweight.node.synthetic import SyntheticEngine
from trueweight.protos.envelope import digest_of, open_envelope, seal
from trueweight.protos.errors import Unavailable
from trueweight.protos.ids import uuid7
from trueweight.protos.manifest import build_manifest
from trueweight.protos.receipts import ReceiptFacts, RouterEvents, check_receipt, open_assignment
from trueweight.protos.sampling import Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1 import ledger_pb2, log_pb2
from trueweight.protos.v1 import node_pb2 as pb
from trueweight.protos.v1.ledger_pb2_grpc import LedgerServicer, add_LedgerServicer_to_server
from trueweight.protos.v1.market_pb2 import Assignment, MarketDescriptor, Member
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.protos.v1.router_pb2 import RegisterResponse
from trueweight.protos.v1.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from trueweight.runtime import rpc
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.handshake import check_proof, make_proof, new_nonce
from trueweight.runtime.keys import create_keys
from trueweight.runtime.market import Market, load_market, write_market
from trueweight.runtime.tls import ensure_certificate

ASK_INPUT, ASK_OUTPUT = 100_000_000, 300_000_000
VOCABULARY, EOS = 300, 2
CLOCK = SystemClock()


class LogLedger:
    """The part of LedgerPort that a node uses: the log, and claims."""

    def __init__(self):
        self.entries, self.claims, self.refuse, self.down = [], [], False, False

    def add(self, kind, body):
        self.entries.append(log_pb2.LogEntry(index=len(self.entries), kind=kind, body=body))

    async def read_log(self, from_index, limit=1000, kinds=()):
        if self.down:
            raise Unavailable("no ledger")
        found = [e for e in self.entries[from_index:] if not kinds or e.kind in kinds][:limit]
        size = len(self.entries)
        return ledger_pb2.ReadLogResponse(entries=found, next_index=size, tree_size=size)

    async def apply(self, operations):
        if self.down:
            raise Unavailable("no ledger")
        self.claims.extend(operations)
        status = ledger_pb2.Result.REFUSED if self.refuse else ledger_pb2.Result.APPLIED
        return [ledger_pb2.Result(status=status) for _ in operations]

    async def close(self):
        pass


@dataclass
class World:
    """Keys of every party and the files a node is started with."""

    root: Path
    market: Market
    signers: dict
    ledger: LogLedger
    model_dir: Path
    manifest: Manifest
    manifest_digest: bytes
    registered: list = field(default_factory=list)

    def sign_registry(self, signer=None, manifest_signer=None, **changes):
        """A registry entry leaf, by default the market's for the model's manifest."""
        manifest = seal(self.manifest, manifest_signer or self.signers["publisher"])
        values = {
            "market_id": self.market.market_id,
            "model_id": "toy",
            "manifest_digest": digest_of(manifest),
            "publisher": self.signers["publisher"].identity,
            "manifest_envelope": manifest,
            **changes,
        }
        return seal(RegistryEntry(**values), signer or self.signers["market"])

    def config(self, name="node", **changes):
        router = Member(identity=self.signers["router"].identity, role=Member.ROUTER)
        values = {
            "model_dir": self.model_dir,
            "market": self.market,
            "keys": self.root / name,
            "ask_input_nano_per_mtok": ASK_INPUT,
            "ask_output_nano_per_mtok": ASK_OUTPUT,
            "router": router,
            "score_for": frozenset({self.signers["verifier"].identity}),
            "drain_ms": 5_000,
            **changes,
        }
        return NodeConfig(**values)

    def engine(self, **settings):
        return SyntheticEngine.from_directory(self.model_dir, **settings)

    async def register(self, request):
        self.registered.append(request.offer)
        return RegisterResponse(lease_ms=15_000, eligible=True)

    @contextlib.asynccontextmanager
    async def node(self, engine=None, **changes):
        """A started node with a fake router's Register."""
        app = NodeApp(
            self.config(**changes),
            engine or self.engine(),
            ledger=self.ledger,
            register=self.register,
        )
        await app.start()
        try:
            yield app
        finally:
            await app.close()

    def channel(self, app):
        pem = ensure_certificate(app._config.keys, CLOCK.now_unix_ms())
        return rpc.make_channel(app.endpoint, pem)

    @contextlib.asynccontextmanager
    async def session(self, app, signer=None):
        """A router's session with a started node, after the handshake."""
        async with self.channel(app) as channel:
            router = FakeRouter(self, app.node_id, signer or self.signers["router"])
            await router.dial(channel)
            try:
                yield router
            finally:
                await router.close()

    def tokens(self, role):
        signer = self.signers[role]
        return rpc.AccessTokens(signer, self.market.market_id, CLOCK, os.urandom)


class FakeRouter:
    """The router's end of a session, thin: it signs assignments and collects frames."""

    def __init__(self, world, node_id, signer):
        self.world, self.node_id, self.signer = world, node_id, signer
        self.output, self.receipts, self.rejected = {}, {}, {}
        self.loads, self.frames, self.draining, self.offer = [], 0, False, None
        self.facts, self._changed, self.ended = {}, asyncio.Event(), False
        self._next_call = 1

    async def dial(self, channel):
        self.stream = NodeStub(channel).Session()
        await self.shake_hands()
        self._reader = asyncio.create_task(self._read())

    async def shake_hands(self):
        nonce = new_nonce(os.urandom)
        await self.stream.write(pb.RouterFrame(nonce=pb.SessionNonce(nonce=nonce)))
        first = await self.stream.read()
        proof = make_proof(
            self.signer, self.world.market.market_id, self.node_id, first.nonce.nonce
        )
        await self.stream.write(pb.RouterFrame(proof=proof))
        second = await self.stream.read()
        if second is grpc.aio.EOF:
            return
        who, self.ring = check_proof(
            second.proof,
            market_id=self.world.market.market_id,
            my_identity=self.signer.identity,
            my_nonce=nonce,
            ring=self.world.market.ring,
        )
        assert who == self.node_id
        self.offer = second.offer

    async def close(self):
        self.stream.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self):
        try:
            while (frame := await self.stream.read()) is not grpc.aio.EOF:
                self.frames += 1
                self._take(frame)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            self.ended = True
            self._changed.set()

    def _take(self, frame):
        for tokens in frame.tokens:
            assert tokens.call not in self.receipts, "tokens after the receipt"
            self.output.setdefault(tokens.call, []).extend(tokens.token_ids)
        for done in frame.finished:
            assert done.call not in self.receipts, "a second receipt"
            self.receipts[done.call] = done.receipt
        for refused in frame.rejected:
            self.rejected[refused.call] = refused.code
        if frame.HasField("load"):
            self.loads.append(frame.load)
        self.draining = self.draining or frame.draining
        self._changed.set()

    async def until(self, condition, timeout_s=20):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def dispatch(self, *, signer=None, tamper=None, window=10_000, salt=b"s" * 16, **changes):
        """A signed dispatch; ``changes`` go into the assignment, ``tamper`` edits the frame."""
        prompt = changes.pop("prompt", (5, 6, 7))
        prefix = changes.pop("prefix", ())
        sampling = changes.pop("sampling", Sampling(stop_token_ids=(EOS,)))
        now = CLOCK.now_unix_ms()
        values = {
            "market_id": self.world.market.market_id,
            "request_id": uuid7(now, os.urandom(10)),
            "router_id": self.signer.identity,
            "node_id": self.node_id,
            "manifest_digest": self.world.manifest_digest,
            "prompt_digest": token_digest(salt, prompt),
            "prompt_len": len(prompt),
            "prefix_len": len(prefix),
            "prefix_digest": token_digest(salt, prefix),
            "sampling": sampling.to_proto(),
            "seed": 1234,
            "max_tokens": 50,
            "ask_input_nano_per_mtok": ASK_INPUT,
            "ask_output_nano_per_mtok": ASK_OUTPUT,
            "deadline_ms": 30_000,
            "hold_id": uuid7(now, os.urandom(10)),
            "hold_expires_at_unix_ms": now + 120_000,
            "issued_at_unix_ms": now,
            "model_id": "toy",
            **changes,
        }
        assignment = seal(Assignment(**values), signer or self.signer)
        dispatch = pb.Dispatch(
            call=self._next_call,
            assignment=assignment,
            salt=salt,
            prompt_token_ids=prompt,
            prefix_token_ids=prefix,
            window_tokens=window,
        )
        self._next_call += 1
        if tamper:
            tamper(dispatch)
        self.facts[dispatch.call] = (assignment, salt, prompt, prefix)
        return dispatch

    async def send(self, *dispatches, stops=(), cancels=(), windows=()):
        await self.stream.write(
            pb.RouterFrame(dispatches=dispatches, stops=stops, cancels=cancels, windows=windows)
        )

    async def run(self, *dispatches):
        """Sends dispatches and waits until each has a receipt or a rejection."""
        await self.send(*dispatches)
        calls = [d.call for d in dispatches]
        await self.until(lambda: all(c in self.receipts or c in self.rejected for c in calls))

    def check(self, call, **events):
        """The L0-checked receipt of a call."""
        assignment, salt, prompt, prefix = self.facts[call]
        ring = self.ring
        facts = ReceiptFacts(
            assignment=open_assignment(assignment, self.world.market.ring, self.market_id),
            receipt=self.receipts[call],
            salt=salt,
            prompt=prompt,
            prefix=prefix,
            received=self.output.get(call, []),
            manifest_digest=self.world.manifest_digest,
            vocabulary_size=self.world.manifest.vocabulary_size,
            events=RouterEvents(**events),
        )
        return check_receipt(facts, ring, self.market_id).message

    @property
    def market_id(self):
        return self.world.market.market_id


@pytest.fixture
def world(tmp_path):
    return build_world(tmp_path, make_model(tmp_path / "model"))


@pytest.fixture
def demo_world(tmp_path):
    """The same with the shipped demo model."""
    import trueweight.simulation

    models = Path(trueweight.simulation.__path__[0]) / "models"
    return build_world(tmp_path, models / "tw-demo")


def build_world(tmp_path, model_dir):
    market_signer = create_keys(tmp_path / "market", None, CLOCK)
    market_id = market_signer.identity
    roles = {
        "router": Member.ROUTER,
        "verifier": Member.VERIFIER,
        "publisher": Member.PUBLISHER,
    }
    signers = {name: create_keys(tmp_path / name, market_id, CLOCK) for name in roles}
    descriptor = MarketDescriptor(
        market_id=market_id,
        name="test",
        members=[
            Member(identity=signers[n].identity, role=r, key_event=signers[n].key_event)
            for n, r in roles.items()
        ],
    )
    write_market(tmp_path / "market.json", seal(descriptor, market_signer), market_signer.key_event)
    signers["market"] = market_signer
    signers["stranger"] = create_keys(tmp_path / "stranger", market_id, CLOCK)
    manifest = build_manifest(
        model_dir, market_id=market_id, name="toy", revision="1", licence="MIT", now_unix_ms=1
    )
    ledger = LogLedger()
    made = World(
        tmp_path, load_market(tmp_path / "market.json"), signers, ledger, model_dir, manifest, b""
    )
    entry = made.sign_registry()
    made.manifest_digest = open_envelope(
        entry, RegistryEntry, made.market.ring, market_id
    ).message.manifest_digest
    ledger.add("registry-entry", entry)
    return made


def make_model(directory):
    """A directory that describes a model; the synthetic engine needs no more."""
    directory.mkdir()
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    return directory


@pytest.fixture
def fake_router():
    """The class, for tests that only sign dispatches."""

    def make(world, node_id):
        return FakeRouter(world, node_id, world.signers["router"])

    return make


LAUNCH = "from trueweight.client.launcher import main; main()"


class Peers(LedgerServicer, RouterServicer):
    """A ledger and a router in one, as far as a starting node needs them."""

    def __init__(self, world):
        self._world, self.offers = world, asyncio.Queue()

    async def ReadLog(self, request, context):
        return await self._world.ledger.read_log(request.from_index, kinds=list(request.kinds))

    async def Register(self, request, context):
        await self.offers.put(request.offer)
        return RegisterResponse(lease_ms=15_000, eligible=True)


@pytest.fixture
async def peers(world):
    async with serve_peers(world) as servicer:
        yield servicer


@contextlib.asynccontextmanager
async def serve_peers(world):
    """Servers of ledger and router, and a market file that names them."""
    clock = CLOCK
    ledger_signer = create_keys(world.root / "ledger", world.market.market_id, clock)
    servicer, members = Peers(world), list(world.market.descriptor.members)
    server = rpc.make_server()
    add_LedgerServicer_to_server(servicer, server)
    add_RouterServicer_to_server(servicer, server)
    pem = ensure_certificate(world.root / "ledger", clock.now_unix_ms())
    endpoint = rpc.listen(server, "127.0.0.1:0", world.root / "ledger")
    members.append(
        Member(
            identity=ledger_signer.identity, role=Member.LEDGER, key_event=ledger_signer.key_event
        )
    )
    for member in members:
        if member.role in (Member.LEDGER, Member.ROUTER):
            member.endpoint, member.tls_certificate_pem = endpoint, pem
    descriptor = MarketDescriptor(market_id=world.market.market_id, members=members)
    market = world.signers["market"]
    write_market(world.root / "market.json", seal(descriptor, market), market.key_event)
    await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def start_command(*arguments):
    """A `trueweight` process, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LAUNCH,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def command():
    return start_command


@pytest.fixture
def serve():
    return serve_peers

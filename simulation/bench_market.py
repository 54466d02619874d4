"""The smallest market around one real node: real keys, registry, session and receipts, no ledger.

For benchmarks: what a node costs is measured through the router's own end of the session, and
every receipt that comes back is checked as the router checks it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from trueweight.node.app import NodeApp
from trueweight.node.config import NodeConfig
from trueweight.node.engine import Engine, GenerateJob
from trueweight.protos.envelope import digest_of, ring_of, seal
from trueweight.protos.errors import EngineError
from trueweight.protos.identity import KeyRing, Signer
from trueweight.protos.ids import uuid7
from trueweight.protos.manifest import build_manifest
from trueweight.protos.receipts import ReceiptFacts, RouterEvents, check_receipt, open_assignment
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1 import ledger_pb2, log_pb2
from trueweight.protos.v1.market_pb2 import Assignment, MarketDescriptor, Member
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.protos.v1.node_pb2 import Dispatch
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.protos.v1.router_pb2 import RegisterRequest, RegisterResponse
from trueweight.router.calls import Finished, NewTokens
from trueweight.router.node_session import NodeSession, SessionIdentity
from trueweight.runtime import rpc
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import create_keys
from trueweight.runtime.market import Market, load_market, write_market
from trueweight.runtime.tls import ensure_certificate

_ASK_NANO_PER_MTOK = 300_000_000
_DEADLINE_MS = 120_000
_LEASE_MS = 30_000.0
_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class BenchMarket:
    """Who is who, on disk and in memory."""

    market: Market
    router: Signer
    manifest: Manifest
    manifest_digest: bytes
    registry_entry: bytes


class RegistryLog:
    """The part of ``LedgerPort`` that a node needs to check its weights."""

    def __init__(self, entry: bytes) -> None:
        self._entries = [log_pb2.LogEntry(index=0, kind="registry-entry", body=entry)]

    async def read_log(
        self, from_index: int, limit: int = 1000, kinds: Sequence[str] = ()
    ) -> ledger_pb2.ReadLogResponse:
        found = [e for e in self._entries[from_index:] if not kinds or e.kind in kinds][:limit]
        return ledger_pb2.ReadLogResponse(entries=found, next_index=1, tree_size=1)

    async def apply(self, operations: Sequence[ledger_pb2.Operation]) -> list[ledger_pb2.Result]:
        return [ledger_pb2.Result(status=ledger_pb2.Result.APPLIED) for _ in operations]

    async def close(self) -> None: ...


def make_market(root: Path, model_dir: Path) -> BenchMarket:
    """Keys, descriptor and a registered manifest under ``root``."""
    owner = create_keys(root / "market", None, _CLOCK)
    market_id = owner.identity
    router = create_keys(root / "router", market_id, _CLOCK)
    publisher = create_keys(root / "publisher", market_id, _CLOCK)
    members = [
        Member(identity=signer.identity, role=role, key_event=signer.key_event)
        for signer, role in ((router, Member.ROUTER), (publisher, Member.PUBLISHER))
    ]
    descriptor = MarketDescriptor(market_id=market_id, name="bench", members=members)
    write_market(root / "market.json", seal(descriptor, owner), owner.key_event)
    manifest = build_manifest(
        model_dir,
        market_id=market_id,
        name="bench",
        revision="1",
        licence="Apache-2.0",
        now_unix_ms=_CLOCK.now_unix_ms(),
    )
    envelope = seal(manifest, publisher)
    entry = RegistryEntry(
        market_id=market_id,
        model_id="bench",
        manifest_digest=digest_of(envelope),
        publisher=publisher.identity,
        manifest_envelope=envelope,
    )
    return BenchMarket(
        load_market(root / "market.json"), router, manifest, digest_of(envelope), seal(entry, owner)
    )


class SessionClient:
    """A router's end of one session, reduced to running engine jobs as paid assignments."""

    def __init__(self, made: BenchMarket, session: NodeSession, ring: KeyRing) -> None:
        """``ring`` knows the node's key."""
        self._made, self._session, self._ring = made, session, ring
        self._unchecked: list[ReceiptFacts] = []

    async def run(self, jobs: Sequence[GenerateJob]) -> int:
        """All jobs at once; tokens received. Receipts wait for ``check_receipts``."""
        return sum(await asyncio.gather(*map(self._one, jobs)))

    def check_receipts(self) -> int:
        """L0 on every receipt since the last call; their number. Raises ReceiptRefused."""
        facts, self._unchecked = self._unchecked, []
        for item in facts:
            check_receipt(item, self._ring, self._made.market.market_id)
        return len(facts)

    async def _one(self, job: GenerateJob) -> int:
        salt = os.urandom(16)
        assignment = seal(self._assignment(job, salt), self._made.router)
        dispatch = Dispatch(assignment=assignment, salt=salt, prompt_token_ids=job.prompt)
        call = self._session.start(dispatch, window=4096)
        received: list[int] = []
        while True:
            event = await call.next(_DEADLINE_MS)
            if isinstance(event, NewTokens):
                received.extend(event.token_ids)
            elif isinstance(event, Finished):
                break
            else:
                raise EngineError(f"the node did not finish the job: {event}")
        self._unchecked.append(self._facts(job, salt, assignment, event.receipt, received))
        return len(received)

    def _facts(
        self, job: GenerateJob, salt: bytes, assignment: bytes, receipt: bytes, received: list[int]
    ) -> ReceiptFacts:
        made = self._made
        return ReceiptFacts(
            assignment=open_assignment(assignment, made.market.ring, made.market.market_id),
            receipt=receipt,
            salt=salt,
            prompt=job.prompt,
            prefix=(),
            received=received,
            manifest_digest=made.manifest_digest,
            vocabulary_size=made.manifest.vocabulary_size,
            events=RouterEvents(),
        )

    def _assignment(self, job: GenerateJob, salt: bytes) -> Assignment:
        made, now = self._made, _CLOCK.now_unix_ms()
        return Assignment(
            market_id=made.market.market_id,
            request_id=uuid7(now, os.urandom(10)),
            router_id=made.router.identity,
            node_id=self._session.node_id,
            manifest_digest=made.manifest_digest,
            prompt_digest=token_digest(salt, job.prompt),
            prompt_len=len(job.prompt),
            prefix_digest=token_digest(salt, ()),
            sampling=job.sampling.to_proto(),
            seed=job.seed,
            max_tokens=job.max_tokens,
            ask_input_nano_per_mtok=_ASK_NANO_PER_MTOK,
            ask_output_nano_per_mtok=_ASK_NANO_PER_MTOK,
            deadline_ms=_DEADLINE_MS,
            hold_id=uuid7(now, os.urandom(10)),
            hold_expires_at_unix_ms=now + 2 * _DEADLINE_MS,
            issued_at_unix_ms=now,
            model_id="bench",
        )


@asynccontextmanager
async def node_session(root: Path, model_dir: Path, engine: Engine) -> AsyncIterator[SessionClient]:
    """A started node around ``engine`` (not started) and a session with it."""
    made = make_market(root, model_dir)
    config = NodeConfig(
        model_dir=model_dir,
        market=made.market,
        keys=root / "node",
        ask_input_nano_per_mtok=_ASK_NANO_PER_MTOK,
        ask_output_nano_per_mtok=_ASK_NANO_PER_MTOK,
        router=Member(identity=made.router.identity, role=Member.ROUTER),
        journal_path=root / "receipts.sqlite",
    )

    async def register(request: RegisterRequest) -> RegisterResponse:
        return RegisterResponse(lease_ms=int(_LEASE_MS), eligible=True)

    log = RegistryLog(made.registry_entry)
    app = NodeApp(config, engine, ledger=log, register=register)  # type: ignore[arg-type]
    await app.start()
    try:
        certificate_pem = ensure_certificate(config.keys, _CLOCK.now_unix_ms())
        async with _dial(made, app, certificate_pem) as ends:
            yield ends
    finally:
        await app.close()


@asynccontextmanager
async def _dial(
    made: BenchMarket, app: NodeApp, certificate_pem: str
) -> AsyncIterator[SessionClient]:
    market = made.market
    ring = ring_of([app.signer.key_event], market.market_id, market.ring)
    me = SessionIdentity(made.router, market.market_id, market.ring, os.urandom, _CLOCK)
    session = NodeSession(me, app.node_id)
    opened = asyncio.Event()

    async def on_open(_: NodeSession) -> None:
        opened.set()

    channel = rpc.make_channel(app.endpoint, certificate_pem)
    stream = NodeStub(channel).Session(session.outgoing())
    running = asyncio.create_task(session.run(aiter(stream), on_open, lambda: _LEASE_MS))
    try:
        async with asyncio.timeout(20):
            await opened.wait()
        yield SessionClient(made, session, ring)
    finally:
        session.close("the benchmark is over")
        stream.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channel.close()

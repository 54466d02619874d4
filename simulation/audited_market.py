"""The shortest paid and audited market: real ledger, real engines, real verifier, no sockets.

It plays the router in a few lines (hold, assignment, L0, capture, transcript), so that cheats can
be judged by the production verifier over the production ledger within seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueweight.ledger.service import Ledger
from trueweight.node.engine import Engine, EngineFinish, GenerateJob
from trueweight.node.scoring import Scorer as NodeScorer
from trueweight.protos import transcript_box
from trueweight.protos.envelope import Opened, digest_of, parse_envelope, parse_payload, seal
from trueweight.protos.errors import NotFound
from trueweight.protos.identity import Signer
from trueweight.protos.money import charge_nano
from trueweight.protos.receipts import ReceiptFacts, check_receipt, open_assignment
from trueweight.protos.sampling_parameters import Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1 import audit_pb2, ledger_pb2, market_pb2, model_pb2
from trueweight.protos.v1.node_pb2 import ScoreItem, ScoreRequest, ScoreResponse
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest, OpenTranscriptResponse
from trueweight.router.billing import ServedLeg, Terms, make_bill
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.ledger_port import LedgerPort, raise_refused
from trueweight.simulation.ledger_world import ASK_INPUT, ASK_OUTPUT, World
from trueweight.verifier.app import Connections, VerifierApp
from trueweight.verifier.calibration_file import Measured
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.reference import SCORE_TIMEOUT_MS

MODEL_ID = "synthetic"
CLIENT_FUNDS_NANO = 10**12
DEADLINE_MS = 60_000


class EngineReference:
    """A reference node around an engine, with the node's own handling of score requests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def score(self, manifest_digest: bytes, items: Sequence[ScoreItem]) -> ScoreResponse:
        context = self._engine.limits.max_context_tokens
        scorer = NodeScorer(self._engine, manifest_digest, context)
        return await scorer.score(
            ScoreRequest(manifest_digest=manifest_digest, items=items, deadline_ms=SCORE_TIMEOUT_MS)
        )

    async def close(self) -> None:
        """The engine belongs to whoever started it."""


class KeptTranscripts:
    """Answers verifiers as a router does, from transcripts in memory."""

    def __init__(self, kept: Mapping[bytes, audit_pb2.Transcript]) -> None:
        self._kept = kept

    async def open(self, router_id: str, request: OpenTranscriptRequest) -> OpenTranscriptResponse:
        """Answers as the router does."""
        wanted = parse_payload(parse_envelope(request.audit_request), audit_pb2.AuditRequest)
        transcript = self._kept.get(wanted.receipt_digest)
        if transcript is None:
            raise NotFound("no transcript of this receipt is kept")
        key, nonce = os.urandom(32), os.urandom(12)
        digest = wanted.receipt_digest
        wrapped = transcript_box.wrap_key(key, wanted.wrap_public_key, digest, os.urandom)
        return OpenTranscriptResponse(
            ephemeral_public_key=wrapped.ephemeral_public_key,
            wrapped_key=wrapped.wrapped_key,
            nonce=nonce,
            ciphertext=transcript_box.seal_data(key, nonce, transcript.SerializeToString(), digest),
        )

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Order:
    """What a client asks for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    max_tokens: int
    client: str = "client"
    grammar_source: bytes = b""


class AuditedMarket:
    """Start it, ``join`` nodes, ``serve`` orders, run a ``verifier``."""

    def __init__(self, directory: Path, manifest: model_pb2.Manifest, **world: Any) -> None:
        self.clock: Clock = SystemClock()
        self.world = World(now=self.clock.now_unix_ms(), **world)
        self.market = self.world.market
        self._directory = directory
        self._manifest = manifest
        manifest.market_id = self.market.market_id
        self._manifest_envelope = seal(manifest, self.world.market_signer)
        self.manifest_digest = digest_of(self._manifest_envelope)
        self.ledger = Ledger(
            self.market,
            self.world.signers["ledger"],
            f"sqlite:///{directory / 'ledger.db'}",
            self.clock,
        )
        self.transcripts: dict[bytes, audit_pb2.Transcript] = {}
        self._salts = itertools.count(1)

    async def start(self, clients: Sequence[str] = ("client",)) -> None:
        """Starts the ledger, registers the model, funds the clients."""
        await self.ledger.start()
        entry = model_pb2.RegistryEntry(
            market_id=self.market.market_id,
            model_id=MODEL_ID,
            manifest_digest=self.manifest_digest,
            publisher=self.market.market_id,
            manifest_envelope=self._manifest_envelope,
        )
        await self.port(self.market.market_id).publish(seal(entry, self.world.market_signer))
        for client in clients:
            await self.apply("admin", self.world.deposit(client, CLIENT_FUNDS_NANO))

    async def close(self) -> None:
        """Ends the ledger."""
        await self.ledger.close()

    def port(self, identity: str) -> LedgerPort:
        """The ledger as this identity may use it."""
        return self.ledger.as_caller(identity)

    async def apply(self, role: str, operation: ledger_pb2.Operation) -> ledger_pb2.Result:
        """One operation by a role; raises if it is refused."""
        (result,) = await self.port(self.world.identity(role)).apply([operation])
        return raise_refused(result)

    async def join(self, signer: Signer, bond_nano: int) -> None:
        """A node joins: its key is published and its bond paid."""
        await self.port(self.world.identity("router")).publish(signer.key_event)
        if bond_nano:
            await self.apply("admin", self.world.bond(signer.identity, bond_nano))

    async def serve(self, node: Signer, engine: Engine, order: Order) -> bytes:
        """One paid request; the receipt's digest. Raises ReceiptRefused if L0 fails: unpaid."""
        self.world.now = self.clock.now_unix_ms()
        most = charge_nano(len(order.prompt), order.max_tokens, ASK_INPUT, ASK_OUTPUT)
        hold = self.world.hold(order.client, most)
        await self.apply("router", hold)
        salt = next(self._salts).to_bytes(16, "big")
        opened = self._assign(node, order, hold.id, salt)
        tokens, finish = await _run(engine, order)
        receipt = seal(self._receipt(engine, opened, tokens, finish, salt), node)
        facts = ReceiptFacts(
            assignment=opened,
            receipt=receipt,
            salt=salt,
            prompt=order.prompt,
            prefix=(),
            received=tokens,
            manifest_digest=self.manifest_digest,
            vocabulary_size=self._manifest.vocabulary_size,
        )
        accepted = check_receipt(facts, self.ledger.court.ring, self.market.market_id)
        await self._capture(ServedLeg(opened, accepted, (), tuple(tokens), len(tokens)))
        digest = digest_of(receipt)
        self.transcripts[digest] = audit_pb2.Transcript(
            assignment_envelope=opened.envelope,
            receipt_envelope=receipt,
            salt=salt,
            prompt_token_ids=order.prompt,
            output_token_ids=tokens,
            delivered_tokens=len(tokens),
            grammar_source=order.grammar_source,
        )
        return digest

    def verifier(
        self,
        engine: Engine,
        measured: Sequence[Measured],
        *,
        name: str = "verifier",
        policy: RatePolicy | None = None,
    ) -> VerifierApp:
        """A verifier with its own reference engine."""
        signer = self.world.signers[name]
        return VerifierApp(
            self.market,
            signer,
            Connections(
                self.port(signer.identity),
                KeptTranscripts(self.transcripts),
                EngineReference(engine),
            ),
            data_directory=self._directory / name,
            policy=policy,
            measured=measured,
            clock=self.clock,
        )

    async def available(self, account: str) -> int:
        """Nanocredits that an account could spend."""
        port = self.port(self.world.identity("verifier"))
        records = await port.balances([account])
        return int(records[0].available_nano) if records else 0

    # The router in a few lines.

    def _assign(
        self, node: Signer, order: Order, hold_id: bytes, salt: bytes
    ) -> Opened[market_pb2.Assignment]:
        assignment = market_pb2.Assignment(
            market_id=self.market.market_id,
            request_id=self.world.new_id(),
            router_id=self.world.identity("router"),
            node_id=node.identity,
            manifest_digest=self.manifest_digest,
            prompt_digest=token_digest(salt, order.prompt),
            prompt_len=len(order.prompt),
            sampling=order.sampling.to_proto(),
            seed=order.seed,
            max_tokens=order.max_tokens,
            ask_input_nano_per_mtok=ASK_INPUT,
            ask_output_nano_per_mtok=ASK_OUTPUT,
            deadline_ms=DEADLINE_MS,
            hold_id=hold_id,
            hold_expires_at_unix_ms=self.world.now + DEADLINE_MS,
            issued_at_unix_ms=self.world.now,
            model_id=MODEL_ID,
        )
        sealed = seal(assignment, self.world.signers["router"])
        return open_assignment(sealed, self.market.ring, self.market.market_id)

    def _receipt(
        self,
        engine: Engine,
        opened: Opened[market_pb2.Assignment],
        tokens: Sequence[int],
        finish: EngineFinish | None,
        salt: bytes,
    ) -> market_pb2.Receipt:
        return market_pb2.Receipt(
            market_id=self.market.market_id,
            assignment_digest=opened.digest,
            node_id=opened.message.node_id,
            output_digest=token_digest(salt, tokens),
            prompt_tokens=opened.message.prompt_len,
            output_tokens=len(tokens),
            finish_reason=market_pb2.EOS if finish is EngineFinish.EOS else market_pb2.LENGTH,
            fingerprint=engine.fingerprint,
            queue_us=100,
            first_token_us=10_000,
            total_us=1_000_000,
        )

    async def _capture(self, leg: ServedLeg) -> None:
        terms = Terms(self.world.fee_ppm, self.world.pool_ppm)
        bill = make_bill([leg], terms, bill_id=self.world.new_id(), now_unix_ms=self.world.now)
        evidence = [(leg.assignment.envelope, leg.receipt.envelope)]
        await self.apply("router", self.world.capture_of(bill, evidence))


async def _run(engine: Engine, order: Order) -> tuple[list[int], EngineFinish | None]:
    job = GenerateJob(
        job_id=os.urandom(8).hex(),
        prompt=order.prompt,
        prefix=(),
        sampling=order.sampling,
        seed=order.seed,
        max_tokens=order.max_tokens,
        grammar_source=order.grammar_source,
    )
    tokens: list[int] = []
    finish: EngineFinish | None = None
    async for step in engine.generate(job):
        tokens.extend(step.token_ids)
        finish = step.finish or finish
    return tokens, finish


async def audit_everything(app: VerifierApp, leaves: int, timeout_s: float = 60.0) -> None:
    """Runs a verifier until it has seen ``leaves`` leaves and nothing is left to do."""
    stop = asyncio.Event()
    task = asyncio.create_task(app.run(stop))
    service = app.service
    try:
        async with asyncio.timeout(timeout_s):
            while not (service.ready.is_set() and service.idle) or service.view.next_index < leaves:
                if task.done():
                    task.result()
                await asyncio.sleep(0.02)
    finally:
        stop.set()
        await task

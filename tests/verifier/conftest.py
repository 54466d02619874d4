"""A small market around one verifier: real signatures, a real log order, no network.

``World`` plays ledger, router, nodes and reference node. Its ledger keeps the contract's rules
that the verifier relies on: ids are applied once, another body under a known id is ID_CONFLICT.
"""

import asyncio
import itertools
import os
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trueweight.protos import transcript_box
from trueweight.protos.envelope import digest_of, kind_of_type, parse_envelope, seal, seal_key_event
from trueweight.protos.errors import Erased, NotFound, Unavailable
from trueweight.protos.identity import Signer, key_id, public_bytes
from trueweight.protos.market_terms import DEFAULT_ENGINES, with_synthetic
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1 import audit_pb2, ledger_pb2, log_pb2, market_pb2, model_pb2
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import EngineFingerprint, Member
from trueweight.protos.v1.node_pb2 import ScoreResponse, ScoreResult
from trueweight.protos.v1.router_pb2 import OpenTranscriptResponse
from trueweight.runtime.clock import ManualClock
from trueweight.runtime.market import load_market, write_market
from trueweight.verifier.app import Connections, VerifierApp
from trueweight.verifier.calibration_file import Measured, weights_sha256
from trueweight.verifier.epochs import RatePolicy

FINGERPRINT = EngineFingerprint(
    engine="synthetic", sampler_id="tw-gumbel-1", sampler_precision="fp32", dtype="float32"
)
MU0_NANO = 400_000


def make_signer(
    market_id: str | None,
    owner: Ed25519PrivateKey | None = None,
    root: Ed25519PrivateKey | None = None,
    sequence: int = 1,
) -> Signer:
    root, key = root or Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    identity = key_id(public_bytes(root))
    event = KeyEvent(
        market_id=market_id or identity,
        identity=identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(key),
        action=KeyEvent.CERTIFY,
        sequence=sequence,
        operator_public_key=public_bytes(owner) if owner else b"",
    )
    keys = (root, key, owner) if owner else (root, key)
    return Signer(identity, key, seal_key_event(event, *keys))


def revocation(signer: Signer, root: Ed25519PrivateKey, sequence: int = 2) -> bytes:
    """The key event that takes a signer's operational key back."""
    event = KeyEvent.FromString(parse_envelope(signer.key_event).payload)
    event.action, event.sequence = KeyEvent.REVOKE, sequence
    return seal_key_event(event, root)


def calibration_entry(name: str = "plain", mu0_nano: int = MU0_NANO) -> audit_pb2.CalibrationEntry:
    return audit_pb2.CalibrationEntry(
        parameter_class=name,
        worst_pair="test",
        mu0_nano=mu0_nano,
        mean_nano=mu0_nano // 4,
        upper_bound_nano=mu0_nano // 2,
        confidence_ppm=999_000,
        requests=1000,
        tokens=100_000,
        refund_above_nano=100_000_000,
    )


class Killed(BaseException):
    """The process dies here: nothing may catch it."""


class FakeLedger:
    """The log and the ids, as ledger.proto promises them."""

    def __init__(self, clock):
        self.clock = clock
        self.entries: list[log_pb2.LogEntry] = []
        self.done: dict[bytes, tuple[bytes, ledger_pb2.Result]] = {}
        self.published: set[bytes] = set()
        self.refunds: dict[bytes, int] = {}
        self.convicted: dict[str, bytes] = {}
        self.refuse: tuple[str, ...] = ()
        self.stakes: dict[str, int] = {}
        self.released: list[tuple[str, int, int]] = []
        self.grown = asyncio.Event()

    def append(self, kind: str, body: bytes) -> int:
        index = len(self.entries)
        self.entries.append(
            log_pb2.LogEntry(
                index=index, kind=kind, body=body, merged_at_unix_ms=self.clock.now_unix_ms()
            )
        )
        self.grown.set()
        self.grown = asyncio.Event()
        return index

    def log_envelope(self, envelope: bytes) -> int:
        return self.append(kind_of_type(parse_envelope(envelope).payload_type), envelope)

    async def apply(self, operations):
        return [self._apply_one(op) for op in operations]

    def _apply_one(self, operation):
        body = operation.SerializeToString(deterministic=True)
        known = self.done.get(operation.id)
        if known is not None:
            if known[0] != body:
                return _refused("ID_CONFLICT")
            result = ledger_pb2.Result()
            result.CopyFrom(known[1])
            result.status = ledger_pb2.Result.REPLAYED
            return result
        which = operation.WhichOneof("body")
        if which in self.refuse:
            return _refused("STORAGE")
        result = getattr(self, "_do_" + which)(getattr(operation, which))
        if result.status == ledger_pb2.Result.APPLIED:
            self.done[operation.id] = (body, result)
        return result

    def _do_publish(self, body):
        digest = digest_of(body.envelope)
        if digest not in self.published:
            self.published.add(digest)
            index = self.log_envelope(body.envelope)
            return _applied(log_index=index, log_index_known=True)
        return _applied()

    def _do_refund(self, body):
        if body.receipt_digest in self.refunds:
            return _refused("CONFLICT")
        self.refunds[body.receipt_digest] = 1
        return _applied(amount_nano=1)

    def _do_release(self, body):
        self.released.append((body.node_id, body.amount_nano, body.below_log_index))
        return _applied(amount_nano=1)

    def _do_reward(self, body):
        return _applied(amount_nano=body.amount_nano)

    def _do_convict(self, body):
        conviction = audit_pb2.Conviction.FromString(parse_envelope(body.conviction).payload)
        if conviction.node_id in self.convicted:
            return _refused("CONFLICT")
        self.convicted[conviction.node_id] = body.conviction
        return _applied(amount_nano=5)

    async def balances(self, accounts):
        assert accounts, "an empty list means all accounts"
        return [
            ledger_pb2.AccountRecord(account=a, available_nano=str(self.stakes.get(a, 0)))
            for a in accounts
        ]

    async def read_log(self, from_index, limit=1000, kinds=()):
        found = [e for e in self.entries[from_index:] if not kinds or e.kind in kinds]
        return ledger_pb2.ReadLogResponse(
            entries=found, next_index=len(self.entries), tree_size=len(self.entries)
        )

    async def follow_log(self, from_index, kinds=()):
        while True:
            for entry in self.entries[from_index:]:
                from_index = entry.index + 1
                if not kinds or entry.kind in kinds:
                    yield entry
            await self.grown.wait()

    def of_kind(self, kind, message_type):
        return [
            message_type.FromString(parse_envelope(e.body).payload)
            for e in self.entries
            if e.kind == kind
        ]


def _refused(code):
    return ledger_pb2.Result(status=ledger_pb2.Result.REFUSED, code=code, message=code.lower())


def _applied(**fields):
    return ledger_pb2.Result(status=ledger_pb2.Result.APPLIED, **fields)


@dataclass
class World:
    """Everybody else."""

    directory: object
    verifier_count: int = 1
    convictions_needed: int = 1
    # Root key of the first verifier's declared owner.
    owner: Ed25519PrivateKey | None = None
    engines: market_pb2.EngineAllowList = field(
        default_factory=lambda: with_synthetic(DEFAULT_ENGINES)
    )
    audit_terms: market_pb2.AuditTerms | None = None
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self):
        self.market_signer = make_signer(None)
        self.market_id = self.market_signer.identity
        self.router = make_signer(self.market_id)
        self.verifiers = [make_signer(self.market_id, self.owner)]
        self.verifiers += [make_signer(self.market_id) for _ in range(self.verifier_count - 1)]
        self.nodes: dict[str, Signer] = {}
        self.market = self._write_market()
        self.ledger = FakeLedger(self.clock)
        self.manifest_digest = self._register()
        self.transcripts: dict[bytes, audit_pb2.Transcript] = {}
        self.margins: dict[tuple[int, ...], list[float]] = {}
        self.reference_down = self.router_down = False
        self.erased: set[bytes] = set()
        self.score_batches: list[int] = []
        self._requests = itertools.count(1)

    def _write_market(self):
        members = [Member(identity=self.router.identity, role=Member.ROUTER)]
        members[0].key_event = self.router.key_event
        members += [
            Member(identity=v.identity, role=Member.VERIFIER, key_event=v.key_event)
            for v in self.verifiers
        ]
        descriptor = market_pb2.MarketDescriptor(
            market_id=self.market_id,
            name="test",
            members=members,
            convictions_needed=self.convictions_needed,
            engines=self.engines,
            audit_terms=self.audit_terms,
        )
        path = self.directory / "market.json"
        write_market(path, seal(descriptor, self.market_signer), self.market_signer.key_event)
        return load_market(path)

    def _register(self):
        manifest = model_pb2.Manifest(
            market_id=self.market_id,
            name="tiny",
            vocabulary_size=1000,
            eos_token_ids=[1],
            files=[model_pb2.FileEntry(path="model.safetensors", sha256=b"w" * 32)],
        )
        envelope = seal(manifest, self.market_signer)
        entry = model_pb2.RegistryEntry(
            market_id=self.market_id,
            model_id="tiny",
            manifest_digest=digest_of(envelope),
            manifest_envelope=envelope,
        )
        self.ledger.log_envelope(seal(entry, self.market_signer))
        self.weights = weights_sha256(manifest)
        return digest_of(envelope)

    def add_node(self, name: str, owner: Ed25519PrivateKey | None = None) -> str:
        signer = make_signer(self.market_id, owner)
        self.nodes[name] = signer
        self.ledger.log_envelope(signer.key_event)
        return signer.identity

    def serve(
        self,
        name: str,
        margins,
        *,
        keep_transcript=True,
        sampling=None,
        lie=None,
        client="client:c",
        charge_nano=1000,
    ) -> bytes:
        """One paid request with the margins that the reference will find; the receipt digest."""
        number, node = next(self._requests), self.nodes[name]
        salt, prompt = number.to_bytes(16, "big"), [5, 6, 7]
        output = [2 + (number * 31 + j) % 900 for j in range(len(margins))]
        output[: min(len(output), 2)] = [2 + number % 900, 2 + number // 900][: len(output)]
        self.margins[tuple(output)] = list(margins)
        hold_id = number.to_bytes(16, "big")
        assignment = seal(
            market_pb2.Assignment(
                market_id=self.market_id,
                request_id=number.to_bytes(16, "big"),
                router_id=self.router.identity,
                node_id=node.identity,
                manifest_digest=self.manifest_digest,
                prompt_digest=token_digest(salt, prompt),
                prompt_len=len(prompt),
                sampling=sampling
                or market_pb2.SamplingParams(temperature=1, top_p=1, repetition_penalty=1),
                seed=number,
                max_tokens=len(margins),
                deadline_ms=60_000,
                model_id="tiny",
                hold_id=hold_id,
            ),
            self.router,
        )
        receipt = market_pb2.Receipt(
            market_id=self.market_id,
            assignment_digest=digest_of(assignment),
            node_id=node.identity,
            output_digest=token_digest(salt, output),
            prompt_tokens=len(prompt),
            output_tokens=len(output),
            finish_reason=market_pb2.LENGTH,
            fingerprint=FINGERPRINT,
            queue_us=10,
            first_token_us=1000,
            total_us=10_000,
        )
        if lie:
            lie(receipt)
        envelope = seal(receipt, node)
        digest = digest_of(envelope)
        if keep_transcript:
            self.transcripts[digest] = audit_pb2.Transcript(
                assignment_envelope=assignment,
                receipt_envelope=envelope,
                salt=salt,
                prompt_token_ids=prompt,
                output_token_ids=output,
                delivered_tokens=len(output),
            )
        bill = market_pb2.Bill(
            market_id=self.market_id,
            router_id=self.router.identity,
            hold_id=hold_id,
            legs=[
                market_pb2.BillLeg(
                    assignment_digest=digest_of(assignment),
                    receipt_digest=digest,
                    node_id=node.identity,
                    client_charge_nano=charge_nano,
                    billed_output_tokens=len(output),
                )
            ],
        )
        held = ledger_pb2.Movement(
            debit_account=client, phase=ledger_pb2.TransferRecord.PENDING, reason="hold"
        )
        transfer = ledger_pb2.TransferBatch(operation_id=hold_id, movements=[held])
        self.ledger.append("transfer", transfer.SerializeToString())
        self.ledger.log_envelope(seal(bill, self.router))
        self.ledger.log_envelope(envelope)
        return digest

    # The router and the reference node, as the verifier sees them.

    async def open(self, router_id, request):
        if self.router_down:
            raise Unavailable("the router is down")
        wanted = audit_pb2.AuditRequest.FromString(parse_envelope(request.audit_request).payload)
        assert self.ledger.entries[request.log_index].body == request.audit_request
        if wanted.receipt_digest in self.erased:
            raise Erased("its client had it destroyed")
        transcript = self.transcripts.get(wanted.receipt_digest)
        if transcript is None:
            raise NotFound("erased")
        key, nonce = os.urandom(32), os.urandom(12)
        wrapped = transcript_box.wrap_key(
            key, wanted.wrap_public_key, wanted.receipt_digest, os.urandom
        )
        data = transcript_box.seal_data(
            key, nonce, transcript.SerializeToString(), wanted.receipt_digest
        )
        return OpenTranscriptResponse(
            ephemeral_public_key=wrapped.ephemeral_public_key,
            wrapped_key=wrapped.wrapped_key,
            nonce=nonce,
            ciphertext=data,
        )

    async def score(self, manifest_digest, items):
        if self.reference_down:
            raise Unavailable("the reference is down")
        assert manifest_digest == self.manifest_digest
        self.score_batches.append(len(items))
        results = [ScoreResult(margins=self.margins[tuple(i.output_token_ids)]) for i in items]
        return ScoreResponse(results=results, fingerprint=FINGERPRINT)

    async def close(self):
        pass

    def measured(self, version=1, *entries):
        return Measured(self.weights, version, "test", entries or (calibration_entry(),))

    def app(self, number=0, *, ledger=None, policy=None, measured=None) -> VerifierApp:
        signer = self.verifiers[number]
        connections = Connections(ledger or self.ledger, self, self)
        return VerifierApp(
            self.market,
            signer,
            connections,
            data_directory=self.directory / f"verifier-{number}",
            policy=policy or RatePolicy(),
            measured=measured if measured is not None else (self.measured(),),
            clock=self.clock,
        )


async def drive(world: World, app: VerifierApp, until, *, step_ms=200, rounds=2000):
    """Runs an app on the manual clock until a condition holds; then stops it."""
    stop = asyncio.Event()
    task = asyncio.create_task(app.run(stop))
    try:
        for _ in range(rounds):
            await asyncio.sleep(0.0005)
            if task.done():
                task.result()
            if until():
                return
            world.clock.advance_ms(step_ms)
        raise AssertionError("the condition never held")
    finally:
        stop.set()
        world.clock.advance_ms(1000)
        await asyncio.gather(task, return_exceptions=True)


async def settle(world: World, app: VerifierApp):
    """Runs an app until nothing is left to do."""
    service = app.service

    def settled():
        seen_all = service.view.next_index >= len(world.ledger.entries)
        return service.ready.is_set() and seen_all and service.idle

    await drive(world, app, settled)


async def settle_together(world: World, apps):
    """Runs several verifiers at once until nothing is left to do for any."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(app.run(stop)) for app in apps]
    try:
        for _ in range(4000):
            await asyncio.sleep(0.0005)
            seen_all = all(a.service.view.next_index >= len(world.ledger.entries) for a in apps)
            if seen_all and all(a.service.ready.is_set() and a.service.idle for a in apps):
                return
            world.clock.advance_ms(200)
        raise AssertionError("the verifiers never settled")
    finally:
        stop.set()
        world.clock.advance_ms(1000)
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def make_world(tmp_path):
    def make(**settings):
        return World(tmp_path, **settings)

    return make


@pytest.fixture
def kit():
    """Helpers for tests, which cannot import this file."""

    class Kit:
        settle = staticmethod(settle)
        settle_together = staticmethod(settle_together)
        drive = staticmethod(drive)
        entry = staticmethod(calibration_entry)
        signer = staticmethod(make_signer)
        revocation = staticmethod(revocation)
        Killed = Killed
        mu0_nano = MU0_NANO

    return Kit

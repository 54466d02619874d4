"""A market's worth of signed evidence, made on the spot: for ledger tests and benchmarks.

Signers are real Ed25519 keys in memory; bills, assignments and receipts are what a router and a
node would sign. Nothing here is used by a running market.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trueweight.protos.envelope import digest_of, ring_of, seal, seal_key_event
from trueweight.protos.identity import Signer, key_id, public_bytes
from trueweight.protos.ids import uuid7
from trueweight.protos.market_terms import DEFAULT_ENGINES, with_synthetic
from trueweight.protos.money import charge_nano, split_charge
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.market import Market

START_UNIX_MS = 1_790_000_000_000
ASK_INPUT, ASK_OUTPUT = 100_000_000, 300_000_000
_ROLES = {
    "ledger": Member.LEDGER,
    "router": Member.ROUTER,
    "verifier": Member.VERIFIER,
    "admin": Member.ADMIN,
    "operator": Member.OPERATOR,
}


def _root_key(seed: str) -> Ed25519PrivateKey:
    """The root key of the identity with this seed."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"root {seed}".encode()).digest())


def make_signer(seed: str, market_id: str | None = None, owner: str = "") -> Signer:
    """A deterministic identity; ``market_id`` None makes the market's own. ``owner`` is the seed of
    the identity that it declares to belong to."""
    root = _root_key(seed)
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"key {seed}".encode()).digest())
    identity = key_id(public_bytes(root))
    event = KeyEvent(
        market_id=market_id or identity,
        identity=identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(key),
        action=KeyEvent.CERTIFY,
        sequence=1,
        issued_at_unix_ms=START_UNIX_MS,
        operator_public_key=public_bytes(_root_key(owner)) if owner else b"",
    )
    owners = [_root_key(owner)] if owner else []
    return Signer(identity, key, seal_key_event(event, root, key, *owners))


def revocation(seed: str, signer: Signer, market_id: str) -> bytes:
    """The key event that ends the key which ``make_signer`` gave to this seed."""
    root = _root_key(seed)
    event = KeyEvent(
        market_id=market_id,
        identity=signer.identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(signer.key),
        action=KeyEvent.REVOKE,
        sequence=2,
        issued_at_unix_ms=START_UNIX_MS,
    )
    return seal_key_event(event, root, signer.key)


@dataclass(frozen=True)
class Leg:
    """What one leg of a capture did and is billed for."""

    node: Signer
    prompt: int = 100
    output: int = 50
    billed_input: int = 100
    billed_output: int = 50
    choice: int = 0
    leg: int = 0
    prefix: int = 0
    subsidy: int = 0
    finish: market_pb2.FinishReason = market_pb2.EOS


@dataclass
class World:
    """Signers of every role, the market they form, and makers of operations."""

    fee_ppm: int = 50_000
    pool_ppm: int = 20_000
    window_ms: int = 60_000
    nodes: int = 3
    verifiers: int = 1
    convictions_needed: int = 1
    audit_terms: market_pb2.AuditTerms | None = None
    now: int = START_UNIX_MS
    market_signer: Signer = field(init=False)
    signers: dict[str, Signer] = field(init=False)
    market: Market = field(init=False)

    def __post_init__(self) -> None:
        self.market_signer = make_signer("market")
        self.market_id = self.market_signer.identity
        self.signers = {name: make_signer(name, self.market_id) for name in _ROLES}
        extra = [f"verifier{i}" for i in range(1, self.verifiers)]
        self.signers |= {name: make_signer(name, self.market_id) for name in extra}
        members = [
            Member(
                identity=signer.identity,
                role=_ROLES[name.rstrip("0123456789")],
                key_event=signer.key_event,
            )
            for name, signer in self.signers.items()
        ]
        descriptor = market_pb2.MarketDescriptor(
            market_id=self.market_id,
            name="test",
            members=members,
            fee_ppm=self.fee_ppm,
            verification_pool_ppm=self.pool_ppm,
            settlement_window_ms=self.window_ms,
            convictions_needed=self.convictions_needed,
            engines=with_synthetic(DEFAULT_ENGINES),
            audit_terms=self.audit_terms,
        )
        events = [self.market_signer.key_event, *(m.key_event for m in members)]
        self.market = Market(self.market_id, descriptor, ring_of(events, self.market_id))
        self.node = [make_signer(f"node{i}", self.market_id) for i in range(self.nodes)]
        self._count = itertools.count(1)

    def identity(self, name: str) -> str:
        """Identity of a role's signer."""
        return self.signers[name].identity

    def new_id(self) -> bytes:
        """A fresh, deterministic UUIDv7."""
        return uuid7(self.now, next(self._count).to_bytes(10, "big"))

    # -- operations ---------------------------------------------------------------------------

    def deposit(self, client: str, amount: int, reference: str = "") -> pb.Operation:
        id_ = self.new_id()
        return pb.Operation(
            id=id_,
            deposit=pb.Deposit(
                account=f"client:{client}",
                amount_nano=amount,
                rail="card",
                reference=reference or id_.hex(),
            ),
        )

    def bond(self, node_id: str, amount: int) -> pb.Operation:
        id_ = self.new_id()
        return pb.Operation(
            id=id_,
            bond_deposit=pb.BondDeposit(
                node_id=node_id, amount_nano=amount, rail="bank", reference=id_.hex()
            ),
        )

    def hold(
        self, client: str, amount: int, *, ttl_ms: int = 60_000, api_key: str = ""
    ) -> pb.Operation:
        return pb.Operation(
            id=self.new_id(),
            hold=pb.Hold(
                account=f"client:{client}",
                amount_nano=amount,
                expires_at_unix_ms=self.now + ttl_ms,
                api_key_id=api_key,
                router_id=self.identity("router"),
            ),
        )

    def publish(self, envelope: bytes) -> pb.Operation:
        return pb.Operation(id=self.new_id(), publish=pb.Publish(envelope=envelope))

    def void(self, hold_id: bytes) -> pb.Operation:
        return pb.Operation(id=self.new_id(), void_hold=pb.VoidHold(hold_id=hold_id))

    def evidence(self, hold_id: bytes, leg: Leg, request_id: bytes) -> tuple[bytes, bytes]:
        """Envelopes of assignment and receipt."""
        assignment = market_pb2.Assignment(
            market_id=self.market_id,
            request_id=request_id,
            choice_index=leg.choice,
            leg=leg.leg,
            router_id=self.identity("router"),
            node_id=leg.node.identity,
            manifest_digest=b"m" * 32,
            prompt_digest=b"p" * 32,
            prompt_len=leg.prompt,
            prefix_len=leg.prefix,
            prefix_digest=b"f" * 32,
            sampling=market_pb2.SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.0),
            seed=7,
            max_tokens=4096,
            ask_input_nano_per_mtok=ASK_INPUT,
            ask_output_nano_per_mtok=ASK_OUTPUT,
            deadline_ms=30_000,
            hold_id=hold_id,
            hold_expires_at_unix_ms=self.now + 60_000,
            issued_at_unix_ms=self.now,
            model_id="demo",
        )
        sealed = seal(assignment, self.signers["router"])
        receipt = market_pb2.Receipt(
            market_id=self.market_id,
            assignment_digest=digest_of(sealed),
            node_id=leg.node.identity,
            output_digest=b"o" * 32,
            prompt_tokens=leg.prompt,
            output_tokens=leg.output,
            finish_reason=leg.finish,
            fingerprint=market_pb2.EngineFingerprint(
                engine="vllm", engine_version="0.32.0", dtype="bfloat16", sampler_id="tw-gumbel-1"
            ),
            queue_us=100,
            first_token_us=20_000,
            total_us=400_000,
        )
        return sealed, seal(receipt, leg.node)

    def capture(self, hold_id: bytes, *legs: Leg) -> pb.Operation:
        """A correct capture of these legs."""
        request_id = self.new_id()
        pairs = [self.evidence(hold_id, leg, request_id) for leg in legs]
        return self.capture_served(hold_id, request_id, legs, pairs)

    def capture_served(
        self,
        hold_id: bytes,
        request_id: bytes,
        legs: Sequence[Leg],
        pairs: list[tuple[bytes, bytes]],
    ) -> pb.Operation:
        """A correct capture of legs whose evidence was made before, for example to be claimed."""
        bill_legs = [self.bill_leg(leg, *pair) for leg, pair in zip(legs, pairs, strict=True)]
        bill = market_pb2.Bill(
            market_id=self.market_id,
            bill_id=self.new_id(),
            request_id=request_id,
            router_id=self.identity("router"),
            model_id="demo",
            hold_id=hold_id,
            legs=bill_legs,
            charge_nano=sum(leg.client_charge_nano for leg in bill_legs),
            issued_at_unix_ms=self.now,
        )
        return self.capture_of(bill, pairs)

    def claim(self, hold_id: bytes, pair: tuple[bytes, bytes]) -> pb.Operation:
        """A node's own claim for a leg."""
        assignment, receipt = pair
        body = pb.Claim(hold_id=hold_id, assignment=assignment, receipt=receipt)
        return pb.Operation(id=self.new_id(), claim=body)

    def release(self, node_id: str, amount: int = 0, below: int = 10**9) -> pb.Operation:
        """0: all that may be released."""
        body = pb.Release(node_id=node_id, amount_nano=amount, below_log_index=below)
        return pb.Operation(id=self.new_id(), release=body)

    def reinstate(self, node_id: str, pay_back: int = 0, by: str = "") -> pb.Operation:
        """By a statement that says so for the first time; ``by`` "": the market's own."""
        signer = self.signers[by] if by else self.market_signer
        statement = market_pb2.Reinstatement(
            market_id=self.market_id,
            node_id=node_id,
            issuer=signer.identity,
            reason=f"appeal {self.new_id().hex()}",
            issued_at_unix_ms=self.now,
        )
        body = pb.Reinstate(reinstatement=seal(statement, signer), pay_back_nano=pay_back)
        return pb.Operation(id=self.new_id(), reinstate=body)

    def payout(self, node_id: str, amount: int) -> pb.Operation:
        body = pb.PayoutStart(node_id=node_id, amount_nano=amount, rail="bank")
        return pb.Operation(id=self.new_id(), payout_start=body)

    def withdraw(self, node_id: str, amount: int, not_before: int) -> pb.Operation:
        body = pb.BondWithdraw(node_id=node_id, amount_nano=amount, not_before_unix_ms=not_before)
        return pb.Operation(id=self.new_id(), bond_withdraw=body)

    def settle(self, payout_id: bytes, *, paid: bool = True) -> pb.Operation:
        """What the rail said of a payout or a withdrawal."""
        body = pb.PayoutSettle(payout_id=payout_id, paid=paid)
        return pb.Operation(id=self.new_id(), payout_settle=body)

    def limit(self, api_key: str, most: int, period_ms: int = 0) -> pb.Operation:
        body = pb.SetSpendingLimit(api_key_id=api_key, limit_nano=most, period_ms=period_ms)
        return pb.Operation(id=self.new_id(), set_spending_limit=body)

    def reward(self, verdict_digest: bytes, amount: int, by: str = "verifier") -> pb.Operation:
        body = pb.Reward(
            verifier_id=self.identity(by), amount_nano=amount, verdict_digest=verdict_digest
        )
        return pb.Operation(id=self.new_id(), reward=body)

    def expire(self) -> pb.Operation:
        return pb.Operation(id=self.new_id(), expire=pb.Expire(limit=1000))

    def capture_of(
        self, bill: market_pb2.Bill, pairs: list[tuple[bytes, bytes]], signer: str = "router"
    ) -> pb.Operation:
        """A capture of any bill, right or wrong."""
        return pb.Operation(
            id=bill.bill_id,
            capture=pb.Capture(
                hold_id=bill.hold_id,
                bill=seal(bill, self.signers[signer]),
                assignments=[a for a, _ in pairs],
                receipts=[r for _, r in pairs],
            ),
        )

    def bill_leg(self, leg: Leg, assignment: bytes, receipt: bytes) -> market_pb2.BillLeg:
        charge = charge_nano(leg.billed_input, leg.billed_output, ASK_INPUT, ASK_OUTPUT)
        split = split_charge(charge, self.fee_ppm, self.pool_ppm)
        return market_pb2.BillLeg(
            assignment_digest=digest_of(assignment),
            receipt_digest=digest_of(receipt),
            node_id=leg.node.identity,
            choice_index=leg.choice,
            leg=leg.leg,
            billed_input_tokens=leg.billed_input,
            billed_output_tokens=leg.billed_output,
            ask_input_nano_per_mtok=ASK_INPUT,
            ask_output_nano_per_mtok=ASK_OUTPUT,
            client_charge_nano=charge,
            fee_nano=split.fee_nano,
            pool_nano=split.pool_nano,
            node_nano=split.node_nano,
            pool_subsidy_nano=leg.subsidy,
        )

    def verdict(
        self,
        receipt_digest: bytes,
        node_id: str,
        outcome: audit_pb2.Verdict.Outcome = audit_pb2.Verdict.REFUND,
        by: str = "verifier",
    ) -> bytes:
        return seal(
            audit_pb2.Verdict(
                market_id=self.market_id,
                verifier_id=self.identity(by),
                node_id=node_id,
                receipt_digest=receipt_digest,
                outcome=outcome,
            ),
            self.signers[by],
        )

    def request(self, receipt_digest: bytes, by: str = "verifier") -> pb.Operation:
        """A verifier asks for an audit in the log."""
        message = audit_pb2.AuditRequest(
            market_id=self.market_id,
            verifier_id=self.identity(by),
            receipt_digest=receipt_digest,
        )
        return self.publish(seal(message, self.signers[by]))

    def refund(
        self,
        receipt_digest: bytes,
        node_id: str,
        outcome: audit_pb2.Verdict.Outcome = audit_pb2.Verdict.REFUND,
        by: str = "verifier",
    ) -> pb.Operation:
        return pb.Operation(
            id=self.new_id(),
            refund=pb.Refund(
                receipt_digest=receipt_digest,
                reason="far outside",
                verdict=self.verdict(receipt_digest, node_id, outcome, by),
            ),
        )

    def conviction(self, node_id: str, change_point: int, by: str = "verifier") -> bytes:
        return seal(
            audit_pb2.Conviction(
                market_id=self.market_id,
                verifier_id=self.identity(by),
                node_id=node_id,
                change_point_index=change_point,
                first_verdict_index=1,
                last_verdict_index=9,
                verdicts=7,
                audited_tokens=700,
                wealth_log10_milli=6001,
                threshold_log10_milli=6000,
            ),
            self.signers[by],
        )

    def convict(
        self, node_id: str, change_point: int, reward_ppm: int = 100_000, by: str = "verifier"
    ) -> pb.Operation:
        return pb.Operation(
            id=self.new_id(),
            convict=pb.Convict(
                conviction=self.conviction(node_id, change_point, by), reward_ppm=reward_ppm
            ),
        )


def leg_charge(leg: Leg) -> int:
    """What the client pays for a leg."""
    return charge_nano(leg.billed_input, leg.billed_output, ASK_INPUT, ASK_OUTPUT)


def smaller(leg: Leg, **changes: int) -> Leg:
    """A leg with some numbers changed."""
    return replace(leg, **changes)  # type: ignore[arg-type]

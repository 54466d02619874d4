"""The router's table of nodes: offers, leases, breakers, in-flight counts, measurements.

Holds state and answers with frozen views; ``trueweight.router.choosing`` decides on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trueweight.protos.errors import InvalidRequest, OverCapacity
from trueweight.protos.v1.market_pb2 import Offer
from trueweight.router.breaker import Breaker, Measured
from trueweight.router.choosing import NodeView
from trueweight.router.exposure import Exposure
from trueweight.router.judges import Judges
from trueweight.router.node_session import NodeSession
from trueweight.router.offers import AllowList
from trueweight.router.quoting import Prices
from trueweight.router.waiting import Line
from trueweight.runtime.clock import Clock

MAX_NODES = 4096
# Views hold for so long if nothing of the fleet's own has changed; loads and leases may.
_VIEWS_HOLD_MS = 50.0
_AUDIT_SMOOTHING = 0.1
# Offers of nodes that were not heard for this long are forgotten.
_FORGET_AFTER_MS = 60 * 60_000.0


@dataclass
class NodeRecord:
    """One known node. ``in_flight`` and ``tokens_in_flight`` are this router's own counts."""

    offer: Offer
    heard_ms: float
    session: NodeSession | None = None
    breaker: Breaker = field(default_factory=Breaker)
    measured: Measured = field(default_factory=Measured)
    in_flight: int = 0
    tokens_in_flight: int = 0
    charge_in_flight_nano: int = 0
    # -1: not asked yet.
    bond_nano: int = -1
    locked_nano: int = 0

    @property
    def node_id(self) -> str:
        """The node's identity."""
        return self.offer.node_id

    def last_heard_ms(self) -> float:
        """When it last gave a sign of life, registration included (monotonic)."""
        heard = self.session.last_heard_ms if self.session else 0.0
        return max(self.heard_ms, heard)


class Fleet:
    """All nodes. ``min_bond_nano`` 0 means that no bond is asked for."""

    def __init__(
        self,
        clock: Clock,
        allow: AllowList,
        min_bond_nano: int = 0,
        *,
        judges: Judges,
        exposure: Exposure,
    ) -> None:
        self._clock, self._allow, self._min_bond_nano = clock, allow, min_bond_nano
        self._judges, self._exposure = judges, exposure
        # Set when a node came whose stake was not asked for yet.
        self.newcomer = asyncio.Event()
        self._nodes: dict[str, NodeRecord] = {}
        self._suspended: set[str] = set()
        # Share of audited answers that stood, by node; nodes without audits are absent.
        self._verified: dict[str, float] = {}
        self.line = Line()
        # What was answered last, by manifest: as of which change, and when.
        self._changes = 0
        self._views: dict[bytes, tuple[int, float, list[NodeView]]] = {}

    def remember(self, offer: Offer) -> NodeRecord:
        """Takes a verified offer. An older one than known is refused; what was measured stays."""
        record = self._nodes.get(offer.node_id)
        if record is None:
            self._make_room()
            record = NodeRecord(offer, self._clock.monotonic_ms())
            self._nodes[offer.node_id] = record
            self.newcomer.set()
        elif offer.issued_at_unix_ms < record.offer.issued_at_unix_ms:
            raise InvalidRequest("a newer offer of this node is known", hint="Sign a new one.")
        record.offer = offer
        record.heard_ms = self._clock.monotonic_ms()
        self._changes += 1
        return record

    def get(self, node_id: str) -> NodeRecord | None:
        """The record of a node, None if it is not known."""
        return self._nodes.get(node_id)

    def all(self) -> list[NodeRecord]:
        """All known nodes in order of id."""
        return [self._nodes[node_id] for node_id in sorted(self._nodes)]

    def suspend(self, node_id: str) -> None:
        """No new work from now on, known node or not."""
        self._suspended.add(node_id)
        self._changes += 1

    def lift(self, node_id: str) -> None:
        """Ends a suspension."""
        self._suspended.discard(node_id)
        self.wake()

    def is_suspended(self, node_id: str) -> bool:
        """True while it gets no new work."""
        return node_id in self._suspended

    def note_audit(self, node_id: str, *, verified: bool) -> None:
        """An audit of this node's answers ended."""
        if node_id in self._verified or len(self._verified) < MAX_NODES:
            old = self._verified.get(node_id, 1.0)
            self._verified[node_id] = old + _AUDIT_SMOOTHING * (float(verified) - old)

    def refusal(self, record: NodeRecord) -> str:
        """Why a connected node would get no paid work, in words; empty if it would."""
        if record.node_id in self._suspended:
            return "the node is suspended; see the log for the reason"
        if reason := self._allow.refusal(record.offer.fingerprint):
            return reason
        if not self._judges.are_enough_for(record.node_id):
            return "too few verifiers are independent of its declared owner"
        if not self._is_bonded(record):
            return f"its bond is below {self._min_bond_nano} nanocredits"
        return ""

    def views(self, manifest_digest: bytes) -> list[NodeView]:
        """How all nodes that offer these weights stand now. Not to be changed."""
        now = self._clock.monotonic_ms()
        changes, at_ms, found = self._views.get(manifest_digest, (-1, 0.0, []))
        if changes == self._changes and now - at_ms < _VIEWS_HOLD_MS:
            return found
        found = self._look(manifest_digest)
        if len(self._views) >= MAX_NODES:
            self._views.clear()
        self._views[manifest_digest] = self._changes, now, found
        return found

    def _look(self, manifest_digest: bytes) -> list[NodeView]:
        found = []
        for record in self._nodes.values():
            for model in record.offer.models:
                if model.manifest_digest == manifest_digest:
                    prices = Prices(model.ask_input_nano_per_mtok, model.ask_output_nano_per_mtok)
                    found.append(self._view(record, prices, model.max_context_tokens))
                    break
        return found

    @contextmanager
    def place(self, record: NodeRecord, tokens: int, charge_nano: int = 0) -> Iterator[None]:
        """Counts a request in flight for as long as the block runs, whatever happens in it."""
        record.in_flight += 1
        record.tokens_in_flight += tokens
        record.charge_in_flight_nano += charge_nano
        record.measured = record.measured.with_in_flight(record.in_flight)
        record.breaker = record.breaker.started()
        self._changes += 1
        try:
            yield
        finally:
            record.in_flight -= 1
            record.tokens_in_flight -= tokens
            record.charge_in_flight_nano -= charge_nano
            self.wake(record)

    def wake(self, record: NodeRecord | None = None) -> None:
        """Something changed, about this node only if one is named: lets those look again who have
        waited longest for what it offers."""
        self._changes += 1
        self.line.wake([m.manifest_digest for m in record.offer.models] if record else None)

    def _view(self, record: NodeRecord, prices: Prices, context: int) -> NodeView:
        session, now = record.session, self._clock.monotonic_ms()
        is_open = session is not None and session.is_open
        load = session.load if session else None
        silent_ms = now - (session.last_heard_ms if session else record.heard_ms)
        return NodeView(
            node_id=record.node_id,
            prices=prices,
            capacity=record.offer.capacity,
            max_context_tokens=context,
            in_flight=record.in_flight,
            tokens_in_flight=record.tokens_in_flight,
            waiting=load.waiting if load else 0,
            kv_use_ppm=load.kv_use_ppm if load else 0,
            connected=is_open,
            lease_fresh=silent_ms < record.offer.lease_ms,
            draining=session.draining if session else False,
            breaker_closed=record.breaker.allows(now),
            suspended=record.node_id in self._suspended,
            judged=self._judges.are_enough_for(record.node_id),
            bonded=self._is_bonded(record),
            fingerprint_allowed=not self._allow.refusal(record.offer.fingerprint),
            success=record.measured.success,
            verified=self._verified.get(record.node_id, 1.0),
            capacity_seen=float(record.measured.most_in_flight),
            prefill_tokens_per_s=record.measured.prefill_tokens_per_s,
            decode_tokens_per_s=record.measured.decode_tokens_per_s,
            completed=record.measured.completed,
            room_nano=self._room_nano(record, prices),
        )

    def _room_nano(self, record: NodeRecord, prices: Prices) -> int | None:
        stake = record.bond_nano + record.locked_nano if record.bond_nano >= 0 else -1
        # An output token comes with about one token of prompt; what was billed says it better.
        ask = prices.input_nano_per_mtok + prices.output_nano_per_mtok
        room = self._exposure.room_nano(record.node_id, stake, ask)
        return None if room is None else room - record.charge_in_flight_nano

    def _is_bonded(self, record: NodeRecord) -> bool:
        return self._min_bond_nano == 0 or record.bond_nano >= self._min_bond_nano

    def _make_room(self) -> None:
        if len(self._nodes) < MAX_NODES:
            return
        now = self._clock.monotonic_ms()
        idle = [r for r in self._nodes.values() if r.in_flight == 0 and r.session is None]
        for record in idle:
            # Identities are free: those that never did anything make room for new ones at once.
            if now - record.last_heard_ms() > _FORGET_AFTER_MS or not record.measured.completed:
                del self._nodes[record.node_id]
        if len(self._nodes) >= MAX_NODES:
            raise OverCapacity("this router knows too many nodes", hint="Try another router.")

"""What every part of a running node needs: who it is, what it serves, and its environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trueweight.node.admission import Terms
from trueweight.node.engine import Engine
from trueweight.node.journal import ReceiptJournal
from trueweight.node.workload import Workload
from trueweight.protos.identity import KeyRing, Signer
from trueweight.protos.v1.node_pb2 import Load
from trueweight.runtime.clock import Clock


@dataclass(frozen=True)
class Timing:
    """Durations in milliseconds. ``coalesce_ms`` is the least time between two frames with
    tokens; ``write_ms`` how long a router may refuse to read before it counts as lost."""

    handshake_ms: float = 10_000
    coalesce_ms: float = 20
    heartbeat_ms: float = 1_000
    deadline_tick_ms: float = 50
    write_ms: float = 30_000
    abort_ms: float = 10_000


@dataclass(frozen=True)
class NodeContext:
    """``ring`` and ``router_ids`` come from the signed market descriptor: only these routers may
    open sessions. ``offer`` gives the envelope of the current Offer."""

    signer: Signer
    market_id: str
    ring: KeyRing
    router_ids: frozenset[str]
    terms: Terms
    engine: Engine
    clock: Clock
    random: Callable[[int], bytes]
    journal: ReceiptJournal
    workload: Workload
    offer: Callable[[], bytes]
    timing: Timing = field(default_factory=Timing)

    def load(self) -> Load:
        """The node's load now."""
        load = self.engine.load()
        return Load(
            running=load.running,
            waiting=load.waiting,
            kv_use_ppm=max(0, min(1_000_000, round(load.kv_use * 1_000_000))),
            generated_tokens_total=load.generated_tokens_total,
            at_unix_ms=self.clock.now_unix_ms(),
        )

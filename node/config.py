"""What an operator decides about a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trueweight.node.context import Timing
from trueweight.node.registration import DEFAULT_LEASE_MS
from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.market import Market
from trueweight.runtime.rpc import host_and_port


@dataclass(frozen=True)
class NodeConfig:
    """``router`` is the member to work for (None with ``score_only``). ``listen`` and
    ``advertise`` are host:port; port 0 picks a free one. ``ledger_endpoint`` replaces the address
    in the market file, never the pinned certificate. ``capacity`` 0 is the engine's own.
    ``operator_keys`` is the key directory of the node's owner, who is declared with it."""

    model_dir: Path
    market: Market
    keys: Path
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    ask_input_nano_per_mtok: int = 0
    ask_output_nano_per_mtok: int = 0
    capacity: int = 0
    model_id: str | None = None
    router: Member | None = None
    ledger_endpoint: str = ""
    attach: bool = False
    score_for: frozenset[str] = frozenset()
    score_only: bool = False
    operator_keys: Path | None = None
    lease_ms: int = DEFAULT_LEASE_MS
    drain_ms: float = 30_000
    journal_path: Path | None = None
    timing: Timing = field(default_factory=Timing)


def pick_router(market: Market, wanted: str) -> Member:
    """The router to work for: by identity, by the endpoint in the market file, or, given another
    host:port, the market's only router at that address (its certificate stays pinned)."""
    routers = market.members(Member.ROUTER)
    if not routers:
        raise NotFound(
            "the market names no router", hint="Is it the current market file? See 'market show'."
        )
    if not wanted:
        return _reachable(routers[0])
    for router in routers:
        if wanted in (router.identity, router.endpoint):
            return _reachable(router)
    if ":" not in wanted:
        raise NotFound(
            f"the market names no router {wanted}", hint="'trueweight market show' lists them."
        )
    if len(routers) > 1:
        raise InvalidRequest(
            f"which of the market's {len(routers)} routers is {wanted}?",
            hint="Name it by its identity.",
        )
    moved = Member()
    moved.CopyFrom(routers[0])
    moved.endpoint = wanted
    return _reachable(moved)


def _reachable(router: Member) -> Member:
    if not router.endpoint or not router.tls_certificate_pem:
        raise InvalidRequest(
            "the market file has no address or certificate for the router",
            hint="Give the address with --router HOST:PORT, or get the current market file.",
        )
    return router


def advertised_endpoint(config: NodeConfig, listening: str) -> str:
    """The address that goes into the Offer. Raises InvalidRequest if nobody could dial it."""
    if config.attach:
        return ""
    port = listening.rpartition(":")[2]
    if config.advertise:
        host, wanted_port = host_and_port(config.advertise) or ("", 0)
        if not host:
            raise InvalidRequest(
                f"--advertise {config.advertise!r} is not HOST:PORT",
                hint="Write it as in gpu1.example:7001.",
            )
        return f"{host}:{wanted_port or port}"
    host = listening.rpartition(":")[0]
    if host in ("0.0.0.0", "[::]", "::"):  # noqa: S104
        raise InvalidRequest(
            f"nobody can dial {host}", hint="Say how to reach this node: --advertise HOST:PORT."
        )
    return listening


def check_config(config: NodeConfig, *, has_register: bool) -> None:
    """Raises InvalidRequest for what can be seen to be wrong before an engine is started."""
    if config.attach and config.router is None:
        raise InvalidRequest("--attach needs a router to dial", hint="Give --router.")
    if config.router is None and not config.score_only and not has_register:
        raise InvalidRequest("a node needs a router", hint="Give --router or --score-only.")
    advertised_endpoint(config, config.listen)

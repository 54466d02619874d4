"""What the log and the books say about a node's standing, as its audit rate sees it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from trueweight.protos.conviction import NodeEvidence
from trueweight.protos.deterrence import needed_rate_ppm
from trueweight.protos.money import PPM
from trueweight.protos.v1.ledger_pb2 import AccountRecord
from trueweight.verifier.deterrence import KNOWN_CHEATS, Cheat, Power, Stake, power_against
from trueweight.verifier.epochs import Standing
from trueweight.verifier.state import LogView


def stake_accounts(node_ids: Sequence[str]) -> list[str]:
    """The accounts that a conviction would take."""
    return [f"{kind}:{node}" for node in node_ids for kind in ("node-locked", "node-bond")]


def stakes(view: LogView, records: Sequence[AccountRecord]) -> dict[str, Stake]:
    """Every known node's stake, from balances of ``stake_accounts``."""
    balances = {record.account: int(record.available_nano or 0) for record in records}
    found = {}
    for node_id, record in view.nodes.items():
        price = record.price.nano_per_mtok
        locked, bond = (balances.get(a, 0) for a in stake_accounts([node_id]))
        found[node_id] = Stake(max(0, locked), max(0, bond), price, record.unsettled.nano)
    return found


def null_mean(view: LogView, verifier_id: str) -> float | None:
    """The median null mean over the classes of a verifier's newest calibrations: the power that a
    cheat meets in ordinary traffic. None without any calibration: the power is unknown."""
    newest = view.calibrations.newest(verifier_id)
    means = [e.mu0_nano / 1e9 for c in newest for e in c.entries.values()]
    return statistics.median(means) if means else None


def power(view: LogView, verifier_id: str, cheats: Sequence[Cheat] = KNOWN_CHEATS) -> Power | None:
    """The power of one verifier's calibrations in force; None if it is unknown."""
    mu0 = null_mean(view, verifier_id)
    return None if mu0 is None else power_against(mu0, cheats)


def standings(
    view: LogView, verifier_id: str, held: Mapping[str, Stake], known: Power | None
) -> dict[str, Standing]:
    """Every known node's standing with one verifier: from its own evidence, which nobody else's
    calibration or verdicts move, and what the node has at stake."""
    found = {}
    for node_id, record in view.nodes.items():
        own = record.by_verifier.get(verifier_id, NodeEvidence())
        found[node_id] = Standing(
            audited_tokens=own.scored_tokens,
            suspect=own.state != "clear",
            needed_ppm=_needed(held.get(node_id), known),
        )
    return found


def _needed(stake: Stake | None, known: Power | None) -> int:
    """Where power or stake are unknown, nothing below a full audit deters."""
    if stake is None or known is None:
        return PPM
    return needed_rate_ppm(stake.total_nano, stake.price_nano_per_mtok, known.gain_tokens)

"""Did the market do its job? Pure: what was observed in, one verdict per demand out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trueweight.protos.money import format_credits
from trueweight.simulation.observation import BilledLeg


@dataclass(frozen=True)
class Check:
    """One demand: whether it was met, and the facts in words."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Answered:
    """A request as its client saw it."""

    receipt_id: str
    client: str
    cost_nano: int
    completion_tokens: int
    error: str = ""


@dataclass(frozen=True)
class Observed:
    """Everything that is judged. Nodes by name; amounts in nanocredits.

    ``refundable_from``: by cheating node, the log index of the change point; ``receipt_index``: log
    index by receipt digest; ``refunded_at_once``: receipts whose own verdict refunds them.
    """

    requests_wanted: int
    answered: Sequence[Answered]
    legs: Sequence[BilledLeg]
    node_names: Mapping[str, str]
    cheats: frozenset[str]
    convicted: frozenset[str]
    suspended: frozenset[str]
    unaudited: int
    refundable_from: Mapping[str, int]
    receipt_index: Mapping[bytes, int]
    refunded_at_once: frozenset[bytes]
    refunds_by_client: Mapping[str, int]
    challenges: Mapping[str, bool]
    fsck: Mapping[str, Any] = field(default_factory=dict)


def judge(seen: Observed) -> list[Check]:
    """All demands, in the order in which they are shown."""
    return [
        _all_answered(seen),
        _billed_once(seen),
        _only_cheats_convicted(seen),
        _all_audited(seen),
        _clients_refunded(seen),
        _challenged(seen),
        _books_balance(seen),
    ]


def refunds_due(seen: Observed) -> dict[str, int]:
    """What each client should have got back: every charge of a convicted node since its change
    point, and every request whose own verdict refunds it."""
    client_of = {a.receipt_id: a.client for a in seen.answered}
    due: Counter[str] = Counter()
    for leg in seen.legs:
        since = seen.refundable_from.get(leg.node_id)
        index = seen.receipt_index.get(leg.receipt_digest, -1)
        at_once = leg.receipt_digest in seen.refunded_at_once
        if at_once or (since is not None and index >= since):
            due[client_of.get(leg.request_id, "?")] += leg.charge_nano
    return dict(due)


def _all_answered(seen: Observed) -> Check:
    failed = [a.error for a in seen.answered if a.error]
    good = len(seen.answered) - len(failed)
    detail = f"{good} of {len(seen.answered)} requests were answered"
    if failed:
        detail += f"; first error: {failed[0]}"
    return Check("requests answered", not failed and good >= seen.requests_wanted, detail)


def _billed_once(seen: Observed) -> Check:
    billed = Counter(dict.fromkeys((a.receipt_id for a in seen.answered if not a.error), 0))
    charged: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    request_ids = set()
    for leg in seen.legs:
        charged[leg.request_id] += leg.charge_nano
        tokens[leg.request_id] += leg.output_tokens
        request_ids.add(leg.request_id)
    wrong = [
        a.receipt_id
        for a in seen.answered
        if not a.error
        and (charged[a.receipt_id], tokens[a.receipt_id]) != (a.cost_nano, a.completion_tokens)
    ]
    strangers = request_ids - set(billed) - {a.receipt_id for a in seen.answered if a.error}
    detail = (
        f"{len(request_ids)} bills, {len(wrong)} differ from what the client was told, "
        f"{len(strangers)} without a request"
    )
    return Check("each billed once", not wrong and not strangers, detail)


def _only_cheats_convicted(seen: Observed) -> Check:
    names = seen.node_names
    convicted = sorted(names.get(n, n) for n in seen.convicted)
    passed = seen.convicted == seen.cheats and seen.suspended >= seen.cheats
    wanted = ", ".join(sorted(names.get(n, n) for n in seen.cheats)) or "nobody"
    return Check(
        "the cheat and only the cheat convicted",
        passed,
        f"convicted: {', '.join(convicted) or 'nobody'}; should be: {wanted}",
    )


def _all_audited(seen: Observed) -> Check:
    detail = f"{len(seen.legs)} receipts, {seen.unaudited} without a verdict"
    return Check("every newcomer's receipt audited", seen.unaudited == 0, detail)


def _clients_refunded(seen: Observed) -> Check:
    due = refunds_due(seen)
    clients = sorted({*due, *seen.refunds_by_client})
    wrong = [c for c in clients if due.get(c, 0) != seen.refunds_by_client.get(c, 0)]
    shown = "; ".join(
        f"{c} got {format_credits(seen.refunds_by_client.get(c, 0))} of "
        f"{format_credits(due.get(c, 0))}"
        for c in clients
    )
    passed = not wrong and (bool(due) or not seen.cheats)
    return Check("its clients refunded", passed, shown or "nothing to refund")


def _challenged(seen: Observed) -> Check:
    # A pass proves possession only, so the cheat, who has both copies, passes as well.
    shown = ", ".join(f"{n}: {'held' if ok else 'FAILED'}" for n, ok in seen.challenges.items())
    return Check("weights challenge answered", all(seen.challenges.values()), shown or "none")


def _books_balance(seen: Observed) -> Check:
    problems = seen.fsck.get("problems", ["fsck did not run"])
    clean = seen.fsck.get("clean") is True
    checked = f"{seen.fsck.get('transfers', '?')} transfers recomputed"
    return Check("books balance", clean, checked if clean else f"{problems[:3]}")

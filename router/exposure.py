"""How much more a node may have unsettled, from what verifiers state in the log.

The cap is ``trueweight.protos.deterrence``: at the node's audit rate its stake must outweigh twice
what the best detectable cheat gains until its conviction, and twice what nobody has judged yet.
While no verifier states the power of its audits, nothing is capped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trueweight.protos.deterrence import (
    PaidPrice,
    UnsettledWork,
    kth_largest,
    needed_nano,
    unsettled_cap_nano,
)
from trueweight.protos.money import PPM
from trueweight.protos.v1.audit_pb2 import EpochOpen, Verdict
from trueweight.protos.v1.market_pb2 import Bill
from trueweight.router.judges import Judges

MAX_NODES = 10_000
MAX_RATES = 10_000
MAX_LEGS = 256


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What the newest epoch of a verifier states."""

    number: int
    rates_ppm: Mapping[str, int]
    default_rate_ppm: int
    gain_tokens: int

    def rate_ppm(self, node_id: str) -> int:
        return min(PPM, self.rates_ppm.get(node_id, self.default_rate_ppm))


class _Node:
    """Work of one node that was billed."""

    def __init__(self, judges: int) -> None:
        self.unsettled = UnsettledWork(judges)
        self.price = PaidPrice()


class Exposure:
    """Feed it bills, verdicts and opened epochs in the order of the log."""

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._epochs: dict[str, _Epoch] = {}
        self._nodes: dict[str, _Node] = {}

    def opened(self, epoch: EpochOpen) -> None:
        """A verifier opened an epoch."""
        known = self._epochs.get(epoch.verifier_id)
        if known is not None and epoch.epoch <= known.number:
            return  # epochs only go forward
        rates = {r.node_id: r.rate_ppm for r in reversed(epoch.rates[:MAX_RATES])}
        self._epochs[epoch.verifier_id] = _Epoch(
            epoch.epoch, rates, epoch.default_rate_ppm, epoch.gain_tokens
        )

    def billed(self, bill: Bill, log_index: int) -> None:
        """A capture was logged. Its receipts are the leaves just before the bill, in order."""
        first_receipt = log_index - len(bill.legs)
        for number, leg in enumerate(bill.legs[:MAX_LEGS]):
            node = self._nodes.get(leg.node_id)
            if node is None:
                if len(self._nodes) >= MAX_NODES:
                    self._forget_a_settled_one()
                node = self._nodes[leg.node_id] = _Node(self._judges.needed)
            node.unsettled.earned(first_receipt + number, leg.client_charge_nano)
            node.price.earned(leg.client_charge_nano, leg.billed_output_tokens)

    def judged(self, verdict: Verdict, log_index: int) -> None:
        """A verifier that may judge the node published a verdict, about something before it."""
        node = self._nodes.get(verdict.node_id)
        if node is not None:
            about = min(verdict.receipt_log_index, log_index)
            node.unsettled.judged(verdict.verifier_id, about)

    def room_nano(self, node_id: str, stake_nano: int, ask_nano_per_mtok: int) -> int | None:
        """Charges that the node may have unsettled in addition; None if nothing is capped.

        An unknown stake (below 0) is none. ``ask_nano_per_mtok`` is what an output token costs by
        its offer; dearer if its clients were charged more."""
        gains = [e.gain_tokens for e in self._epochs.values()]
        gain_tokens = kth_largest(gains, self._judges.needed)
        if not gain_tokens:
            return None
        if (rate := self._rate_ppm(node_id)) <= 0:
            return 0
        price, unsettled = ask_nano_per_mtok, 0
        if (node := self._nodes.get(node_id)) is not None:
            unsettled = node.unsettled.nano
            price = max(price, node.price.nano_per_mtok)
        cap = unsettled_cap_nano(stake_nano, needed_nano(price, gain_tokens, rate))
        return max(0, cap - unsettled)

    def _rate_ppm(self, node_id: str) -> int:
        """The rate at which as many verifiers as convict audit the node; 0 if too few do."""
        rates = sorted(
            epoch.rate_ppm(node_id)
            for verifier_id, epoch in self._epochs.items()
            if self._judges.are_independent(verifier_id, node_id)
        )
        needed = self._judges.needed
        return rates[-needed] if len(rates) >= needed else 0

    def _forget_a_settled_one(self) -> None:
        settled = (n for n, node in self._nodes.items() if not node.unsettled.nano)
        del self._nodes[next(settled, next(iter(self._nodes)))]

"""What the public log and the books say about a market: read from a running ledger, never from
the simulation's own knowledge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from trueweight.protos.envelope import kind_of_type, open_envelope
from trueweight.protos.v1.ledger_pb2 import AccountRecord, TransferRecord
from trueweight.protos.v1.market_pb2 import Bill
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import Market
from trueweight.verifier.state import KINDS, LogView

_PAGE = 1000
_POLL_S = 0.25


@dataclass(frozen=True)
class BilledLeg:
    """One leg of a logged bill."""

    request_id: str
    node_id: str
    receipt_digest: bytes
    charge_nano: int
    output_tokens: int


@dataclass
class Observer:
    """A fold of the log that can be brought up to date."""

    market: Market
    view: LogView = field(init=False)
    bills: list[Bill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = LogView(self.market)

    async def refresh(self, ledger: LedgerPort) -> None:
        """Everything that is in the log now."""
        while True:
            page = await ledger.read_log(self.view.next_index, _PAGE, KINDS)
            for entry in page.entries:
                if kind_of_type(entry.kind) == "bill" or entry.kind == "bill":
                    opened = open_envelope(
                        entry.body, Bill, self.market.ring, self.market.market_id
                    )
                    self.bills.append(opened.message)
                self.view.apply(entry)
            self.view.next_index = max(self.view.next_index, page.next_index)
            if page.next_index >= page.tree_size:
                return

    @property
    def legs(self) -> list[BilledLeg]:
        """All billed legs in log order."""
        return [
            BilledLeg(
                request_id=bill.request_id.hex(),
                node_id=leg.node_id,
                receipt_digest=leg.receipt_digest,
                charge_nano=leg.client_charge_nano,
                output_tokens=leg.billed_output_tokens,
            )
            for bill in self.bills
            for leg in bill.legs
        ]

    @property
    def unaudited(self) -> int:
        """Receipts in the log that no verifier has judged."""
        judged = {v.leaf.message.receipt_digest for v in self.view.verdicts.values()}
        return sum(1 for r in self.view.receipts.values() if r.receipt_digest not in judged)

    @property
    def convicted(self) -> set[str]:
        """Node ids convicted by as many verifiers as the market asks for."""
        return {node_id for node_id in self.view.nodes if self.view.convicted(node_id)}


async def wait_until(
    condition: Callable[[], bool],
    refresh: Callable[[], Awaitable[None]],
    within_s: float,
) -> bool:
    """Refreshes until the condition holds; False at the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while True:
        await refresh()
        if condition():
            return True
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_POLL_S)


async def transfers_of(ledger: LedgerPort, account: str) -> list[TransferRecord]:
    """All transfers of an account, oldest first."""
    found: list[TransferRecord] = []
    after = 0
    while True:
        page = await ledger.transfers(account, after, _PAGE)
        found.extend(page.transfers)
        if not page.more:
            return found
        after = page.next_sequence


def received(transfers: list[TransferRecord], account: str, reason: str) -> int:
    """Nanocredits that came into an account for a reason."""
    return sum(
        t.amount_nano for t in transfers if t.credit_account == account and t.reason == reason
    )


async def available(ledger: LedgerPort) -> dict[str, int]:
    """Available nanocredits of every account."""
    records: list[AccountRecord] = await ledger.balances([])
    return {record.account: int(record.available_nano or 0) for record in records}

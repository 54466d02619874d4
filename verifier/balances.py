"""Reading what nodes have at stake, in pages that the ledger accepts."""

from __future__ import annotations

from collections.abc import Sequence

from trueweight.protos.v1.ledger_pb2 import AccountRecord
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier.standing import stake_accounts

# Two accounts each; a request names at most 1,024.
_NODES_PER_READ = 512


async def read_stakes(ledger: LedgerPort, node_ids: Sequence[str]) -> list[AccountRecord]:
    """Balances of the nodes' locked earnings and bonds; nothing for an empty list."""
    records: list[AccountRecord] = []
    for start in range(0, len(node_ids), _NODES_PER_READ):
        page = node_ids[start : start + _NODES_PER_READ]
        records += await ledger.balances(stake_accounts(page))
    return records

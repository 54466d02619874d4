"""Collecting from the ledger what a router withheld, before the hold that pays for it expires."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

from trueweight.node.journal import JournalEntry, ReceiptJournal
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import Conflict, StorageError, TrueweightError
from trueweight.protos.ids import derived_id
from trueweight.protos.v1 import ledger_pb2
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort

log = logging.getLogger(__name__)

# The router gets all the time but this; then the node asks for itself.
CLAIM_BEFORE_EXPIRY_MS = 60_000
_PERIOD_MS = 10_000
# Kept longer than any assignment is fresh, so that the journal also refuses replays.
_KEEP_MS = 3_600_000
# Of the node's own account, read in one round.
PAGE, MAX_PAGES = 1_000, 20
_EARNING = "earning"
# Assignments and receipts of one call to the ledger, which takes 8 MiB.
_MAX_CALL_BYTES = 2 * 1024 * 1024


def claim_operation(entry: JournalEntry) -> ledger_pb2.Operation:
    """The idempotent claim for one receipt."""
    return ledger_pb2.Operation(
        id=derived_id("claim", digest_of(entry.receipt)),
        claim=ledger_pb2.Claim(
            hold_id=entry.hold_id, assignment=entry.assignment, receipt=entry.receipt
        ),
    )


async def confirm_reports(
    journal: ReceiptJournal, ledger: LedgerPort, node_id: str, now_unix_ms: int
) -> int:
    """Ends receipts that a router reports as captured and that the node's own account shows as
    earned; how many.

    A router's word alone ends nothing: it could report a capture, give the hold back to its client
    and keep the node from claiming. One read of the account answers for up to 1,000 receipts.
    """
    if not journal.has_reports():
        return 0
    account = f"node-locked:{node_id}"
    for _ in range(MAX_PAGES):
        cursor = journal.earnings_cursor()
        page = await ledger.transfers(account, cursor, PAGE)
        earned = Counter(
            transfer.operation_id
            for transfer in page.transfers
            if transfer.credit_account == account and transfer.reason == _EARNING
        )
        if page.next_sequence > cursor:
            journal.note_earnings(earned, page.next_sequence, now_unix_ms)
        if not page.more:
            break
    return journal.settle_reports()


async def claim_due(journal: ReceiptJournal, ledger: LedgerPort, now_unix_ms: int) -> int:
    """Claims every receipt whose hold is about to end; how many claims the ledger keeps. It pays
    them when the hold expires without a capture.

    A refusal settles an entry as well, because almost always the router has captured already;
    only a conflict is asked about again while there is time, because the router may still have
    some to settle.
    """
    kept = 0
    while entries := journal.due(now_unix_ms + CLAIM_BEFORE_EXPIRY_MS):
        settled = 0
        for part in _parts(entries):
            ended, made = await _claim(journal, ledger, part, now_unix_ms)
            settled += ended
            kept += made
        if settled < len(entries):
            break
    return kept


def _parts(entries: list[JournalEntry]) -> Iterator[list[JournalEntry]]:
    """Claims that fit into one message: else a few large ones would keep all others waiting."""
    part: list[JournalEntry] = []
    size = 0
    for entry in entries:
        entry_bytes = len(entry.assignment) + len(entry.receipt)
        if part and size + entry_bytes > _MAX_CALL_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry_bytes
    yield part


async def _claim(
    journal: ReceiptJournal, ledger: LedgerPort, entries: list[JournalEntry], now_unix_ms: int
) -> tuple[int, int]:
    """How many entries are settled now, and how many claims the ledger keeps."""
    results = await ledger.apply([claim_operation(entry) for entry in entries])
    settled = kept = 0
    for entry, result in zip(entries, results, strict=True):
        refused = result.status == ledger_pb2.Result.REFUSED
        left_ms = entry.hold_expires_at_unix_ms - now_unix_ms
        if refused and result.code == Conflict.code and left_ms > 2 * _PERIOD_MS:
            continue
        journal.mark_claimed(entry.assignment_digest)
        settled += 1
        if refused:
            log.debug("claim settled otherwise: %s", result.code)
        else:
            kept += 1
    return settled, kept


async def claim_forever(
    journal: ReceiptJournal, ledger: LedgerPort, node_id: str, clock: Clock
) -> None:
    """Claims now and then until cancelled; failures are logged and tried again."""
    while True:
        await clock.sleep_ms(_PERIOD_MS)
        now = clock.now_unix_ms()
        try:
            with contextlib.suppress(TrueweightError):
                # Only saves claims; whatever is wrong with it, the claims are made.
                await confirm_reports(journal, ledger, node_id, now)
            # Whatever the ledger says: what nobody can claim any more is not kept for ever.
            journal.forget_expired(now - _KEEP_MS)
            kept = await claim_due(journal, ledger, now)
        except StorageError as error:
            log.error("%s", error)
        except TrueweightError as error:
            log.warning("claims must wait: %s", error)
        else:
            if kept:
                log.warning("%d receipts are not captured yet; claimed them", kept)

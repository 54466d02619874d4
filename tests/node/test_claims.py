"""What a node does to be paid, and what routers' reports can and cannot change about that."""

from __future__ import annotations

import pytest

from trueweight.node import claims
from trueweight.node.claims import claim_due, confirm_reports
from trueweight.node.journal import JournalEntry, ReceiptJournal
from trueweight.protos.errors import PayloadTooLarge, StorageError, Unavailable
from trueweight.protos.v1 import ledger_pb2

NOW = 1_790_000_000_000
NODE = "n" * 32


class Books:
    """The node's account, and the claims that came."""

    def __init__(self):
        self.transfers_made, self.claims, self.reads = [], [], 0

    def earn(self, bill_id, legs=1, reason="earning"):
        for _ in range(legs):
            self.transfers_made.append(
                ledger_pb2.TransferRecord(
                    sequence=len(self.transfers_made) + 1,
                    debit_account="clearing:acme",
                    credit_account=f"node-locked:{NODE}",
                    amount_nano=5,
                    reason=reason,
                    operation_id=bill_id,
                )
            )

    async def transfers(self, account, after_sequence=0, limit=1000):
        assert account == f"node-locked:{NODE}"
        self.reads += 1
        page = self.transfers_made[after_sequence : after_sequence + limit]
        last = page[-1].sequence if page else after_sequence
        return ledger_pb2.ListTransfersResponse(
            transfers=page, next_sequence=last, more=last < len(self.transfers_made)
        )

    async def apply(self, operations):
        self.claims += [o.claim.receipt for o in operations]
        return [ledger_pb2.Result(status=ledger_pb2.Result.APPLIED) for _ in operations]


@pytest.fixture
def books():
    return Books()


@pytest.fixture
def journal(tmp_path):
    made = ReceiptJournal(tmp_path / "journal.db")
    yield made
    made.close()


def digest(number):
    return number.to_bytes(32, "big")


def bill(number):
    return number.to_bytes(16, "big")


def fill(journal, count, assignment=lambda _: b"a"):
    from trueweight.protos.envelope import seal
    from trueweight.protos.v1.market_pb2 import Receipt
    from trueweight.simulation.ledger_world import make_signer

    signer = make_signer("node0", "m")
    for number in range(count):
        receipt = seal(Receipt(market_id="m", assignment_digest=digest(number)), signer)
        entry = JournalEntry(digest(number), b"h" * 16, NOW + 10_000, assignment(number), receipt)
        journal.record(entry)


async def look(journal, books):
    settled = await confirm_reports(journal, books, NODE, NOW)
    await claim_due(journal, books, NOW)
    return settled, len(books.claims)


async def test_a_reported_capture_that_the_ledger_shows_is_not_claimed(journal, books):
    fill(journal, 3)
    journal.note_reports([(digest(n), bill(n)) for n in range(3)])
    for number in range(3):
        books.earn(bill(number))
    assert await look(journal, books) == (3, 0)
    assert journal.knows(digest(0))  # still refused if it is dispatched again
    assert await look(journal, books) == (0, 0)
    assert books.reads == 1


async def test_without_reports_nothing_is_read_and_everything_is_claimed(journal, books):
    fill(journal, 2)
    assert await look(journal, books) == (0, 2)
    assert books.reads == 0


async def test_attack_a_router_reports_a_capture_that_never_was(journal, books):
    fill(journal, 2)
    journal.note_reports([(digest(0), bill(0)), (digest(1), bill(1))])
    books.earn(bill(1))
    assert await look(journal, books) == (1, 1)


async def test_attack_a_router_reports_two_receipts_under_one_captured_bill(journal, books):
    fill(journal, 2)
    journal.note_reports([(digest(0), bill(7)), (digest(1), bill(7))])
    books.earn(bill(7))
    assert await look(journal, books) == (1, 1)


async def test_attack_other_transfers_of_a_bill_are_no_earnings(journal, books):
    fill(journal, 1)
    journal.note_reports([(digest(0), bill(0))])
    books.earn(bill(0), reason="subsidy")
    assert await look(journal, books) == (0, 1)


async def test_attack_a_router_cannot_fill_the_journal_with_reports(journal):
    fill(journal, 1)
    journal.note_reports([(digest(n), bill(n)) for n in range(1, 1000)])
    assert not journal.has_reports()
    journal.note_reports([(b"", b"x" * 1_000_000)])
    assert not journal.has_reports()


async def test_attack_a_few_large_assignments_do_not_keep_all_others_from_being_claimed(
    journal, books, monkeypatch
):
    monkeypatch.setattr(claims, "_MAX_CALL_BYTES", 2000)
    calls = []

    async def apply(operations):
        size = sum(len(o.claim.assignment) + len(o.claim.receipt) for o in operations)
        if size > 2000 and len(operations) > 1:
            raise PayloadTooLarge("the operations do not fit into one message")
        calls.append(len(operations))
        return [ledger_pb2.Result(status=ledger_pb2.Result.APPLIED) for _ in operations]

    monkeypatch.setattr(books, "apply", apply)
    fill(journal, 7, lambda number: b"a" * (5000 if number < 2 else 300))
    assert await claim_due(journal, books, NOW) == 7
    assert calls[:2] == [1, 1] and sum(calls) == 7 and max(calls) > 1


def test_an_error_half_way_leaves_no_transaction_open(journal, tmp_path, monkeypatch):
    """Every receipt from then on would be in it, and gone with a kill."""
    real = journal._run

    def failing(sql, values):
        if sql.startswith("INSERT INTO cursor"):
            raise StorageError("the disk is full")
        return real(sql, values)

    monkeypatch.setattr(journal, "_run", failing)
    with pytest.raises(StorageError):
        journal.note_earnings({bill(1): 1}, 7, NOW)
    monkeypatch.undo()
    fill(journal, 1)
    other = ReceiptJournal(tmp_path / "journal.db")
    assert other.knows(digest(0)) and other.earnings_cursor() == 0
    other.close()


async def test_an_earning_that_is_seen_before_its_report_counts(journal, books):
    fill(journal, 2)
    journal.note_reports([(digest(0), bill(0))])
    books.earn(bill(1))
    books.earn(bill(0))
    assert await confirm_reports(journal, books, NODE, NOW) == 1
    journal.note_reports([(digest(1), bill(1))])
    assert await confirm_reports(journal, books, NODE, NOW) == 1


async def test_reports_survive_a_restart_and_old_ones_are_forgotten(tmp_path, books):
    first = ReceiptJournal(tmp_path / "j.db")
    fill(first, 2)
    first.note_reports([(digest(0), bill(0)), (digest(1), bill(1))])
    first.close()
    second = ReceiptJournal(tmp_path / "j.db")
    books.earn(bill(0))
    assert await confirm_reports(second, books, NODE, NOW) == 1
    second.forget_expired(NOW + 20_000)
    assert not second.has_reports()
    second.close()


async def test_long_histories_are_read_page_by_page(journal, books, monkeypatch):
    from trueweight.node import claims

    monkeypatch.setattr(claims, "PAGE", 10)
    fill(journal, 25)
    for number in range(25):
        books.earn(bill(number))
        journal.note_reports([(digest(number), bill(number))])
    assert await confirm_reports(journal, books, NODE, NOW) == 25
    assert books.reads == 3


async def test_an_unreachable_ledger_leaves_reports_for_later(journal, books):
    fill(journal, 1)
    journal.note_reports([(digest(0), bill(0))])

    async def down(*_):
        raise Unavailable("no ledger")

    answering, books.transfers = books.transfers, down
    with pytest.raises(Unavailable):
        await confirm_reports(journal, books, NODE, NOW)
    books.transfers = answering
    books.earn(bill(0))
    assert await confirm_reports(journal, books, NODE, NOW) == 1

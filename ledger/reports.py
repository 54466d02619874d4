"""What people ask of the books: balances, statements, exports. Read-only, straight from a
database, so that it works without a running ledger."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.progress
import sqlalchemy as sa
from rich.console import Console

from trueweight.ledger import archive as archiving
from trueweight.ledger.accounts import kind_of
from trueweight.ledger.archive import Archived
from trueweight.ledger.archived import Archive
from trueweight.ledger.findings import Findings
from trueweight.ledger.fsck import check
from trueweight.ledger.movements import debt_key
from trueweight.ledger.reader import MAX_PAGE, Reader
from trueweight.ledger.schema import is_current, make_engine, normal_url, sqlite_path
from trueweight.protos.errors import InvalidRequest, NotFound, StorageError, Unavailable
from trueweight.protos.money import format_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.market import load_market

_COLUMNS = (
    "sequence", "id", "at", "debit_account", "credit_account", "amount_nano", "currency", "phase",
    "pending_id", "reason", "operation_id",
)  # fmt: skip
MS_PER_DAY = 86_400_000
_PENDING_PHASES = (pb.TransferRecord.POST, pb.TransferRecord.VOID, pb.TransferRecord.EXPIRE)


def open_engine(database: str) -> sa.Engine:
    """Existing books of this schema version. Raises NotFound, InvalidRequest or Unavailable."""
    url = normal_url(database)
    if url.get_backend_name() == "sqlite" and not sqlite_path(url).exists():
        raise NotFound(f"there are no books at {sqlite_path(url)}")
    engine = make_engine(url)
    with database_errors():
        current = is_current(engine)
    if not current:
        raise InvalidRequest(
            "the database has another schema version", hint="Start 'trueweight ledger serve' on it."
        )
    return engine


def open_reader(database: str, archive: Path | None = None) -> Reader:
    """A reader of existing books and of what was archived from them."""
    return Reader(open_engine(database), archive)


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """The errors of a database, in the words of the one tree."""
    try:
        yield
    except sa.exc.OperationalError as error:
        raise Unavailable(
            f"the database cannot be used: {str(error.orig or error).partition(chr(10))[0][:300]}",
            hint="Is it running, and the disk not full?",
        ) from error
    except sa.exc.SQLAlchemyError as error:
        raise StorageError(
            f"the database failed: {str(error).partition(chr(10))[0][:300]}"
        ) from error


def balances(database: str, accounts: Sequence[str]) -> list[dict[str, Any]]:
    """Counters and available balance of accounts, or of all."""
    reader = open_reader(database)
    try:
        for account in accounts:
            kind_of(account)
        if accounts:
            known = {record.account: record for record in reader.balances(accounts)}
            for account in accounts:
                if account not in known:
                    raise _unknown(account)
            return [_balance(known[account]) for account in accounts]
        found: list[dict[str, Any]] = []
        after = ""
        while page := reader.all_balances(after, MAX_PAGE):
            found += [_balance(record) for record in page]
            after = page[-1].account
        return found
    finally:
        reader.close()


def _unknown(account: str) -> NotFound:
    return NotFound(
        f"nothing was ever moved to or from {account}",
        hint="'trueweight ledger balance' without a name lists all accounts.",
    )


def statement(
    database: str, account: str, limit: int, archive: Path | None = None
) -> list[dict[str, Any]]:
    """The last transfers of an account with the balance after each."""
    kind_of(account)
    reader = open_reader(database, archive)
    rows: list[dict[str, Any]] = []
    held: dict[bytes, int] = {}
    available = 0
    try:
        for record in _all_transfers(reader, account):
            available += _effect(record, account, held)
            rows.append(_statement_row(record, account, available))
            del rows[:-limit]
        if not rows:
            raise _unknown(account)
        return rows
    finally:
        reader.close()


def debts(database: str) -> list[dict[str, Any]]:
    """What is owed, by creditor and the operation that could not pay it, in nanocredits."""
    engine = open_engine(database)
    try:
        with database_errors(), engine.connect() as connection:
            keys = connection.execute(sa.text("SELECT key FROM reference WHERE kind = 'debt'"))
            paid = set(keys.scalars())
            rows = connection.execute(
                sa.text("SELECT operation_id, creditor, amount FROM debt ORDER BY creditor")
            )
            return [
                {"creditor": creditor, "owed": str(amount), "operation": bytes(operation).hex()}
                for operation, creditor, amount in rows
                if debt_key(bytes(operation), creditor) not in paid
            ]
    finally:
        engine.dispose()


def archive(database: str, directory: Path, older_than_days: float, now_unix_ms: int) -> Archived:
    """Moves old history into a directory; see ``trueweight.ledger.archive``."""
    engine = open_engine(database)
    try:
        with database_errors():
            return archiving.archive(
                engine, directory, now_unix_ms - round(older_than_days * MS_PER_DAY)
            )
    finally:
        engine.dispose()


def fsck(
    database: str,
    market_file: Path | None,
    *,
    show_progress: bool,
    archive: Path | None = None,
) -> Findings:
    """Checks the books of a database; see ``trueweight.ledger.fsck``."""
    engine = open_engine(database)
    keys: list[bytes] | None = None
    with database_errors(), engine.connect() as connection:
        market_id = str(
            connection.execute(sa.text("SELECT value FROM meta WHERE key = 'market'")).scalar()
        )
    if market_file is not None:
        market = load_market(market_file)
        member = market.member(Member.LEDGER)
        keys = market.ring.keys_of(member.identity)
        market_id = market.market_id
    moved = Archive(archive, market_id) if archive is not None else None
    try:
        if not show_progress:
            with database_errors():
                return check(engine, market_id, keys, archive=moved)
        with (
            database_errors(),
            rich.progress.Progress(console=Console(stderr=True), transient=True) as bar,
        ):
            task = bar.add_task("checking the books", total=None)
            return check(
                engine,
                market_id,
                keys,
                lambda what, done, total: bar.update(
                    task, description=f"checking {what}", completed=done, total=total
                ),
                moved,
            )
    finally:
        engine.dispose()


def export(database: str, form: str, out: Path, archive: Path | None = None) -> int:
    """All transfers as CSV or plain-text double entry; their number."""
    reader = open_reader(database, archive)
    try:
        return _EXPORTS[form](_all_transfers(reader, ""), out)
    finally:
        reader.close()


def _all_transfers(reader: Reader, account: str) -> Iterator[pb.TransferRecord]:
    after = 0
    while True:
        page = reader.transfers(account, after, MAX_PAGE)
        yield from page.transfers
        if not page.more:
            return
        after = page.next_sequence


def _effect(record: pb.TransferRecord, account: str, held: dict[bytes, int]) -> int:
    """Change of the available balance of one side of a transfer."""
    amount, debit = int(record.amount_nano), record.debit_account == account
    if record.phase == pb.TransferRecord.PENDING:
        held[record.id] = amount
        return -amount if debit else 0
    if record.phase in _PENDING_PHASES:
        before = held.pop(record.pending_id, 0)
        return before - amount if debit else amount
    return -amount if debit else amount


def _balance(record: pb.AccountRecord) -> dict[str, Any]:
    return {
        "account": record.account,
        "kind": pb.AccountKind.Name(record.kind).lower(),
        "currency": record.currency,
        "available": record.available_nano,
        "debits_pending": record.debits_pending_nano,
        "credits_pending": record.credits_pending_nano,
        "debits": record.debits_posted_nano,
        "credits": record.credits_posted_nano,
    }


def _statement_row(record: pb.TransferRecord, account: str, available: int) -> dict[str, Any]:
    debit = record.debit_account == account
    return {
        "sequence": record.sequence,
        "at": _time(record),
        "reason": record.reason,
        "phase": pb.TransferRecord.Phase.Name(record.phase).lower(),
        "other": record.credit_account if debit else record.debit_account,
        "amount": format_credits(-record.amount_nano if debit else record.amount_nano),
        "available": format_credits(available),
    }


def _row(record: pb.TransferRecord) -> tuple[Any, ...]:
    return (
        record.sequence,
        record.id.hex(),
        _time(record),
        record.debit_account,
        record.credit_account,
        record.amount_nano,
        record.currency,
        pb.TransferRecord.Phase.Name(record.phase).lower(),
        record.pending_id.hex(),
        record.reason,
        record.operation_id.hex(),
    )


def _time(record: pb.TransferRecord) -> str:
    moment = datetime.fromtimestamp(record.created_at_unix_ms / 1000, tz=UTC)
    return moment.isoformat(timespec="milliseconds")


def _to_csv(records: Iterator[pb.TransferRecord], out: Path) -> int:
    count = 0
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for record in records:
            writer.writerow(_row(record))
            count += 1
    return count


def _to_text(records: Iterator[pb.TransferRecord], out: Path) -> int:
    """The format of ledger-cli and hledger. Pending phases are comments: they move nothing."""
    count = 0
    with out.open("w") as file:
        for record in records:
            count += 1
            amount = format_credits(record.amount_nano)
            head = f"{_time(record)[:10]} {record.reason} ; {record.id.hex()}"
            if record.phase == pb.TransferRecord.PENDING or not record.amount_nano:
                file.write(f"; {head} {amount} {record.currency}\n\n")
                continue
            file.write(
                f"{head}\n    {record.credit_account}  {amount} {record.currency}\n"
                f"    {record.debit_account}  -{amount} {record.currency}\n\n"
            )
    return count


_EXPORTS = {"csv": _to_csv, "ledger": _to_text}

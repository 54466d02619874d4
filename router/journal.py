"""What the router owes the ledger, written down before it is sent and replayed after a crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from trueweight.protos.v1.ledger_pb2 import Operation
from trueweight.router.store import Store, captures, requests
from trueweight.router.transcripts import erase_before

PENDING, CAPTURED, REFUSED = 0, 1, 2
_SWEEP_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What a client may read back about its request; ``document`` is JSON without text."""

    request_id: bytes
    account: str
    document: bytes
    created_unix_ms: int


class Journal:
    """Captures and request records. Every method is one durable step."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record_bill(
        self,
        record: RequestRecord,
        capture: Operation,
        keep_transcripts: Sequence[Callable[[Connection], None]],
    ) -> None:
        """Bill, receipts and transcripts in one transaction, before the ledger hears of them."""
        bill_row = {
            "bill_id": capture.id,
            "request_id": record.request_id,
            "operation": capture.SerializeToString(),
            "state": PENDING,
            "created_unix_ms": record.created_unix_ms,
        }
        record_row = {
            "request_id": record.request_id,
            "account": record.account,
            "document": record.document,
            "created_unix_ms": record.created_unix_ms,
        }

        def work(connection: Connection) -> None:
            connection.execute(insert(captures).values(**bill_row))
            connection.execute(insert(requests).values(**record_row))
            for keep in keep_transcripts:
                keep(connection)

        await self._store.write(work)

    async def settle(self, bill_id: bytes, state: int, detail: str = "") -> None:
        """Writes down what became of a capture."""

        def work(connection: Connection) -> None:
            connection.execute(
                update(captures)
                .where(captures.c.bill_id == bill_id)
                .values(state=state, detail=detail[:500])
            )

        await self._store.write(work)

    async def pending(self, limit: int = 10_000) -> list[Operation]:
        """Captures whose outcome is not known, oldest first."""
        query = (
            select(captures.c.operation)
            .where(captures.c.state == PENDING)
            .order_by(captures.c.created_unix_ms)
            .limit(limit)
        )
        rows = await self._store.read(lambda c: list(c.scalars(query)))
        return [Operation.FromString(row) for row in rows]

    async def count(self, state: int) -> int:
        """How many captures are in a state, up to 1,000."""
        query = select(captures.c.bill_id).where(captures.c.state == state).limit(1000)
        return await self._store.read(lambda c: len(list(c.scalars(query))))

    async def find(self, request_id: bytes) -> tuple[RequestRecord, int] | None:
        """A request's record and the state of its capture."""
        query = (
            select(requests, captures.c.state)
            .join(captures, captures.c.request_id == requests.c.request_id, isouter=True)
            .where(requests.c.request_id == request_id)
        )
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None:
            return None
        record = RequestRecord(row.request_id, row.account, row.document, row.created_unix_ms)
        return record, PENDING if row.state is None else row.state

    async def sweep(self, transcripts_before_ms: int, records_before_ms: int) -> None:
        """Deletes what is older than it must be kept; a bounded amount in one transaction, so that
        others get their turns."""
        while await self._store.erase(erase_before(transcripts_before_ms, _SWEEP_LIMIT)):
            pass
        while await self._store.write(_records_before(records_before_ms)):
            pass


def _records_before(unix_ms: int) -> Callable[[Connection], int]:
    """A work that deletes some captures and records older than a time; how many it did."""

    def work(connection: Connection) -> int:
        old = (
            select(captures.c.bill_id)
            .where(captures.c.created_unix_ms < unix_ms, captures.c.state != PENDING)
            .limit(_SWEEP_LIMIT)
        )
        settled = connection.execute(delete(captures).where(captures.c.bill_id.in_(old)))
        aged = (
            select(requests.c.request_id)
            .where(requests.c.created_unix_ms < unix_ms)
            .limit(_SWEEP_LIMIT)
        )
        records = connection.execute(delete(requests).where(requests.c.request_id.in_(aged)))
        return settled.rowcount + records.rowcount

    return work

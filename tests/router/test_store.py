"""The router's database: group commit, keys, journal, transcripts and their erasure."""

from __future__ import annotations

import asyncio
import os

import pytest
from sqlalchemy import select

from trueweight.protos.errors import Erased, InvalidRequest, NotFound, StorageError, Unauthenticated
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.ledger_pb2 import Operation, Result, VoidHold
from trueweight.router import journal as journal_module
from trueweight.router import settling
from trueweight.router import store as store_module
from trueweight.router.api_keys import KeyGate, create_key, list_keys, revoke_key
from trueweight.router.journal import CAPTURED, PENDING, Journal, RequestRecord
from trueweight.router.settling import Settler
from trueweight.router.store import Store, captures, data_keys, requests, transcripts
from trueweight.router.transcripts import TranscriptBox, erase_request, load_master_key
from trueweight.runtime.clock import ManualClock, SystemClock

DIGEST = b"d" * 32
PROMPT = [4242, 4343, 4444] * 20


@pytest.fixture
async def store(tmp_path):
    opened = Store(tmp_path / "router.sqlite")
    yield opened
    await opened.close()


def capture(number):
    return Operation(id=bytes([number]) * 16, void_hold=VoidHold(hold_id=b"h" * 16))


def record(number, created=1000):
    return RequestRecord(bytes([number]) * 16, "client:a", b"{}", created)


async def test_concurrent_writes_share_commits_and_one_bad_write_fails_alone(store):
    journal = Journal(store)
    writes = [journal.record_bill(record(i), capture(i), []) for i in range(100)]
    writes.append(journal.record_bill(record(7), capture(7), []))
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(r) for r in results if r is not None] == [StorageError]
    assert len(await journal.pending()) == 100


async def test_journal_survives_reopening(tmp_path):
    store = Store(tmp_path / "router.sqlite")
    await Journal(store).record_bill(record(1), capture(1), [])
    await store.close()
    again = Store(tmp_path / "router.sqlite")
    assert [op.id for op in await Journal(again).pending()] == [b"\x01" * 16]
    await again.close()


class FlakyLedger:
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def apply(self, operations):
        self.asked += [op.id for op in operations]
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


async def test_a_capture_is_repeated_until_its_outcome_is_known(store):
    from trueweight.protos.errors import DeadlineExceeded, Unavailable

    journal = Journal(store)
    await journal.record_bill(record(1), capture(1), [])
    ledger = FlakyLedger(
        Unavailable("gone"), DeadlineExceeded("slow"), Result(status=Result.REPLAYED)
    )
    settler = Settler(ledger, journal, SystemClock())
    await settler.capture(capture(1), wait_ms=5_000)
    assert ledger.asked == [b"\x01" * 16] * 3
    assert await journal.pending() == []
    assert (await journal.find(b"\x01" * 16))[1] == CAPTURED


async def test_replay_after_a_crash_sends_what_was_journalled(store):
    journal = Journal(store)
    for i in (1, 2):
        await journal.record_bill(record(i), capture(i), [])
    refused = Result(status=Result.REFUSED, code="CONFLICT", message="the hold expired")
    ledger = FlakyLedger(Result(status=Result.APPLIED), refused)
    settler = Settler(ledger, journal, SystemClock())
    assert await settler.replay() == 2
    assert (settler.captured, settler.refused) == (1, 1)
    assert await settler.replay() == 0


async def test_beyond_its_bound_the_settler_leaves_captures_in_the_journal(store, monkeypatch):
    monkeypatch.setattr(settling, "MAX_IN_BACKGROUND", 1)
    journal = Journal(store)
    for i in (1, 2):
        await journal.record_bill(record(i), capture(i), [])
    asked, answer = [], asyncio.Event()

    class Silent:
        async def apply(self, operations):
            asked.extend(op.id for op in operations)
            await answer.wait()
            return [Result(status=Result.APPLIED)]

    settler = Settler(Silent(), journal, SystemClock())
    await settler.capture(capture(1), wait_ms=10)
    await settler.capture(capture(2), wait_ms=5_000)
    assert (settler.in_background, asked) == (1, [b"\x01" * 16])
    answer.set()
    await settler.close(wait_ms=5_000)
    assert [op.id for op in await journal.pending()] == [b"\x02" * 16]
    await settler.replay()
    assert (await journal.pending(), settler.captured) == ([], 2)


async def test_keys_are_hashed_checked_and_revoked(store, tmp_path):
    clock = ManualClock()
    key, text = create_key(store, "client:a", "laptop", clock, os.urandom)
    gate = KeyGate(store, clock)
    assert (await gate.check(f"Bearer {text}")).account == "client:a"
    assert text.split("-", 2)[2].encode() not in (tmp_path / "router.sqlite").read_bytes()
    for wrong in (None, "", "Bearer", f"Basic {text}", f"Bearer {text[:-1]}x", "Bearer sk-123",
                  "Bearer " + "x" * 5000, "Bearer \udcff", f"Bearer {text} {text}"):  # fmt: skip
        with pytest.raises(Unauthenticated):
            await gate.check(wrong)
    revoke_key(store, key.key_id, clock)
    clock.advance_ms(3_000)
    with pytest.raises(Unauthenticated):
        await gate.check(f"Bearer {text}")
    assert [k.revoked_unix_ms is not None for k in list_keys(store)] == [True]
    with pytest.raises(NotFound):
        revoke_key(store, key.key_id, clock)


@pytest.mark.parametrize("account", ["a", "client:", "node-locked:x", "client:A", "client:a b"])
async def test_keys_are_for_client_accounts_only(store, account):
    with pytest.raises(InvalidRequest):
        create_key(store, account, "", ManualClock(), os.urandom)


def transcript():
    return Transcript(salt=b"s" * 16, prompt_token_ids=PROMPT, output_token_ids=[7])


async def test_transcripts_are_encrypted_at_rest_and_erasure_destroys_the_key(store, tmp_path):
    box = TranscriptBox(load_master_key(tmp_path, os.urandom))
    plain = transcript().SerializeToString()
    await store.write(box.put(DIGEST, b"r" * 16, transcript(), 1))
    sealed = await store.read(box.get(DIGEST))
    assert plain[20:60] not in sealed.ciphertext
    assert box.open(sealed, DIGEST) == transcript()
    rows = await store.read(lambda c: list(c.execute(select(data_keys.c.wrapped))))
    assert sealed.data_key not in rows[0][0]
    assert await store.write(erase_request(b"r" * 16)) == 1
    assert await store.write(erase_request(b"r" * 16)) == 0
    with pytest.raises(Erased):
        await store.read(box.get(DIGEST))
    assert await store.read(lambda c: list(c.execute(select(data_keys)))) == []
    # What stays says that the client wanted it so, and nothing else.
    (left,) = await store.read(lambda c: list(c.execute(select(transcripts))))
    assert (left.nonce, left.ciphertext) == (b"", b"")
    assert await store.write(erase_request(b"r" * 16)) == 0


async def test_attack_who_reads_the_disk_finds_nothing_of_an_erased_transcript(store, tmp_path):
    box = TranscriptBox(load_master_key(tmp_path, os.urandom))
    await store.write(box.put(DIGEST, b"r" * 16, transcript(), 1))
    (key,) = await store.read(lambda c: list(c.scalars(select(data_keys.c.wrapped))))
    (row,) = await store.read(lambda c: list(c.execute(select(transcripts))))
    assert _files_with(tmp_path, key) and _files_with(tmp_path, row.ciphertext)
    others = (box.put(bytes([n]) * 32, b"o" * 16, transcript(), 1) for n in range(8))
    erased, *_ = await asyncio.gather(
        store.erase(erase_request(b"r" * 16)), *(store.write(other) for other in others)
    )
    assert erased == 1
    assert _files_with(tmp_path, key) == _files_with(tmp_path, row.ciphertext) == []


def _files_with(directory, part):
    return [
        path.name for path in directory.rglob("*") if path.is_file() and part in path.read_bytes()
    ]


async def test_an_erasure_that_a_reader_keeps_in_the_log_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BUSY_MS", 50)
    store = Store(tmp_path / "router.sqlite")
    box = TranscriptBox(load_master_key(tmp_path, os.urandom))
    await store.write(box.put(DIGEST, b"r" * 16, transcript(), 1))
    with store._engine.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT * FROM data_keys").fetchall()
        with pytest.raises(StorageError, match="reader"):
            await store.erase(erase_request(b"r" * 16))
    assert await store.erase(erase_request(b"r" * 16)) == 0
    await store.close()


async def test_another_master_key_opens_nothing(store, tmp_path):
    box = TranscriptBox(load_master_key(tmp_path / "a", os.urandom))
    await store.write(box.put(DIGEST, b"r" * 16, transcript(), 1))
    other = TranscriptBox(load_master_key(tmp_path / "b", os.urandom))
    with pytest.raises(StorageError, match="does not open"):
        await store.read(other.get(DIGEST))


async def test_attack_swapped_rows_do_not_open(store, tmp_path):
    from sqlalchemy import update

    box = TranscriptBox(load_master_key(tmp_path, os.urandom))
    for digest in (DIGEST, b"e" * 32):
        await store.write(box.put(digest, b"r" * 16, transcript(), 1))
    stolen = await store.read(
        lambda c: c.scalar(select(data_keys.c.wrapped).where(data_keys.c.receipt_digest == DIGEST))
    )
    await store.write(lambda c: c.execute(update(data_keys).values(wrapped=stolen)) and None)
    with pytest.raises(StorageError):
        await store.read(box.get(b"e" * 32))


def test_master_key_is_private(tmp_path):
    load_master_key(tmp_path, os.urandom)
    path = tmp_path / "transcript-master.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        load_master_key(tmp_path, os.urandom)


async def test_old_records_are_swept_and_pending_captures_never(store, tmp_path):
    journal, box = Journal(store), TranscriptBox(load_master_key(tmp_path, os.urandom))
    await journal.record_bill(
        record(1), capture(1), [box.put(DIGEST, b"\x01" * 16, transcript(), 1000)]
    )
    await journal.record_bill(record(2), capture(2), [])
    await journal.record_bill(record(3, created=9000), capture(3), [])
    await journal.settle(capture(1).id, CAPTURED)
    await journal.sweep(transcripts_before_ms=5000, records_before_ms=5000)
    left = await store.read(lambda c: list(c.scalars(select(captures.c.bill_id))))
    assert sorted(left) == [b"\x02" * 16, b"\x03" * 16]
    assert await journal.find(b"\x01" * 16) is None
    assert (await journal.find(b"\x03" * 16))[1] == PENDING
    with pytest.raises(NotFound):
        await store.read(box.get(DIGEST))


async def test_a_sweep_deletes_all_that_is_old_however_much_came_at_once(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(journal_module, "_SWEEP_LIMIT", 3)
    journal, box = Journal(store), TranscriptBox(load_master_key(tmp_path, os.urandom))
    for n in range(10):
        kept = box.put(bytes([n]) * 32, record(n).request_id, transcript(), 1000)
        await journal.record_bill(record(n), capture(n), [kept])
        if n != 4:
            await journal.settle(capture(n).id, CAPTURED)
    await journal.sweep(transcripts_before_ms=5000, records_before_ms=5000)
    left = await store.read(lambda c: [list(c.execute(select(t))) for t in (data_keys, requests)])
    assert left == [[], []]
    assert await store.read(lambda c: list(c.scalars(select(captures.c.bill_id)))) == [
        capture(4).id
    ]

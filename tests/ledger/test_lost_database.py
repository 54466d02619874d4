"""A writer that lost its lock, its network or its database must notice, and another take over."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import threading
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from trueweight.ledger import backend as backend_module
from trueweight.ledger import writer as writer_module
from trueweight.ledger.backend import ADVISORY_LOCK, PostgresBackend
from trueweight.ledger.schema import normal_url
from trueweight.protos.errors import TrueweightError, Unavailable
from trueweight.protos.v1 import ledger_pb2 as pb

from .conftest import Bench, fsck

CREDIT = 10**9
SO_ATTACH_FILTER = 26


def depose(url):
    """Takes the writer's lock away and nothing else."""
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///") + ".writer").unlink()
        return
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(
            "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_database d "
            "ON d.oid = l.database WHERE d.datname = current_database() "
            "AND l.locktype = 'advisory' AND l.objid = %s",
            (ADVISORY_LOCK & 0xFFFFFFFF,),
        ).fetchall()
        assert found == [(True,)]


async def until(condition, seconds, what):
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.02)


async def until_applied(ledger, caller, operation):
    for _ in range(400):
        with contextlib.suppress(TrueweightError):
            return (await ledger.as_caller(caller).apply([operation]))[0]
        await asyncio.sleep(0.02)
    raise AssertionError("nobody took over within 8 s")


async def test_an_idle_writer_notices_that_only_its_lock_is_gone(bench, start):
    standby = await start(bench.world, bench.url, wait_ms=0)
    depose(bench.url)
    await until(lambda: standby.is_writer, 5, "the standby takes over")
    await until(lambda: not bench.ledger.is_writer, 5, "the writer steps down")
    await asyncio.sleep(0.7)
    assert standby.is_writer and not bench.ledger.is_writer


async def test_a_deposed_writer_does_not_answer_refusals(bench, start, monkeypatch):
    """Refusals need no commit that would fail."""
    world, router = bench.world, bench.world.identity("router")
    standby = await start(world, bench.url, wait_ms=0)
    hold = world.hold("acme", CREDIT)
    (poor,) = await bench.do("router", hold)
    assert poor.code == "INSUFFICIENT_FUNDS"
    # (The clock counts from the start of the machine, which may be long ago.)
    monkeypatch.setattr(writer_module, "HOUSEKEEPING_MS", 1e13)
    depose(bench.url)
    await until(lambda: standby.is_writer, 5, "the standby takes over")
    deposit = world.deposit("acme", CREDIT)
    (result,) = await standby.as_caller(world.identity("admin")).apply([deposit])
    assert result.status == pb.Result.APPLIED
    with pytest.raises(Unavailable):
        await bench.do("router", hold)
    (result,) = await standby.as_caller(router).apply([hold])
    assert result.status == pb.Result.APPLIED


# -- the network ------------------------------------------------------------------------------


class Proxy:
    """TCP in front of a PostgreSQL's Unix socket. ``stall`` forwards nothing any more and keeps all
    connections; ``drop`` makes the kernel lose what the client sends, as a cable that is out."""

    def __init__(self, url):
        self._url = sa.make_url(url)
        directory = Path(self._url.query["host"])
        (path,) = (p for p in directory.glob(".s.PGSQL.*") if p.is_socket())
        self._path = str(path)
        self._stalled = threading.Event()
        self._closed = False
        # Forwarding stops when the client sends this: before or after it went through.
        self.stall_at, self.stall_after = b"", False
        self._clients, self._servers = [], []
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        port = self._listener.getsockname()[1]
        return self._url.set(host="127.0.0.1", port=port, query={}).render_as_string(False)

    @property
    def is_stalled(self):
        return self._stalled.is_set()

    def stall(self):
        self._stalled.set()

    def drop(self):
        for client in self._clients:
            _lose_what_comes(client)
        self.stall()

    def close(self):
        self._closed = True
        for each in (self._listener, *self._clients, *self._servers):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self):
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            if self.is_stalled:
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._path)
            self._servers.append(server)
            for ends in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source, target, from_client):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                hit = from_client and self.stall_at and self.stall_at in data
                if hit and not self.stall_after:
                    self.stall()
                if self.is_stalled:
                    return  # both ends stay open
                if hit:
                    self.stall()
                target.sendall(data)
            if not self.is_stalled:
                target.shutdown(socket.SHUT_RDWR)


def _lose_what_comes(connection):
    """A filter that lets no packet through, not even for an acknowledgement."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    code = struct.pack("HL", 1, ctypes.addressof(program))
    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, code)


@pytest.fixture
def hasty(monkeypatch):
    """The ledger's patience in tests' time."""
    short = {"idle_in_transaction_session_timeout TO '15s'": "idle_in_transaction_session_timeout "
             "TO '4s'"}  # fmt: skip
    settings = tuple(short.get(s, s) for s in backend_module._SETTINGS)
    assert settings != backend_module._SETTINGS
    monkeypatch.setattr(backend_module, "_SETTINGS", settings)
    monkeypatch.setattr(backend_module, "_LOCK_SETTING", "idle_session_timeout TO '4s'")
    monkeypatch.setattr(backend_module._Connection, "patience_s", 2.0)


@pytest.fixture
async def pair(databases, database, world, clock, start, hasty):  # noqa: PLR0917
    """A writer behind a proxy and a standby that reaches the database directly."""
    if databases.kind == "sqlite":
        pytest.skip("SQLite has no network")
    proxy = Proxy(database)
    writer = await start(world, proxy.url)
    standby = await start(world, database, wait_ms=0)
    assert writer.is_writer and not standby.is_writer
    yield Bench(world, clock, writer, database), standby, proxy
    proxy.close()
    for ledger in (writer, standby):
        await ledger.close()
    assert fsck(database, world).problems == []


async def takes_over(standby, world):
    await until(lambda: standby.is_writer, 8, "the standby takes over")
    hold = world.hold("acme", CREDIT)
    result = await until_applied(standby, world.identity("router"), hold)
    assert result.status == pb.Result.APPLIED


async def test_a_writer_behind_a_proxy_that_stopped_forwarding_steps_down(pair):
    bench, standby, proxy = pair
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    proxy.stall()
    await until(lambda: not bench.ledger.is_writer, 6, "the writer steps down")
    await takes_over(standby, bench.world)


async def test_a_writer_whose_query_is_never_answered_steps_down(pair):
    """The look for expired holds: every second, on the reading connection."""
    bench, standby, proxy = pair
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    proxy.stall_after, proxy.stall_at = True, b"due <= "
    await until(lambda: proxy.is_stalled, 3, "the query is sent")
    await until(lambda: not bench.ledger.is_writer, 6, "the writer steps down")
    await takes_over(standby, bench.world)


async def test_a_writer_whose_packets_are_lost_steps_down(pair, monkeypatch):
    """By keepalives and the limit on what is not acknowledged alone."""
    bench, standby, proxy = pair
    monkeypatch.setattr(backend_module._Connection, "patience_s", 60.0)
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    proxy.drop()
    await until(lambda: not bench.ledger.is_writer, 9, "the writer steps down")
    await takes_over(standby, bench.world)


@pytest.mark.parametrize("lost", ["COMMIT", "its answer"])
async def test_a_commit_that_hangs_does_not_keep_the_writer(pair, lost, monkeypatch):
    bench, standby, proxy = pair
    # The commit that is lost must be the hold's, not a checkpoint's.
    # (The clock counts from the start of the machine, which may be long ago.)
    monkeypatch.setattr(writer_module, "HOUSEKEEPING_MS", 1e13)
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    hold = bench.world.hold("acme", CREDIT)
    proxy.stall_after = lost != "COMMIT"
    proxy.stall_at = b"COMMIT"
    with pytest.raises(Unavailable):
        await asyncio.wait_for(bench.do("router", hold), 6)
    assert proxy.is_stalled
    await until(lambda: not bench.ledger.is_writer, 2, "the writer steps down")
    await until(lambda: standby.is_writer, 8, "the standby takes over")
    result = await until_applied(standby, bench.world.identity("router"), hold)
    done = {"COMMIT": pb.Result.APPLIED, "its answer": pb.Result.REPLAYED}
    assert result.status == done[lost]


def test_both_ends_of_the_writers_connection_watch_each_other(databases, database):
    if databases.kind == "sqlite":
        pytest.skip("SQLite has no network")
    proxy = Proxy(database)
    backend = PostgresBackend(normal_url(proxy.url))
    with socket.socket(fileno=backend._connection.pgconn.socket) as ours:
        try:
            options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
                       socket.TCP_USER_TIMEOUT]  # fmt: skip
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            found = [ours.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            assert found == [2, 1, 3, 4000]
        finally:
            ours.detach()
    assert backend.acquire()
    backend.confirm()
    for name in ("idle_session_timeout", "client_connection_check_interval"):
        assert backend.query(f"SHOW {name}")[0][0] in ("15s", "1s")
    backend.close()
    proxy.close()

"""Starts the processes of a market, knows when they serve, and leaves none behind.

Every process gets its own process group, so that Ctrl-C in a terminal reaches only the supervisor,
and a parent-death signal, so that not even kill -9 of the supervisor orphans it. A process says
that it serves by one JSON line on stdout (``trueweight.runtime.cli.print_ready``); its log goes to
a file in the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueweight.protos.errors import Conflict, DeadlineExceeded, NotFound, Unavailable

MAX_LINE_BYTES = 1024 * 1024
TAIL_LINES = 15
_MAX_TAIL_BYTES = 64 * 1024
_POLL_S = 0.05
GROUP_DEATH_S = 5.0


@dataclass(frozen=True)
class ProcessSpec:
    """One process: the command without the interpreter's own details, and how long it may take to
    serve. ``environment`` is added to this process's own."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0


@dataclass
class Running:
    """A started process. ``facts`` is its ready line; ``pid`` is also its process group."""

    spec: ProcessSpec
    process: asyncio.subprocess.Process
    log_path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    expected_to_end: bool = False
    watcher: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id and process group id."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """True until the process itself has ended."""
        return self.process.returncode is None


class Supervisor:
    """Starts, watches and ends processes. ``on_death`` hears of every death nobody asked for."""

    def __init__(
        self, run_directory: Path, on_death: Callable[[Running], None] = lambda _running: None
    ) -> None:
        self._logs = run_directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._running: dict[str, Running] = {}
        self._on_death = on_death

    @property
    def log_directory(self) -> Path:
        """Where the log files are, one per process name."""
        return self._logs

    def get(self, name: str) -> Running:
        """A process that was started. Raises NotFound."""
        try:
            return self._running[name]
        except KeyError:
            raise NotFound(f"no process {name} was started") from None

    @property
    def running(self) -> list[Running]:
        """All processes that were started and not yet ended, in order of start."""
        return [r for r in self._running.values() if r.is_alive]

    async def start(self, spec: ProcessSpec) -> dict[str, Any]:
        """Starts a process and waits until it serves; its ready line.

        Raises Unavailable with the end of its log if it dies first, DeadlineExceeded if it takes
        longer than ``ready_timeout_s`` (it is killed then), Conflict if it is running already.
        """
        known = self._running.get(spec.name)
        if known is not None and known.is_alive:
            raise Conflict(f"{spec.name} is running already")
        running = await self._spawn(spec)
        self._running[spec.name] = running
        try:
            running.facts = await asyncio.wait_for(_ready_line(running), spec.ready_timeout_s)
        except TimeoutError:
            await self.kill(spec.name)
            raise DeadlineExceeded(
                f"{spec.name} did not serve within {spec.ready_timeout_s:.0f} s",
                hint=_log_hint(running),
            ) from None
        except _EndedEarly:
            code = await self._finish(running)
            raise Unavailable(
                f"{spec.name} ended with exit code {code} before it served",
                hint=_log_hint(running),
            ) from None
        except BaseException:
            await self.kill(spec.name)
            raise
        running.watcher = asyncio.create_task(self._watch(running))
        return running.facts

    async def stop(self, name: str) -> int:
        """SIGTERM, then SIGKILL to the whole group; the exit code."""
        running = self.get(name)
        running.expected_to_end = True
        if running.is_alive:
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_exit_code(running), running.spec.stop_timeout_s)
        return await self._finish(running)

    async def kill(self, name: str) -> int:
        """kill -9 to the process and everything in its group."""
        running = self.get(name)
        running.expected_to_end = True
        return await self._finish(running)

    async def stop_all(self, stages: Sequence[Iterable[str]] = ()) -> None:
        """Ends everything: the named processes stage by stage, each stage at once, then the rest.

        Never raises for a process that ended by itself."""
        for stage in stages:
            await self._stop_many(n for n in stage if n in self._running)
        await self._stop_many(list(self._running))

    def kill_all_now(self) -> None:
        """SIGKILL to every group, without waiting: the last resort of an impatient exit."""
        for running in self._running.values():
            running.expected_to_end = True
            _kill_group(running.pid)

    def left_behind(self) -> list[str]:
        """Names whose process group still has a member."""
        return [name for name, running in self._running.items() if group_is_alive(running.pid)]

    async def _stop_many(self, names: Iterable[str]) -> None:
        await asyncio.gather(*(self.stop(name) for name in names))

    async def _spawn(self, spec: ProcessSpec) -> Running:
        log_path = self._logs / f"{spec.name}.log"
        wrapper = (sys.executable, "-m", "trueweight.simulation.child", str(os.getpid()))
        with log_path.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *wrapper,
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment},
                process_group=0,
                limit=MAX_LINE_BYTES,
            )
        return Running(spec, process, log_path)

    async def _watch(self, running: Running) -> None:
        drainer = asyncio.create_task(_drain(running))
        try:
            await _exit_code(running)
        finally:
            drainer.cancel()
        if not running.expected_to_end:
            _kill_group(running.pid)
            self._on_death(running)

    async def _finish(self, running: Running) -> int:
        _kill_group(running.pid)
        code = await _exit_code(running)
        await _group_death(running.pid)
        if running.watcher is not None:
            running.watcher.cancel()
            await asyncio.gather(running.watcher, return_exceptions=True)
        return code


class _EndedEarly(Exception):
    """The process closed its stdout before a ready line."""


async def _ready_line(running: Running) -> dict[str, Any]:
    """The first stdout line that is a JSON object with ``ready`` true; other lines are logged."""
    stdout = running.process.stdout
    if stdout is None:
        raise _EndedEarly
    while True:
        line = await _next_line(stdout)
        if not line:
            raise _EndedEarly
        with contextlib.suppress(ValueError):
            document = json.loads(line)
            if isinstance(document, dict) and document.get("ready") is True:
                return document
        _append(running.log_path, line)


async def _exit_code(running: Running) -> int:
    """Waits for the process itself. Not ``Process.wait``: that also waits until its pipes close,
    which a grandchild that inherited them prevents."""
    while True:
        code = running.process.returncode
        if code is not None:
            return code
        await asyncio.sleep(_POLL_S)


async def _group_death(group: int) -> None:
    """Waits, bounded, until a killed group is gone."""
    for _ in range(round(GROUP_DEATH_S / _POLL_S)):
        if not group_is_alive(group):
            return
        await asyncio.sleep(_POLL_S)


async def _drain(running: Running) -> None:
    stdout = running.process.stdout
    while stdout is not None and (line := await _next_line(stdout)):
        _append(running.log_path, line)


async def _next_line(stdout: asyncio.StreamReader) -> bytes:
    """A line, the beginning of one that is too long, or nothing at the end."""
    try:
        return await stdout.readline()
    except ValueError:
        return b"(a line that was too long)\n"


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)


def group_is_alive(group: int) -> bool:
    """True if a process group has a member that is not a zombie of ours."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    if not Path("/proc/self/stat").exists():
        return True
    return any(_living_group(entry) == group for entry in Path("/proc").glob("[0-9]*"))


def _living_group(entry: Path) -> int | None:
    """The process group of a /proc entry, None for a zombie or one that just ended."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    state, group = fields[0], int(fields[2])
    return None if state in ("Z", "X") else group


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _MAX_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _log_hint(running: Running) -> str:
    return f"The end of its log {running.log_path}:\n{tail(running.log_path)}"

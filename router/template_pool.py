"""Child processes that render chat templates, kept warm. Blocking: called from threads."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import orjson

from trueweight.protos.errors import Unavailable
from trueweight.router.template_child import READY, UNKNOWN, receive, send

# A child has 2 s of processor time for a job; this is for a machine that does not give it that.
_MAX_JOB_S = 10.0
_MAX_START_S = 30.0
_MAX_IDLE = 4
# Of the router's environment, what an interpreter may need to find its modules.
_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


class _Child:
    def __init__(self) -> None:
        self._link, other = socket.socketpair()
        try:
            with other:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "trueweight.router.template_child"],
                    stdin=other.fileno(),
                    stdout=subprocess.DEVNULL,
                    # A traceback may quote a prompt.
                    stderr=subprocess.DEVNULL,
                    env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
                )
        except BaseException:
            self._link.close()
            raise

    def hello(self) -> bool:
        """True once it is ready."""
        return receive(self._link, time.monotonic() + _MAX_START_S) == READY

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: dict[str, Any]) -> bytes:
        """Its answer. Raises OSError (TimeoutError included) or EOFError if there will be none."""
        until_s = time.monotonic() + _MAX_JOB_S
        self._link.settimeout(_MAX_JOB_S)
        send(self._link, orjson.dumps(job))
        return receive(self._link, until_s)

    def end(self) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()


class TemplatePool:
    """As many children as callers at once; a few of them stay. Safe to use from threads."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, sha256: str, text: str, job: dict[str, Any]) -> bytes | None:
        """A child's answer about one template; None if the child took more than it may, or crashed,
        and was ended. Raises Unavailable if there can be no child, TypeError if the job is no
        JSON."""
        child = self._take()
        try:
            answer = child.ask({**job, "sha256": sha256, "text": None})
            if answer[:1] == UNKNOWN:
                answer = child.ask({**job, "sha256": sha256, "text": text})
        except (OSError, EOFError):
            child.end()
            return None
        except BaseException:
            child.end()
            raise
        self._give(child)
        return answer

    def close(self) -> None:
        """Ends the children that nobody uses; others end after their job."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for child in idle:
            child.end()

    def _take(self) -> _Child:
        while True:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is None:
                return _start()
            if child.alive:
                return child
            child.end()

    def _give(self, child: _Child) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(child)
                return
        child.end()


def _start() -> _Child:
    child = None
    try:
        child = _Child()
        if child.hello():
            return child
    except (OSError, EOFError, subprocess.SubprocessError):
        pass
    if child is not None:
        child.end()
    raise Unavailable(
        "This router cannot start a process for chat templates.", hint="Try again in a moment."
    )


# One for all models and routers of this process.
POOL = TemplatePool()
atexit.register(POOL.close)

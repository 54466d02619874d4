"""Renders chat templates in a process of its own: the other end of ``template_pool``.

A template is a publisher's program, and nothing inside an interpreter bounds what a program takes:
doubled lists, ``'%0999999999d' % 1``, a pattern that backtracks. The kernel does: this process may
use so much memory and, for each template, so much processor time, or it ends.
Imports little, so that a new one is there soon.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import orjson
from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# First byte of an answer; text follows.
READY, DONE, REFUSED, FAILED, UNKNOWN, BAD_TEMPLATE = b"y", b"d", b"r", b"f", b"u", b"b"

_MAX_FRAME_BYTES = 256 * 1024 * 1024
_READ_BYTES = 256 * 1024
_MAX_RENDERED_CHARS = 12 * 1024 * 1024
_MAX_CPU_S = 2.0
# The longest prompts in the widest characters, several times over.
_MAX_MEMORY_BYTES = 512 * 1024 * 1024
_MAX_TEMPLATES = 64
_MAX_WORDS_CHARS = 200


def send(link: socket.socket, *parts: bytes) -> None:
    """One frame: length in 4 bytes, then the parts."""
    link.sendall(sum(map(len, parts)).to_bytes(4, "big") + b"".join(parts))


def receive(link: socket.socket, until_s: float | None = None) -> bytes:
    """The next frame; there is never more than one. Raises EOFError at the end, TimeoutError at
    ``until_s`` (monotonic)."""
    data, size = bytearray(), _MAX_FRAME_BYTES
    while len(data) < size:
        if until_s is not None:
            link.settimeout(max(0.001, until_s - time.monotonic()))
        piece = link.recv(_READ_BYTES)
        data += piece
        if len(data) >= 4:
            size = 4 + int.from_bytes(data[:4], "big")
        if not piece or size > _MAX_FRAME_BYTES:
            raise EOFError
    return bytes(data[4:])


def make_sandbox() -> ImmutableSandboxedEnvironment:
    """Jinja as model templates expect it, without clock and chance."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters.pop("random")
    sandbox.globals.pop("lipsum")
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.filters["tojson"] = _to_json
    return sandbox


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 8) if indent else None)


def _raise_exception(message: Any) -> str:
    raise TemplateError(str(message)[:_MAX_WORDS_CHARS])


def _fixed_clock(date: str) -> Callable[[str], str]:
    moment = time.strptime(date, "%Y-%m-%d")
    return lambda form: time.strftime(str(form)[:64], moment)


class _Renderer:
    """Answers jobs; keeps the templates that it has compiled."""

    def __init__(self) -> None:
        self._sandbox = make_sandbox()
        self._templates: dict[str, Template] = {}

    def answer(self, job: dict[str, Any]) -> tuple[bytes, bytes]:
        """Status and text."""
        try:
            template = self._template(job["sha256"], job["text"])
        # Jinja's own, and whatever Python says of the code that Jinja makes of it.
        except Exception as error:  # noqa: BLE001
            return BAD_TEMPLATE, _words(error)
        if template is None:
            return UNKNOWN, b""
        if job["messages"] is None:
            return DONE, b""
        try:
            return DONE, _render(template, job).encode()
        except TemplateError as error:
            return REFUSED, _words(error)
        except Exception:  # noqa: BLE001
            return FAILED, b""

    def _template(self, sha256: str, text: str | None) -> Template | None:
        if text is not None and sha256 not in self._templates:
            while len(self._templates) >= _MAX_TEMPLATES:
                del self._templates[next(iter(self._templates))]
            self._templates[sha256] = self._sandbox.from_string(text)
        return self._templates.get(sha256)


def _render(template: Template, job: dict[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(
        messages=job["messages"],
        add_generation_prompt=True,
        bos_token=job["bos_token"],
        eos_token=job["eos_token"],
        date_string=job["date"],
        strftime_now=_fixed_clock(job["date"]),
        tools=None,
    ):
        size += len(piece)
        if size > _MAX_RENDERED_CHARS:
            raise SecurityError("the prompt is too long")
        pieces.append(piece)
    return "".join(pieces)


def _words(error: Exception) -> bytes:
    return str(error)[:_MAX_WORDS_CHARS].encode("utf-8", "replace")


def _lock_down() -> None:
    # Its end is the router's to choose, not that of a terminal or of a group of processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    # Prompts belong into no core file and into no other file.
    for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(which, (0, 0))


def main() -> None:
    """Serves the socket that is its standard input until that closes."""
    _lock_down()
    renderer = _Renderer()
    with contextlib.suppress(EOFError, OSError), socket.socket(fileno=0) as link:
        send(link, READY)
        while True:
            job = orjson.loads(receive(link))
            # Its default action ends the process, whatever code is running.
            signal.setitimer(signal.ITIMER_PROF, _MAX_CPU_S)
            answer = renderer.answer(job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(link, *answer)


if __name__ == "__main__":
    main()

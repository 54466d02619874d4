"""Evidence bundles: one audit with everything that a third party needs to replay it.

A bundle holds the opened transcript, so it holds the text of a request: whoever exports one hands
out that text. The public log never does.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.v1.audit_pb2 import Transcript

FORMAT = "trueweight-evidence-1"
MAX_BUNDLE_BYTES = 64 * 1024 * 1024
MAX_KEY_EVENTS = 16


@dataclass(frozen=True)
class Bundle:
    """Envelopes as they are in the log, and the opened transcript."""

    verdict: bytes
    registry_entry: bytes
    calibration: bytes
    key_events: tuple[bytes, ...]
    transcript: Transcript


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Writes a bundle that only its owner can read; refuses to overwrite."""
    document = {
        "format": FORMAT,
        "verdict": _text(bundle.verdict),
        "registry_entry": _text(bundle.registry_entry),
        "calibration": _text(bundle.calibration),
        "key_events": [_text(event) for event in bundle.key_events],
        "transcript": _text(bundle.transcript.SerializeToString()),
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already", hint="Name another file.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(document, indent=1) + "\n")


def read_bundle(data: bytes) -> Bundle:
    """Parses foreign bytes within bounds; nothing of it is believed yet. Raises InvalidRequest."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise InvalidRequest("the bundle is too large")
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise InvalidRequest("not an evidence bundle of this version")
        events = document["key_events"]
        if not isinstance(events, list) or len(events) > MAX_KEY_EVENTS:
            raise InvalidRequest(f"a bundle has at most {MAX_KEY_EVENTS} key events")
        return Bundle(
            verdict=_bytes(document["verdict"]),
            registry_entry=_bytes(document["registry_entry"]),
            calibration=_bytes(document["calibration"]),
            key_events=tuple(_bytes(event) for event in events),
            transcript=Transcript.FromString(_bytes(document["transcript"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error, DecodeError):
        raise InvalidRequest("the evidence bundle is damaged") from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError("expected base64 text")
    return base64.b64decode(text, validate=True)

"""Calibrations as files: unsigned measurements that a verifier signs for its own market.

A file names what computes the logits (``weights_sha256``), because a manifest's digest differs
from market to market and changes with a model card, while weights and configuration do not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from trueweight.protos.calibrations import MAX_ENTRIES, fault_of
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import CLIP_LOGIT
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry
from trueweight.protos.v1.model_pb2 import Manifest

FORMAT = "trueweight-calibration-1"
MAX_FILE_BYTES = 1024 * 1024
# The ledger takes messages of at most 256 KiB with their envelope.
MAX_STATED_BYTES = 192 * 1024
MAX_VERSION = 2**32 - 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
CLIP_MICRO_LOGIT = round(CLIP_LOGIT * 1e6)
_MAX_NAME = 64


def weights_sha256(manifest: Manifest) -> bytes:
    """SHA-256 over path and SHA-256 of every file that decides the logits, in manifest order."""
    digest = hashlib.sha256(b"trueweight/weights/v1\x00")
    for entry in manifest.files:
        if entry.path.endswith(WEIGHT_SUFFIXES) or entry.path == "config.json":
            digest.update(entry.path.encode() + b"\x00" + entry.sha256)
    return digest.digest()


@dataclass(frozen=True)
class Measured:
    """What a calibration file holds."""

    weights: bytes
    version: int
    provenance: str
    entries: tuple[CalibrationEntry, ...]

    def statement(
        self, market_id: str, verifier_id: str, manifest_digest: bytes, now_unix_ms: int
    ) -> Calibration:
        """The message that this verifier signs."""
        return Calibration(
            market_id=market_id,
            manifest_digest=manifest_digest,
            version=self.version,
            clip_micro_logit=CLIP_MICRO_LOGIT,
            entries=self.entries,
            provenance=self.provenance,
            created_at_unix_ms=now_unix_ms,
            verifier_id=verifier_id,
        )


def write_measured(path: Path, measured: Measured) -> None:
    """Writes the file, readable and diffable."""
    document = {
        "format": FORMAT,
        "weights_sha256": measured.weights.hex(),
        "version": measured.version,
        "clip_micro_logit": CLIP_MICRO_LOGIT,
        "provenance": measured.provenance,
        "entries": [MessageToDict(e, preserving_proto_field_name=True) for e in measured.entries],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def read_measured(path: Path) -> Measured:
    """Reads and checks a file. Raises InvalidRequest naming what is wrong."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{path} is too large for a calibration file")
        document = json.loads(path.read_text())
        measured = Measured(
            bytes.fromhex(document["weights_sha256"]),
            int(document["version"]),
            str(document["provenance"]),
            tuple(ParseDict(e, CalibrationEntry()) for e in document["entries"]),
        )
        known = (document["format"], document["clip_micro_logit"]) == (FORMAT, CLIP_MICRO_LOGIT)
    except FileNotFoundError:
        raise InvalidRequest(
            f"there is no calibration file at {path}",
            hint="Make one with 'trueweight verifier calibrate'.",
        ) from None
    except OSError as error:
        raise InvalidRequest(f"cannot read the calibration file {path}: {error.strerror}") from None
    except RecursionError:
        raise InvalidRequest(f"{path} is not a calibration file: it is nested too deep") from None
    except (KeyError, TypeError, ValueError, OverflowError, ParseError) as error:
        raise InvalidRequest(f"{path} is not a calibration file: {error}") from None
    if not known:
        raise InvalidRequest(f"{path} has another format or clip than this version uses")
    if fault := _fault_of_file(measured):
        raise InvalidRequest(
            f"{path}: {fault}",
            hint="Damaged, or of too few tokens: measure again ('trueweight verifier calibrate').",
        )
    return measured


def _fault_of_file(measured: Measured) -> str:
    """Why it cannot be a calibration; empty if it can."""
    if len(measured.weights) != hashlib.sha256().digest_size:
        return "weights_sha256 is no SHA-256"
    if not 0 < measured.version <= MAX_VERSION:
        return f"a version is a number from 1 to {MAX_VERSION}"
    if not measured.provenance.isprintable():
        return "the provenance is not one line of printable text"
    names = [entry.parameter_class for entry in measured.entries]
    if not 0 < len(names) <= MAX_ENTRIES or len(set(names)) != len(names):
        return f"it has 1 to {MAX_ENTRIES} entries, each of another class"
    if not all(0 < len(name) <= _MAX_NAME and name.isprintable() for name in names):
        return f"a class is printable text of 1 to {_MAX_NAME} characters"
    for entry in measured.entries:
        if fault := fault_of(entry):
            return f"the entry {entry.parameter_class!r} is not usable: {fault}"
    stated = sum(entry.ByteSize() for entry in measured.entries)
    if stated + len(measured.provenance.encode()) > MAX_STATED_BYTES:
        return f"what it states takes more than {MAX_STATED_BYTES} bytes"
    return ""

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

from trueweight.protos.calibrations import is_usable
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import CLIP_LOGIT
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry
from trueweight.protos.v1.model_pb2 import Manifest

FORMAT = "trueweight-calibration-1"
MAX_FILE_BYTES = 1024 * 1024
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
CLIP_MICRO_LOGIT = round(CLIP_LOGIT * 1e6)


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
    except (KeyError, TypeError, ValueError, ParseError) as error:
        raise InvalidRequest(f"{path} is not a calibration file: {error}") from None
    if not known:
        raise InvalidRequest(f"{path} has another format or clip than this version uses")
    for entry in measured.entries:
        if not is_usable(entry):
            raise InvalidRequest(f"{path}: the entry {entry.parameter_class!r} is out of range")
    return measured

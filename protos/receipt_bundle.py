"""What a client gets for one request, ``GET /v1/receipts/{id}``, and how it is checked offline.

The JSON object (routers write it with ``ReceiptBundle.to_json``):

| key | value |
|---|---|
| ``request_id`` | 32 hex digits, the request id of every assignment |
| ``assignments`` | list of base64 Envelope of Assignment, in order of (choice, leg) |
| ``receipts`` | list of base64 Envelope of Receipt, one per assignment, same order |
| ``bill`` | base64 Envelope of Bill, whose legs are in the same order |
| ``key_events`` | list of base64 Envelope of KeyEvent: the nodes' operational keys |
| ``salt`` | 32 hex digits; keys the prompt, prefix and output digests |
| ``prompt_token_ids`` | list of ids |
| ``prefix_token_ids`` | list of lists, one per assignment (empty lists on first legs) |
| ``output_token_ids`` | list of lists, one per assignment: the ids that the receipt signs |
| ``template_sha256`` | hex digest of the chat template that made the prompt; "" for completions |
| ``date`` | the date the template was given, "YYYY-MM-DD" |
| ``inclusion`` | optional: ``{"checkpoint": note, "bill": PROOF, "receipts": [PROOF, ...]}`` |

After erasure routers send ``"erased": true`` without salt and ids; that cannot be checked.
PROOF is ``{"index": n, "path": [hex, ...]}``: the leaf is the envelope's bytes, the tree that of
the checkpoint. ``receipts`` inside ``inclusion`` may be left out.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.ids import ID_BYTES
from trueweight.protos.merkle import HASH_BYTES, MAX_LEVEL
from trueweight.protos.tokens import SALT_BYTES

MAX_BUNDLE_BYTES = 64 * 1024 * 1024
MAX_LEGS = 512
MAX_TOKENS = 1 << 22
MAX_TOKEN_ID = 2**32 - 1

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeafProof:
    """Where a leaf is in the log, and the hashes from it to the root."""

    index: int
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Inclusion:
    """A signed checkpoint and proofs against it; ``receipts`` is empty or one per leg."""

    checkpoint: str
    bill: LeafProof
    receipts: tuple[LeafProof, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiptBundle:
    """The parsed object; envelopes are bytes and not judged yet."""

    request_id: bytes
    assignments: tuple[bytes, ...]
    receipts: tuple[bytes, ...]
    bill: bytes
    key_events: tuple[bytes, ...]
    salt: bytes
    prompt_token_ids: Ids
    prefix_token_ids: tuple[Ids, ...]
    output_token_ids: tuple[Ids, ...]
    template_sha256: bytes = b""
    date: str = ""
    inclusion: Inclusion | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object, ready for any encoder."""
        document: dict[str, Any] = {
            "request_id": self.request_id.hex(),
            "assignments": [_encode(e) for e in self.assignments],
            "receipts": [_encode(e) for e in self.receipts],
            "bill": _encode(self.bill),
            "key_events": [_encode(e) for e in self.key_events],
            "salt": self.salt.hex(),
            "prompt_token_ids": list(self.prompt_token_ids),
            "prefix_token_ids": [list(ids) for ids in self.prefix_token_ids],
            "output_token_ids": [list(ids) for ids in self.output_token_ids],
            "template_sha256": self.template_sha256.hex(),
            "date": self.date,
        }
        if self.inclusion is not None:
            document["inclusion"] = {
                "checkpoint": self.inclusion.checkpoint,
                "bill": _proof_json(self.inclusion.bill),
                "receipts": [_proof_json(p) for p in self.inclusion.receipts],
            }
        return document


def parse_bundle(data: bytes | str) -> ReceiptBundle:
    """Parses the JSON text. Raises InvalidRequest, naming the key, if it is not a bundle."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise InvalidRequest("the receipt file is too large")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidRequest("the receipt file is not JSON") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the receipt file is not a JSON object")
    return bundle_of(document)


def bundle_of(document: dict[str, Any]) -> ReceiptBundle:
    """The bundle of a parsed JSON object. Unknown keys are ignored. Raises InvalidRequest."""
    if document.get("erased") is True:
        raise InvalidRequest(
            "the transcript was erased, so the tokens cannot be held against the signatures",
            hint="Check a copy of the receipt file that was saved before.",
        )
    assignments = _envelopes(document, "assignments")
    legs = len(assignments)
    if not 1 <= legs <= MAX_LEGS:
        raise _bad("assignments")
    receipts = _envelopes(document, "receipts")
    prefixes = _id_lists(document, "prefix_token_ids", legs, default=True)
    outputs = _id_lists(document, "output_token_ids", legs)
    if len(receipts) != legs:
        raise _bad("receipts")
    inclusion = document.get("inclusion")
    return ReceiptBundle(
        request_id=_hex(document.get("request_id"), "request_id", ID_BYTES),
        assignments=assignments,
        receipts=receipts,
        bill=_decode(document.get("bill"), "bill"),
        key_events=_envelopes(document, "key_events"),
        salt=_hex(document.get("salt"), "salt", SALT_BYTES),
        prompt_token_ids=_ids(document.get("prompt_token_ids"), "prompt_token_ids"),
        prefix_token_ids=prefixes,
        output_token_ids=outputs,
        template_sha256=_optional_hash(document.get("template_sha256")),
        date=_text(document.get("date", ""), "date", 64),
        inclusion=None if inclusion is None else _inclusion(inclusion, legs),
    )


def _inclusion(value: Any, legs: int) -> Inclusion:
    if not isinstance(value, dict):
        raise _bad("inclusion")
    receipts = value.get("receipts", [])
    if not isinstance(receipts, list) or len(receipts) not in (0, legs):
        raise _bad("inclusion.receipts")
    return Inclusion(
        checkpoint=_text(value.get("checkpoint"), "inclusion.checkpoint", 8192),
        bill=_proof(value.get("bill")),
        receipts=tuple(_proof(p) for p in receipts),
    )


def _proof(value: Any) -> LeafProof:
    if not isinstance(value, dict) or not _is_int(value.get("index"), 2**63 - 1):
        raise _bad("inclusion")
    path = value.get("path")
    if not isinstance(path, list) or len(path) > MAX_LEVEL:
        raise _bad("inclusion")
    return LeafProof(value["index"], tuple(_hex(h, "inclusion", HASH_BYTES) for h in path))


def _proof_json(proof: LeafProof) -> dict[str, Any]:
    return {"index": proof.index, "path": [h.hex() for h in proof.path]}


def _envelopes(document: dict[str, Any], key: str) -> tuple[bytes, ...]:
    value = document.get(key)
    if not isinstance(value, list) or len(value) > MAX_LEGS:
        raise _bad(key)
    return tuple(_decode(item, key) for item in value)


def _id_lists(
    document: dict[str, Any], key: str, legs: int, *, default: bool = False
) -> tuple[Ids, ...]:
    value = document.get(key)
    if value is None and default:
        return ((),) * legs
    if not isinstance(value, list) or len(value) != legs:
        raise _bad(key)
    return tuple(_ids(item, key) for item in value)


def _ids(value: Any, key: str) -> Ids:
    if not isinstance(value, list) or len(value) > MAX_TOKENS:
        raise _bad(key)
    if not all(_is_int(item, MAX_TOKEN_ID) for item in value):
        raise _bad(key)
    return tuple(value)


def _is_int(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _text(value: Any, key: str, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise _bad(key)
    return value


def _optional_hash(value: Any) -> bytes:
    return b"" if value in (None, "") else _hex(value, "template_sha256", HASH_BYTES)


def _hex(value: Any, key: str, length: int) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * length:
        raise _bad(key)
    try:
        return binascii.unhexlify(value)
    except (binascii.Error, ValueError):
        raise _bad(key) from None


def _decode(value: Any, key: str) -> bytes:
    if not isinstance(value, str):
        raise _bad(key)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(key) from None


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bad(key: str) -> InvalidRequest:
    return InvalidRequest(
        f"the receipt file's {key!r} is missing or malformed",
        hint="Use the body of GET /v1/receipts/{id} unchanged.",
        param=key,
    )

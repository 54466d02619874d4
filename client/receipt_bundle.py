"""Receipt files, as the router's ``GET /v1/receipts/{id}`` returns them.

The format, its parser and its builder live in ``trueweight.protos.receipt_bundle`` (router and
client share them); its docstring is the reference of the JSON. This module reads such a file.
"""

from __future__ import annotations

from pathlib import Path

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.receipt_bundle import MAX_BUNDLE_BYTES, ReceiptBundle, parse_bundle


def read_bundle(path: Path) -> ReceiptBundle:
    """The bundle in a file. Raises InvalidRequest."""
    try:
        if path.stat().st_size > MAX_BUNDLE_BYTES:
            raise InvalidRequest(f"{path} is too large for a receipt file")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    return parse_bundle(data)

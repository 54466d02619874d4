"""Golden vectors: data files that any implementation of the contract must reproduce.

docs/sampling.md explains their fields. ``deploy/generate_golden.py`` makes them.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

from trueweight.protos.errors import InvalidRequest

NAMES = ("noise", "sampling", "digests", "money", "evidence", "merkle")


def load_golden(name: str) -> dict[str, Any]:
    """One file by its name ("sampling"). Raises InvalidRequest for an unknown name."""
    if name not in NAMES:
        raise InvalidRequest(f"there are no golden vectors named {name[:40]!r}")
    path = importlib.resources.files("trueweight.protos") / "golden" / f"{name}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return document

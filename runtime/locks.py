"""Locks of files and directories that end with the process that holds them, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueweight.protos.errors import TrueweightError


def take_lock(path: Path) -> int | None:
    """Locks a directory, or a file that is made if it is not there; None if somebody else has it.
    Whoever closes the descriptor gives the lock back."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def only_one(path: Path, otherwise: TrueweightError) -> Iterator[None]:
    """Holds the lock inside; raises ``otherwise`` if somebody else has it."""
    descriptor = take_lock(path)
    if descriptor is None:
        raise otherwise
    try:
        yield
    finally:
        os.close(descriptor)

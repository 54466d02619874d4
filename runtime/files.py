"""Files that somebody else may have written."""

from __future__ import annotations

from pathlib import Path

from trueweight.protos.errors import InvalidRequest


def read_bounded(path: Path, most: int) -> bytes:
    """All of a file of at most ``most`` bytes; of a device, too, never more is read than that.
    Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise InvalidRequest(f"{path} has more than {most} bytes", hint="Is it the right file?")
    return data

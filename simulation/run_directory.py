"""The directory of a run: emptied at a start, but only if a run made it; models linked into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trueweight.protos.errors import InvalidRequest

MARKER = "trueweight-run"


def link_or_copy(source: str, target: str) -> str:
    """A hard link to the file itself (caches are full of symbolic links), a copy across disks."""
    real = Path(source).resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target


def fresh_directory(directory: Path) -> Path:
    """An empty run directory. Only one that was made by this function is ever emptied.

    Raises InvalidRequest if something else lies there.
    """
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise InvalidRequest(
                f"{directory} holds something else", hint="Name another --directory."
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).write_text("Made by 'trueweight simulate'; emptied at its next start.\n")
    return directory.resolve()

"""Long measurements on disk, in slices: what was answered and how it scored.

A run that is interrupted loses one slice; the next run goes on where it stopped. Only numbers are
stored: jobs are drawn again from their seed, so a slice names them by their place in the draw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trueweight.protos.errors import InvalidRequest

I64 = NDArray[np.int64]
_ABOUT = "about.json"


@dataclass(frozen=True, slots=True)
class SliceKey:
    """``source`` is how it was served, ``detail`` under which circumstances, ``traffic`` the class
    or kind of requests."""

    source: str
    detail: str
    traffic: str
    number: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """One sequence of integers per request."""

    values: I64
    lengths: I64

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """From one row per request."""
        flat = [value for row in rows for value in row]
        return cls(np.array(flat, dtype=np.int64), np.array([len(r) for r in rows], dtype=np.int64))

    def rows(self) -> list[list[int]]:
        """One list per request."""
        ends = np.cumsum(self.lengths)[:-1]
        return [row.tolist() for row in np.split(self.values, ends)] if self.lengths.size else []

    def sums(self) -> I64:
        """Sum of each row; 0 for empty ones."""
        padded = np.concatenate(([0], np.cumsum(self.values)))
        ends = np.cumsum(self.lengths)
        found: I64 = padded[ends] - padded[ends - self.lengths]
        return found


class MarginStore:
    """A directory of slices about one model and one seed. Raises InvalidRequest if the directory
    is about another."""

    def __init__(self, directory: Path, weights: bytes, seed: int) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        about = {"weights_sha256": weights.hex(), "seed": seed}
        path = directory / _ABOUT
        if not path.exists():
            path.write_text(json.dumps(about) + "\n")
        elif json.loads(path.read_text()) != about:
            raise InvalidRequest(
                f"{directory} holds measurements of another model or seed",
                hint="Name another directory, or remove it.",
            )

    def answers(self, key: SliceKey) -> Ragged | None:
        """Output tokens of each job of a slice, or None."""
        return _read(self._path(key, "answers"))

    def keep_answers(self, key: SliceKey, outputs: Ragged) -> None:
        """Stores a whole slice's outputs, in the order of its jobs."""
        _write(self._path(key, "answers"), outputs)

    def margins(self, key: SliceKey, reference: str) -> Ragged | None:
        """x of every token in 10^-9, by job, as a reference saw it, or None."""
        return _read(self._path(key, f"by-{_slug(reference)}"))

    def keep_margins(self, key: SliceKey, reference: str, margins: Ragged) -> None:
        """Stores how a reference scored a slice."""
        _write(self._path(key, f"by-{_slug(reference)}"), margins)

    def slices(self, source: str, detail: str, traffic: str) -> Iterator[SliceKey]:
        """The slices answered so far, from 0 on without a gap."""
        number = 0
        while True:
            key = SliceKey(source, detail, traffic, number)
            if not self._path(key, "answers").exists():
                return
            yield key
            number += 1

    def _path(self, key: SliceKey, what: str) -> Path:
        place = self._directory / _slug(f"{key.source} {key.detail}")
        return place / f"{_slug(key.traffic)}-{key.number:04d}-{what}.npz"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _read(path: Path) -> Ragged | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return Ragged(file["values"].astype(np.int64), file["lengths"].astype(np.int64))


def _write(path: Path, rows: Ragged) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file, values=rows.values.astype(np.int32), lengths=rows.lengths.astype(np.int32)
        )
    partial.replace(path)

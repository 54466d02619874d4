"""Merkle nodes in tiles of 256 hashes: written once when full, so that proofs stay fast.

Tile (t, n) holds the roots of the perfect subtrees (8t, 256n) to (8t, 256n + 255). Only full
tiles are stored; what is right of them is recomputed from the leaves when needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trueweight.protos.errors import StorageError
from trueweight.protos.merkle import EMPTY_ROOT, HASH_BYTES, node_hash

WIDTH = 256
_BITS = 8
_sha256 = hashlib.sha256


class Tile(NamedTuple):
    """A full tile."""

    level: int
    number: int
    hashes: bytes


@dataclass(frozen=True, slots=True)
class Edge:
    """The right edge of the log: the hashes of tiles that are not full, level by level."""

    size: int = 0
    levels: tuple[tuple[bytes, ...], ...] = ()

    def extend(self, leaf_hashes: Sequence[bytes]) -> tuple[Edge, list[Tile]]:
        """The edge with more leaves, and the tiles that became full."""
        tiles: list[Tile] = []
        levels: list[tuple[bytes, ...]] = []
        carried, level = leaf_hashes, 0
        while carried or level < len(self.levels):
            hashes = (*self.levels[level], *carried) if level < len(self.levels) else carried
            number = self.size >> _BITS * (level + 1)
            full, carried = len(hashes) - len(hashes) % WIDTH, []
            for start in range(0, full, WIDTH):
                part = hashes[start : start + WIDTH]
                tiles.append(Tile(level, number + start // WIDTH, b"".join(part)))
                carried.append(perfect_root(part))
            levels.append(tuple(hashes[full:]))
            level += 1
        return Edge(self.size + len(leaf_hashes), tuple(levels)), tiles

    def root(self) -> bytes:
        """RFC 6962 root of all leaves."""
        right: bytes | None = None
        for level in self.levels:
            items = [*level, right] if right is not None else list(level)
            if items:
                right = _uneven_root(items)
        return EMPTY_ROOT if right is None else right


def perfect_root(hashes: Sequence[bytes]) -> bytes:
    """Root over a power of two of hashes."""
    sha256 = _sha256
    while len(hashes) > 1:
        pairs = iter(hashes)
        hashes = [sha256(b"\x01%b%b" % pair).digest() for pair in zip(pairs, pairs, strict=True)]
    return hashes[0]


def _uneven_root(hashes: list[bytes]) -> bytes:
    # Pairing neighbours and carrying an odd last one up gives the RFC's tree.
    while len(hashes) > 1:
        paired = [node_hash(hashes[i], hashes[i + 1]) for i in range(0, len(hashes) - 1, 2)]
        if len(hashes) & 1:
            paired.append(hashes[-1])
        hashes = paired
    return hashes[0]


class TileReader:
    """Answers ``Fetch(level, index)`` from stored tiles and, right of them, from leaf hashes.

    ``read_tile(level, number)`` gives a full tile's bytes or None; ``read_leaves(first, count)``
    the leaf hashes. Bounded cache; not shared between threads.
    """

    _CACHED = 4096

    def __init__(
        self,
        read_tile: Callable[[int, int], bytes | None],
        read_leaves: Callable[[int, int], list[bytes]],
    ) -> None:
        self._read_tile, self._read_leaves = read_tile, read_leaves
        self._tiles: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._roots: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def fetch(self, level: int, index: int) -> bytes:
        """Root of the perfect subtree (level, index)."""
        known = self._roots.get((level, index))
        if known is None:
            known = self._compute(level, index)
            _remember(self._roots, (level, index), known, 64 * self._CACHED)
        return known

    def _compute(self, level: int, index: int) -> bytes:
        tile_level, height = divmod(level, _BITS)
        first = index << height
        tile = self._tile(tile_level, first >> _BITS)
        if tile is not None:
            start = (first & (WIDTH - 1)) * HASH_BYTES
            part = tile[start : start + (HASH_BYTES << height)]
            hashes = [part[i : i + HASH_BYTES] for i in range(0, len(part), HASH_BYTES)]
            return perfect_root(hashes)
        if level == 0:
            return self._read_leaves(index, 1)[0]
        if tile_level == 0:
            return perfect_root(self._read_leaves(first, 1 << height))
        return node_hash(self.fetch(level - 1, 2 * index), self.fetch(level - 1, 2 * index + 1))

    def _tile(self, level: int, number: int) -> bytes | None:
        found = self._tiles.get((level, number))
        if found is None:
            found = self._read_tile(level, number)
            if found is None:
                return None
            if len(found) != WIDTH * HASH_BYTES:
                raise StorageError("a stored tile has the wrong length", hint="Run ledger fsck.")
            _remember(self._tiles, (level, number), found, self._CACHED)
        return found

    def edge(self, size: int) -> Edge:
        """The right edge of a log of ``size`` leaves, for example after a restart."""
        levels: list[tuple[bytes, ...]] = []
        level = 0
        while size >> _BITS * level:
            count = size >> _BITS * level
            start = count & ~(WIDTH - 1)
            if level == 0:
                levels.append(tuple(self._read_leaves(start, count - start)))
            else:
                levels.append(tuple(self.fetch(_BITS * level, i) for i in range(start, count)))
            level += 1
        return Edge(size, tuple(levels))


def _remember(
    cache: OrderedDict[tuple[int, int], bytes], key: tuple[int, int], value: bytes, most: int
) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)

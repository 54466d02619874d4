"""RFC 6962 Merkle trees: append, prove, verify. Hashes are 32 bytes of SHA-256.

A node (level, index) is the root of the perfect subtree over leaves
[index * 2^level, (index + 1) * 2^level). Perfect nodes never change, so a log stores them once
(``CompactRange.append`` says which) and answers every proof from them through a ``Fetch``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trueweight.protos.errors import BadSignature, InvalidRequest

HASH_BYTES = 32
MAX_LEVEL = 63
EMPTY_ROOT = hashlib.sha256(b"").digest()

Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Node:
    """A perfect subtree's root."""

    level: int
    index: int
    hash: bytes


def leaf_hash(body: bytes) -> bytes:
    """SHA-256(0x00, body)."""
    return hashlib.sha256(b"\x00" + body).digest()


def leaf_hashes_of(bodies: Iterable[bytes]) -> list[bytes]:
    """``leaf_hash`` of each."""
    sha256 = hashlib.sha256
    return [sha256(b"\x00" + body).digest() for body in bodies]


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01, left, right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class CompactRange:
    """A tree of ``size`` leaves as the roots of its perfect subtrees, largest first."""

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def append(self, leaf: bytes) -> tuple[CompactRange, list[Node]]:
        """The tree with one more leaf hash, and the perfect nodes that became complete."""
        _check_hash(leaf)
        hashes, level, current = list(self.hashes), 0, leaf
        new = [Node(0, self.size, leaf)]
        while self.size >> level & 1:
            current = node_hash(hashes.pop(), current)
            level += 1
            new.append(Node(level, self.size >> level, current))
        return CompactRange(self.size + 1, (*hashes, current)), new

    def root(self) -> bytes:
        """Root of the whole tree; SHA-256 of nothing for an empty one."""
        if not self.hashes:
            return EMPTY_ROOT
        result = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            result = node_hash(left, result)
        return result


def range_at(size: int, fetch: Fetch) -> CompactRange:
    """The compact range of a stored tree, for example after a restart."""
    return CompactRange(size, tuple(fetch(*node) for node in _perfect(0, size)))


def root(leaves: Sequence[bytes]) -> bytes:
    """Root over a list of leaf hashes."""
    tree = CompactRange()
    for leaf in leaves:
        tree, _ = tree.append(leaf)
    return tree.root()


def fetch_from(leaves: Sequence[bytes]) -> Fetch:
    """A ``Fetch`` over a list of leaf hashes in memory."""
    nodes: dict[tuple[int, int], bytes] = {}
    tree = CompactRange()
    for leaf in leaves:
        tree, new = tree.append(leaf)
        nodes.update({(node.level, node.index): node.hash for node in new})

    def fetch(level: int, index: int) -> bytes:
        return nodes[level, index]

    return fetch


def root_at(size: int, fetch: Fetch) -> bytes:
    """Root of the first ``size`` leaves of a stored tree."""
    return range_at(size, fetch).root()


def inclusion_path(index: int, size: int, fetch: Fetch) -> list[bytes]:
    """Sibling hashes from leaf ``index`` to the root of the first ``size`` leaves.

    Raises InvalidRequest if there is no such leaf."""
    if not 0 <= index < size:
        raise InvalidRequest(f"the tree of {size} leaves has no leaf {index}")
    path, start, end = [], 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_subtree(middle, end, fetch))
            end = middle
        else:
            path.append(_subtree(start, middle, fetch))
            start = middle
    return path[::-1]


def consistency_path(old_size: int, new_size: int, fetch: Fetch) -> list[bytes]:
    """Proof that the first ``old_size`` leaves are a prefix (RFC 6962, 2.1.2); empty if equal.

    Raises InvalidRequest unless 1 <= old_size <= new_size."""
    if not 1 <= old_size <= new_size:
        raise InvalidRequest("a consistency proof goes from a smaller tree to a larger one")
    path: list[bytes] = []
    start, end, whole = 0, new_size, True
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(_subtree(middle, end, fetch))
            end = middle
        else:
            path.append(_subtree(start, middle, fetch))
            start, whole = middle, False
    if not whole:
        path.append(_subtree(start, end, fetch))
    return path[::-1]


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], tree_root: bytes
) -> None:
    """Raises BadSignature unless the path leads from leaf hash to root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or len(path) > MAX_LEVEL:
        raise BadSignature("the inclusion proof is for no leaf of this tree")
    place, last, current = index, size - 1, leaf
    for sibling in path:
        _check_hash(sibling)
        if last == 0:
            raise BadSignature("the inclusion proof is too long")
        if place & 1 or place == last:
            current = node_hash(sibling, current)
            while place & 1 == 0 and place != 0:
                place, last = place >> 1, last >> 1
        else:
            current = node_hash(current, sibling)
        place, last = place >> 1, last >> 1
    if last != 0 or current != tree_root:
        raise BadSignature("the inclusion proof does not lead to the root")


def verify_consistency(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes]
) -> None:
    """Raises BadSignature unless the old tree is a prefix of the new one (RFC 9162, 2.1.4.2)."""
    if not 1 <= old_size <= new_size or len(path) > MAX_LEVEL + 1:
        raise BadSignature("the consistency proof goes from a smaller tree to a larger one")
    if old_size == new_size:
        if path or old_root != new_root:
            raise BadSignature("two trees of the same size differ")
        return
    for sibling in path:
        _check_hash(sibling)
    # A perfect old tree is itself the first node of the path.
    steps = list(path) if old_size & (old_size - 1) else [old_root, *path]
    if not steps:
        raise BadSignature("the consistency proof is empty")
    old, new = _fold(steps, old_size - 1, new_size - 1)
    if old != old_root or new != new_root:
        raise BadSignature("the consistency proof does not lead to the roots")


def _fold(steps: Sequence[bytes], place: int, last: int) -> tuple[bytes, bytes]:
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = steps[0]
    for sibling in steps[1:]:
        if last == 0:
            raise BadSignature("the consistency proof is too long")
        if place & 1 or place == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while place & 1 == 0 and place != 0:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        place, last = place >> 1, last >> 1
    if last != 0:
        raise BadSignature("the consistency proof is too short")
    return old, new


def _split(count: int) -> int:
    """Largest power of two below ``count`` (count > 1)."""
    return 1 << (count - 1).bit_length() - 1


def _perfect(start: int, end: int) -> list[tuple[int, int]]:
    """Perfect subtrees that make up [start, end), largest first; ``start`` is aligned."""
    found = []
    while start < end:
        level = (end - start).bit_length() - 1
        found.append((level, start >> level))
        start += 1 << level
    return found


def _subtree(start: int, end: int, fetch: Fetch) -> bytes:
    hashes = tuple(fetch(level, index) for level, index in _perfect(start, end))
    return CompactRange(end - start, hashes).root()


def _check_hash(value: bytes) -> None:
    if len(value) != HASH_BYTES:
        raise BadSignature("a hash has 32 bytes")

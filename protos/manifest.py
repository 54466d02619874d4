"""Weight manifests: which bytes a model consists of, checked file by file, challenged by chunk.

A file's chunks are its consecutive pieces of ``chunk_bytes`` (the last may be shorter, an empty
file has none; chunks never span files). Leaf i of the chunk tree is the RFC 6962 leaf hash of
"trueweight/chunk/v1", a zero byte, and the chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from trueweight.protos.errors import InvalidRequest, WeightsRefused
from trueweight.protos.merkle import CompactRange, leaf_hash
from trueweight.protos.model_directory import CARD, MAX_FILES, check_shards, list_files, read_facts
from trueweight.protos.v1.model_pb2 import FileEntry, Manifest

CHUNK_BYTES = 1 << 20
NONCE_BYTES = 32
MAX_PATH_BYTES = 4096
MAX_VOCABULARY = 1 << 24
_MAX_CHUNK_BYTES = 1 << 26
_CHUNK_TAG = b"trueweight/chunk/v1\x00"
_PROOF_TAG = b"trueweight/chunk-proof/v1\x00"
_DAMAGED = "Download the model again, or ask the publisher for a manifest of these files."

# Called with the bytes read so far and the bytes in all.
Progress = Callable[[int, int], None]


def build_manifest(
    directory: Path,
    *,
    market_id: str,
    name: str,
    revision: str,
    licence: str,
    now_unix_ms: int,
    model_signature_sha256: bytes = b"",
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of a directory. Reads every byte once. Raises WeightsRefused."""
    facts, paths = read_facts(directory), list_files(directory)
    check_shards(directory, paths)
    files, tree, count = [], CompactRange(), 0
    for path, chunks in _all_files(directory, paths, progress):
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            tree, _ = tree.append(chunk_leaf(chunk))
            count += 1
        files.append(FileEntry(path=path, size_bytes=size, sha256=digest.digest()))
    manifest = Manifest(
        market_id=market_id,
        name=name,
        revision=revision,
        licence=licence,
        files=files,
        chunk_root=tree.root(),
        chunk_bytes=CHUNK_BYTES,
        chunk_count=count,
        tokenizer_path=facts.tokenizer_path,
        chat_template_path=facts.chat_template_path,
        chat_template_sha256=facts.chat_template_sha256,
        vocabulary_size=facts.vocabulary_size,
        eos_token_ids=facts.eos_token_ids,
        max_context_tokens=facts.max_context_tokens,
        dtype=facts.dtype,
        model_signature_sha256=model_signature_sha256,
        created_at_unix_ms=now_unix_ms,
    )
    check_manifest(manifest)
    return manifest


def card_sha256(manifest: Manifest) -> bytes:
    """Digest of the signed model card; empty if the model has none."""
    return next((entry.sha256 for entry in manifest.files if entry.path == CARD), b"")


def check_manifest(manifest: Manifest) -> None:
    """Raises WeightsRefused unless the manifest makes sense by itself: safe, sorted, distinct
    paths, consistent chunk count, ids within the vocabulary."""
    if not 1 <= len(manifest.files) <= MAX_FILES:
        raise WeightsRefused("a manifest lists 1 to 100,000 files")
    if not 1 <= manifest.chunk_bytes <= _MAX_CHUNK_BYTES or len(manifest.chunk_root) != 32:
        raise WeightsRefused("the manifest's chunk tree is malformed")
    previous = b""
    for entry in manifest.files:
        path = entry.path.encode()
        if not _is_safe(entry.path) or path <= previous or len(entry.sha256) != 32:
            raise WeightsRefused(f"the manifest's entry {entry.path[:200]!r} is malformed")
        previous = path
    if manifest.chunk_count != sum(_chunks_in(e, manifest.chunk_bytes) for e in manifest.files):
        raise WeightsRefused("the manifest's chunk count does not fit its files")
    if not 1 <= manifest.vocabulary_size <= MAX_VOCABULARY or manifest.max_context_tokens < 1:
        raise WeightsRefused("the manifest names no vocabulary or context size")
    if any(token >= manifest.vocabulary_size for token in manifest.eos_token_ids):
        raise WeightsRefused("the manifest names an EOS id outside its vocabulary")


def check_directory(directory: Path, manifest: Manifest, progress: Progress | None = None) -> None:
    """Raises WeightsRefused, naming the file and what to do, unless the directory holds exactly
    the manifest's files with exactly their bytes."""
    check_manifest(manifest)
    wanted = {entry.path: entry for entry in manifest.files}
    present = list_files(directory)
    for path in present:
        if path not in wanted:
            raise WeightsRefused(
                f"{directory / path} is not in the signed manifest",
                hint="Remove it: an engine might load it instead of the signed weights.",
            )
    for missing in sorted(wanted.keys() - set(present)):
        raise WeightsRefused(f"{directory / missing} is missing", hint=_DAMAGED)
    for path in present:  # sizes first: they cost nothing
        size = (directory / path).stat().st_size
        if size != wanted[path].size_bytes:
            raise WeightsRefused(
                f"{directory / path} has {size} bytes, signed were {wanted[path].size_bytes}",
                hint=_DAMAGED,
            )
    for path, chunks in _all_files(directory, present, progress):
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        if digest.digest() != wanted[path].sha256:
            raise WeightsRefused(
                f"{directory / path} differs from the signed weights", hint=_DAMAGED
            )


def read_chunk(directory: Path, manifest: Manifest, index: int) -> bytes:
    """The bytes of one chunk. Raises InvalidRequest for an index that does not exist and
    WeightsRefused if the file is not as it was signed."""
    entry, offset = locate_chunk(manifest, index)
    if not _is_safe(entry.path):
        raise WeightsRefused("the manifest names an unsafe path")
    length = min(manifest.chunk_bytes, entry.size_bytes - offset)
    path = directory / entry.path
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise WeightsRefused(f"{path} cannot be read: {error.strerror}", hint=_DAMAGED) from None
    if len(data) != length:
        raise WeightsRefused(f"{path} is shorter than signed", hint=_DAMAGED)
    return data


def locate_chunk(manifest: Manifest, index: int) -> tuple[FileEntry, int]:
    """The file and the offset in it where a chunk begins. Raises InvalidRequest."""
    rest = index
    if index >= 0 and manifest.chunk_bytes > 0:
        for entry in manifest.files:
            count = _chunks_in(entry, manifest.chunk_bytes)
            if rest < count:
                return entry, rest * manifest.chunk_bytes
            rest -= count
    raise InvalidRequest(f"the manifest has no chunk {index}")


def chunk_leaf(chunk: bytes) -> bytes:
    """Leaf hash of a chunk in the manifest's tree."""
    return leaf_hash(_CHUNK_TAG + chunk)


def chunk_proof(nonce: bytes, node_id: str, index: int, chunk: bytes) -> bytes:
    """SHA-256(tag, nonce, node id, zero byte, index as u64 little-endian, chunk): the answer to a
    challenge. Proves possession of the chunk now, not that it is used."""
    if len(nonce) != NONCE_BYTES:
        raise InvalidRequest(f"a challenge's nonce has {NONCE_BYTES} bytes")
    head = _PROOF_TAG + nonce + node_id.encode() + b"\x00" + index.to_bytes(8, "little")
    return hashlib.sha256(head + chunk).digest()


def _all_files(
    directory: Path, paths: list[str], progress: Progress | None
) -> Iterator[tuple[str, Iterator[bytes]]]:
    total = sum((directory / path).stat().st_size for path in paths)
    done = 0

    def chunks_of(path: Path) -> Iterator[bytes]:
        nonlocal done
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                    done += len(chunk)
                    if progress:
                        progress(done, total)
        except OSError as error:
            raise WeightsRefused(f"{path} cannot be read: {error.strerror}") from None

    for path in paths:
        yield path, chunks_of(directory / path)


def _chunks_in(entry: FileEntry, chunk_bytes: int) -> int:
    return -(-entry.size_bytes // chunk_bytes)


def _is_safe(path: str) -> bool:
    parts = path.split("/")
    return (
        0 < len(path) <= MAX_PATH_BYTES
        and not PurePosixPath(path).is_absolute()
        and all(part and not part.startswith(".") for part in parts)
        and not any(c in path for c in "\\\x00\n\r:")
    )

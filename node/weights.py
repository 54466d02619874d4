"""Which weights a node serves: registered by the market, signed by their publisher, unaltered.

Checked before the engine starts; a node that cannot prove all three does not serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trueweight.protos.envelope import apply_key_event, open_envelope
from trueweight.protos.errors import BadSignature, Conflict, TrueweightError, WeightsRefused
from trueweight.protos.identity import KeyRing
from trueweight.protos.manifest import check_directory
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort

log = logging.getLogger(__name__)

_KINDS = ("key-event", "registry-entry")
MAX_PAGES = 10_000
WATCH_MS = 30_000


@dataclass(frozen=True)
class ServedWeights:
    """A checked directory. ``manifest_envelope`` is signed by ``publisher``."""

    directory: Path
    model_id: str
    publisher: str
    manifest: Manifest
    manifest_digest: bytes
    manifest_envelope: bytes


@dataclass(frozen=True)
class Registry:
    """The market's names for weights as of ``next_index`` of the log. A value."""

    market_id: str
    ring: KeyRing
    entries: Mapping[str, RegistryEntry] = field(default_factory=dict)
    next_index: int = 0

    def after(self, entry: LogEntry) -> Registry:
        """The registry after one leaf. A leaf that does not verify changes nothing."""
        try:
            if entry.kind == "key-event":
                ring = apply_key_event(self.ring, entry.body, self.market_id)
                return replace(self, ring=ring)
            opened = open_envelope(
                entry.body, RegistryEntry, self.ring, self.market_id, signer=self.market_id
            )
        except (BadSignature, Conflict) as error:
            log.warning("ignoring log entry %d: %s", entry.index, error)
            return self
        entries = {**self.entries, opened.message.model_id: opened.message}
        return replace(self, entries=entries)

    def served(self, model_id: str | None = None) -> tuple[RegistryEntry, ...]:
        """Entries that are not revoked; only that of ``model_id`` if given."""
        return tuple(
            e
            for name, e in sorted(self.entries.items())
            if not e.revoked and model_id in (None, name)
        )


async def read_registry(ledger: LedgerPort, known: Registry) -> Registry:
    """The registry as of now, from the ledger's log after ``known.next_index``.

    Raises Unavailable if the ledger cannot be reached.
    """
    registry, index = known, known.next_index
    for _ in range(MAX_PAGES):
        page = await ledger.read_log(index, kinds=_KINDS)
        for entry in page.entries:
            registry = registry.after(entry)
        if page.next_index <= index:
            break
        index = page.next_index
        if index >= page.tree_size:
            break
    return replace(registry, next_index=index)


async def until_withdrawn(
    ledger: LedgerPort, registry: Registry, weights: ServedWeights, clock: Clock
) -> str:
    """Follows the registry until these weights may no longer be served; says why."""
    while True:
        await clock.sleep_ms(WATCH_MS)
        try:
            registry = await read_registry(ledger, registry)
        except TrueweightError as error:
            log.debug("the registry is out of reach: %s", error)
            continue
        entry = registry.entries.get(weights.model_id)
        if entry is None or entry.revoked:
            return f"the market has withdrawn {weights.model_id}"
        if entry.manifest_digest != weights.manifest_digest:
            return f"the market sells other weights as {weights.model_id} now"


async def check_weights(
    directory: Path, registry: Registry, model_id: str | None = None
) -> ServedWeights:
    """The weights in a directory, every byte checked, in a thread. Raises WeightsRefused saying
    why they may not be served. Without ``model_id`` the directory's files decide which registered
    manifest is meant."""
    return await asyncio.to_thread(_find_weights, directory, registry, model_id)


def _find_weights(
    directory: Path, registry: Registry, model_id: str | None = None
) -> ServedWeights:
    if not directory.is_dir():
        raise WeightsRefused(f"there is no directory {directory}", hint="Name it with --model.")
    candidates = [_open(entry, registry) for entry in registry.served(model_id)]
    if not candidates:
        raise WeightsRefused(
            f"the market sells no {model_id or 'model'}",
            hint="Sign and register it: 'trueweight model sign', 'trueweight model register'.",
        )
    alike = [c for c in candidates if _has_same_files(directory, c[1])]
    if not alike and len(candidates) > 1:
        names = ", ".join(entry.model_id for entry, _, _ in candidates[:20])
        raise WeightsRefused(
            f"the files in {directory} are those of no registered model ({names})",
            hint="Name the model with --model-id to see which file differs.",
        )
    return _first_unaltered(directory, alike or candidates)


_Candidate = tuple[RegistryEntry, Manifest, bytes]


def _open(entry: RegistryEntry, registry: Registry) -> _Candidate:
    try:
        opened = open_envelope(
            entry.manifest_envelope,
            Manifest,
            registry.ring,
            registry.market_id,
            signer=entry.publisher,
        )
    except BadSignature as error:
        raise WeightsRefused(
            f"the manifest of {entry.model_id} is not signed by its publisher: {error}",
            hint="The market must register it again.",
        ) from error
    if opened.digest != entry.manifest_digest:
        raise WeightsRefused(f"the registry entry of {entry.model_id} names another manifest")
    return entry, opened.message, opened.digest


def _has_same_files(directory: Path, manifest: Manifest) -> bool:
    try:
        return all((directory / f.path).stat().st_size == f.size_bytes for f in manifest.files)
    except OSError:
        return False


def _first_unaltered(directory: Path, candidates: Sequence[_Candidate]) -> ServedWeights:
    refusal = WeightsRefused("no candidate")
    for entry, manifest, digest in candidates:
        try:
            check_directory(directory, manifest)
        except WeightsRefused as error:
            refusal = error
            continue
        return ServedWeights(
            directory=directory,
            model_id=entry.model_id,
            publisher=entry.publisher,
            manifest=manifest,
            manifest_digest=digest,
            manifest_envelope=entry.manifest_envelope,
        )
    raise refusal

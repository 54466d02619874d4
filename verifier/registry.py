"""Which weights stood for which name, and until when. Fed with the market's registry entries."""

from __future__ import annotations

from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import TrueweightError
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.verifier.selection import ReceiptLeaf

MAX_MODELS = 10_000
# Work that began before its name was withdrawn may end this much later: the longest request (10
# minutes) and its hold's grace.
WITHDRAWAL_GRACE_MS = 15 * 60_000


class Registry:
    """Every manifest that was ever sold, and what is sold now."""

    def __init__(self) -> None:
        self.manifests: dict[bytes, Manifest] = {}
        self.models: dict[str, bytes] = {}
        # When a name stopped standing for weights; None while it does.
        self._sold_until_ms: dict[tuple[str, bytes], int | None] = {}

    def apply(self, entry: RegistryEntry, merged_at_unix_ms: int) -> None:
        """One entry. Raises TrueweightError for one that carries another manifest than it names,
        and for a new name beyond the bound; a withdrawal always works."""
        if digest_of(entry.manifest_envelope) != entry.manifest_digest:
            raise TrueweightError("the registry entry carries another manifest")
        manifest = parse_payload(parse_envelope(entry.manifest_envelope), Manifest)
        sold = (entry.model_id, entry.manifest_digest)
        is_new = not entry.revoked and sold not in self._sold_until_ms
        if is_new and len(self._sold_until_ms) >= MAX_MODELS:
            raise TrueweightError("the market registered too many models")
        before = self.models.pop(entry.model_id, None)
        if before is not None:
            self._sold_until_ms[entry.model_id, before] = merged_at_unix_ms
        if not entry.revoked:
            self.manifests[entry.manifest_digest] = manifest
            self.models[entry.model_id] = entry.manifest_digest
            self._sold_until_ms[sold] = None

    def was_sold(self, model_id: str, manifest_digest: bytes, receipt: ReceiptLeaf) -> bool:
        """True if the name stood for these weights when this receipt's work can have begun."""
        until_ms = self._sold_until_ms.get((model_id, manifest_digest), 0)
        return until_ms is None or receipt.merged_at_unix_ms <= until_ms + WITHDRAWAL_GRACE_MS

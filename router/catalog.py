"""Which names are sold, and the tokenizer of each. Names come from the log, files from disk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trueweight.protos.envelope import digest_of, open_envelope, parse_envelope, parse_payload
from trueweight.protos.errors import (
    BadSignature,
    EngineError,
    NotFound,
    OverCapacity,
    TrueweightError,
    Unavailable,
)
from trueweight.protos.manifest import card_sha256
from trueweight.protos.model_directory import read_card
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.router.keyring import Keys
from trueweight.router.tokenizer import EncodingThreads, ModelTokenizer, read_model_files

log = logging.getLogger(__name__)

MAX_MODELS = 1024


@dataclass(frozen=True)
class SoldModel:
    """A registered name. ``tokenizer`` is None if this router has no files for it."""

    model_id: str
    manifest_digest: bytes
    manifest: Manifest
    publisher: str
    registered_unix_ms: int
    log_index: int
    tokenizer: ModelTokenizer | None
    # The publisher's own words about the model, if this router holds the signed file.
    card: str = ""


class Catalog:
    """Models by name. ``directories``: where this router finds each model's files."""

    def __init__(self, keys: Keys, directories: Mapping[str, Path]) -> None:
        self._keys, self._directories = keys, dict(directories)
        self._models: dict[str, SoldModel] = {}
        self._threads = EncodingThreads()

    def get(self, model_id: str) -> SoldModel:
        """Raises NotFound for a name that is not sold, Unavailable if its files are missing."""
        model = self._models.get(model_id)
        if model is None:
            raise NotFound(
                f"The model {model_id[:100]!r} does not exist here.",
                hint="GET /v1/models lists the names.",
                param="model",
            )
        if model.tokenizer is None:
            raise Unavailable(
                f"This router has no tokenizer for {model_id!r}.",
                hint="Its operator adds --model-dir NAME=DIR.",
            )
        return model

    def all(self) -> list[SoldModel]:
        """All names that can be asked for, in order of name."""
        return sorted(
            (m for m in self._models.values() if m.tokenizer is not None),
            key=lambda m: m.model_id,
        )

    def is_sold(self, manifest_digest: bytes) -> bool:
        """True if some name stands for these weights now."""
        return any(m.manifest_digest == manifest_digest for m in self._models.values())

    async def learn(self, envelope: bytes, log_index: int) -> None:
        """Applies a RegistryEntry leaf. Raises BadSignature if it is not the market's, OverCapacity
        if this router knows too many names."""
        market_id = self._keys.market_id
        entry = open_envelope(
            envelope, RegistryEntry, self._keys.ring, market_id, signer=market_id
        ).message
        if entry.revoked:
            self._models.pop(entry.model_id, None)
            log.info("model %s is withdrawn", entry.model_id)
            return
        if entry.model_id not in self._models and len(self._models) >= MAX_MODELS:
            raise OverCapacity(f"this router sells at most {MAX_MODELS} models")
        manifest = self._manifest(entry)
        tokenizer = await self._load(entry.model_id, manifest)
        self._models[entry.model_id] = SoldModel(
            model_id=entry.model_id,
            manifest_digest=entry.manifest_digest,
            manifest=manifest,
            publisher=entry.publisher,
            registered_unix_ms=entry.issued_at_unix_ms,
            log_index=log_index,
            tokenizer=tokenizer,
            card=await self._read_card(entry.model_id, manifest),
        )
        log.info("model %s is sold", entry.model_id)

    def _manifest(self, entry: RegistryEntry) -> Manifest:
        # The market's signature over the digest vouches for these bytes.
        if digest_of(entry.manifest_envelope) != entry.manifest_digest:
            raise BadSignature("a registry entry carries another manifest than it names")
        return parse_payload(parse_envelope(entry.manifest_envelope), Manifest)

    async def _read_card(self, model_id: str, manifest: Manifest) -> str:
        directory = self._directories.get(model_id)
        signed = card_sha256(manifest)
        if directory is None or not signed:
            return ""
        return await asyncio.to_thread(read_card, directory, signed)

    async def _load(self, model_id: str, manifest: Manifest) -> ModelTokenizer | None:
        directory = self._directories.get(model_id)
        if directory is None:
            return None
        try:
            return await asyncio.to_thread(load_tokenizer, directory, manifest, self._threads)
        except TrueweightError as error:
            log.error("model %s cannot be served here: %s", model_id, error)
        except Exception:
            # What its files meet here must not keep an older version of the model on sale.
            log.exception("model %s cannot be served here", model_id)
        return None


def load_tokenizer(
    directory: Path, manifest: Manifest, threads: EncodingThreads | None = None
) -> ModelTokenizer:
    """The tokenizer of a model directory whose small files match the manifest. Raises BadSignature
    if one differs, EngineError or WeightsRefused if one cannot be used."""
    entries = {file.path: file for file in manifest.files}
    wanted = {"tokenizer_config.json", manifest.tokenizer_path, manifest.chat_template_path}
    for path in sorted(wanted & set(entries)):
        if _digest(directory / path) != entries[path].sha256:
            raise BadSignature(f"{path} is not the registered file", hint="Fetch it again.")
    for path in (manifest.tokenizer_path, manifest.chat_template_path):
        if path and path not in entries:
            raise BadSignature(f"the manifest names {path} but does not cover it")
    files = read_model_files(directory, manifest.tokenizer_path)
    tokenizer = ModelTokenizer(files, manifest.max_context_tokens, threads)
    if manifest.chat_template_sha256 != tokenizer.template_sha256:
        raise BadSignature("the chat template is not the registered one")
    return tokenizer


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise EngineError(
            f"cannot read {path}: {error.strerror}", hint="Is it the registered model's directory?"
        ) from None

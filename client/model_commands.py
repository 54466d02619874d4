"""``trueweight model``: sign weights, check them, sell them under a name."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from trueweight.client.model_files import (
    open_manifest,
    paths_of,
    registry_entry,
    sign_directory,
    verify_directory,
)
from trueweight.protos.envelope import Opened, open_envelope
from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.identity import Signer
from trueweight.protos.manifest import Progress, card_sha256
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.runtime.cli import (
    json_option,
    keys_option,
    market_option,
    option,
    optional_keys_option,
    path_option,
    print_json,
    print_table,
    run_async,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger
from trueweight.runtime.market import Market, load_market
from trueweight.runtime.rpc import AccessTokens

T = TypeVar("T")
_DIRECTORY = click.Path(path_type=Path, file_okay=False, exists=True)
_PAGE = 1000
_MAX_PAGES = 10_000


@click.group()
def model() -> None:
    """Sign weights, check them, sell them under a name."""


@model.command()
@click.argument("directory", type=_DIRECTORY)
@market_option
@keys_option
@option("--name", default="", help="The publisher's name for the model; default: the directory's.")
@option("--revision", default="1", help="The publisher's revision.")
@option("--licence", required=True, help="SPDX expression, for example Apache-2.0.")
@option("--openssf/--no-openssf", default=True, help="Also write an OpenSSF Model Signing bundle.")
@json_option
def sign(
    *,
    directory: Path,
    market: Path,
    keys: Path,
    name: str,
    revision: str,
    licence: str,
    openssf: bool,
    as_json: bool,
) -> None:
    """Write the signed manifest of DIRECTORY next to it (DIRECTORY.manifest)."""
    known, signer = load_market(market), load_signer(keys)
    if not known.has_role(signer.identity, Member.PUBLISHER):
        raise InvalidRequest(
            f"{keys} is not a publisher of this market", hint="Use --keys DIR/keys/publisher."
        )
    with _progress("hashing") as progress:
        opened = sign_directory(
            directory,
            market_id=known.market_id,
            signer=signer,
            keys=keys,
            name=name,
            revision=revision,
            licence=licence,
            clock=SystemClock(),
            openssf=openssf,
            progress=progress,
        )
    facts = _facts(opened.message, opened.digest, opened.signer)
    facts["manifest"] = str(paths_of(directory).manifest)
    _print_facts("signed", facts, as_json)


@model.command()
@click.argument("directory", type=_DIRECTORY)
@market_option
@path_option("--manifest", default=None, help="Manifest file; default: DIRECTORY.manifest.")
@json_option
def verify(directory: Path, market: Path, manifest: Path | None, as_json: bool) -> None:
    """Check every byte of DIRECTORY against its signed manifest."""
    known = load_market(market)
    opened = open_manifest(manifest or paths_of(directory).manifest, known)
    with _progress("checking") as progress:
        checked = verify_directory(directory, opened.message, progress)
    facts = {**_facts(opened.message, opened.digest, opened.signer), "checked": checked}
    _print_facts("verified", facts, as_json)


@model.command()
@click.argument("model_id")
@path_option("--manifest", required=True, help="Signed manifest (DIRECTORY.manifest).")
@market_option
@keys_option
@json_option
def register(model_id: str, manifest: Path, market: Path, keys: Path, as_json: bool) -> None:
    """Sell a signed manifest as MODEL_ID: publish it in the market's log."""
    known, signer = load_market(market), load_signer(keys)
    opened = open_manifest(manifest, known)
    entry = registry_entry(model_id, opened, signer, known, SystemClock().now_unix_ms())
    index = _with_ledger(known, signer, lambda ledger: ledger.publish(entry))
    facts = {"model_id": model_id, "log_index": index}
    facts.update(_facts(opened.message, opened.digest, opened.signer))
    _print_facts("registered", facts, as_json)


@model.command()
@click.argument("model_id")
@market_option
@keys_option
@json_option
def revoke(model_id: str, market: Path, keys: Path, as_json: bool) -> None:
    """Take MODEL_ID off sale: from this leaf of the log on nobody may serve it."""
    known, signer = load_market(market), load_signer(keys)

    async def withdraw(ledger: LedgerPort) -> int:
        sold = _current(known, await _registry(ledger)).get(model_id)
        if sold is None:
            raise _not_sold(model_id)
        now = SystemClock().now_unix_ms()
        return await ledger.publish(
            registry_entry(model_id, sold.manifest, signer, known, now, revoked=True)
        )

    index = _with_ledger(known, signer, withdraw)
    _print_facts("revoked", {"model_id": model_id, "log_index": index}, as_json)


@model.command()
@click.argument("model_id", default="")
@market_option
@optional_keys_option
@json_option
def show(model_id: str, market: Path, keys: Path | None, as_json: bool) -> None:
    """List the models that the market sells now, from its log; or tell all about MODEL_ID."""
    known = load_market(market)
    signer = load_signer(keys) if keys else None
    current = _current(known, _with_ledger(known, signer, _registry))
    if model_id:
        if model_id not in current:
            raise _not_sold(model_id)
        _print_facts(model_id, current[model_id].facts, as_json)
        return
    if as_json:
        print_json([sold.facts for sold in current.values()])
        return
    columns = ("model_id", "licence", "revision", "manifest_digest", "max_context_tokens")
    rows = [[sold.facts[column] for column in columns] for sold in current.values()]
    print_table("Models", columns, rows)


def _not_sold(model_id: str) -> NotFound:
    return NotFound(
        f"the market does not sell {model_id[:128]!r}",
        hint="'trueweight model show' lists what it sells.",
    )


@dataclass(frozen=True)
class _Sold:
    manifest: Opened[Manifest]
    facts: dict[str, Any]


def _current(market: Market, entries: list[tuple[int, bytes]]) -> dict[str, _Sold]:
    """What is sold after these leaves, by name."""
    current: dict[str, _Sold] = {}
    for index, body in entries:
        entry = open_envelope(
            body, RegistryEntry, market.ring, market.market_id, signer=market.market_id
        ).message
        current.pop(entry.model_id, None)
        if not entry.revoked:
            inner = open_envelope(entry.manifest_envelope, Manifest, market.ring, market.market_id)
            facts = _facts(inner.message, inner.digest, inner.signer)
            facts = {"model_id": entry.model_id, "log_index": index, **facts}
            current[entry.model_id] = _Sold(inner, facts)
    return current


async def _registry(ledger: LedgerPort) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    next_index = 0
    for _ in range(_MAX_PAGES):
        page = await ledger.read_log(next_index, _PAGE, ["registry-entry"])
        found.extend((entry.index, entry.body) for entry in page.entries)
        if page.next_index <= next_index or not page.entries:
            break
        next_index = page.next_index
    return found


def _with_ledger(
    market: Market, signer: Signer | None, use: Callable[[LedgerPort], Awaitable[T]]
) -> T:
    async def run() -> T:
        tokens = (
            AccessTokens(signer, market.market_id, SystemClock(), os.urandom) if signer else None
        )
        ledger = connect_ledger(market, tokens)
        try:
            return await use(ledger)
        finally:
            await ledger.close()

    return run_async(run())


def _facts(manifest: Manifest, digest: bytes, publisher: str) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "revision": manifest.revision,
        "licence": manifest.licence,
        "manifest_digest": digest.hex(),
        "publisher": publisher,
        "files": len(manifest.files),
        "bytes": sum(entry.size_bytes for entry in manifest.files),
        "vocabulary_size": manifest.vocabulary_size,
        "max_context_tokens": manifest.max_context_tokens,
        "eos_token_ids": list(manifest.eos_token_ids),
        "dtype": manifest.dtype,
        "tokenizer": manifest.tokenizer_path,
        "chat_template_sha256": manifest.chat_template_sha256.hex(),
        "model_card_sha256": card_sha256(manifest).hex(),
        "openssf_sha256": manifest.model_signature_sha256.hex(),
    }


def _print_facts(title: str, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print_table(title, ("", ""), [(key, str(value)) for key, value in facts.items()])


@contextmanager
def _progress(what: str) -> Iterator[Progress | None]:
    """A progress bar on stderr, if people watch."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

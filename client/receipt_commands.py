"""``trueweight receipt``: check what a request cost and who signed what, offline."""

from __future__ import annotations

from pathlib import Path

import click

from trueweight.client.model_files import open_manifest
from trueweight.client.receipt_check import NOT_PROVEN, check_bundle, holds
from trueweight.protos.errors import ReceiptRefused
from trueweight.protos.receipt_bundle import MAX_BUNDLE_BYTES, parse_bundle
from trueweight.runtime.cli import (
    json_option,
    market_option,
    path_option,
    print_json,
    print_table,
)
from trueweight.runtime.files import read_bounded
from trueweight.runtime.market import load_market

_WORDS = {True: "ok", False: "WRONG", None: "not checked"}


@click.group()
def receipt() -> None:
    """Check receipts."""


@receipt.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@market_option
@path_option("--manifest", default=None, help="Signed manifest, to check ids and weights too.")
@json_option
def verify(file: Path, market: Path, manifest: Path | None, as_json: bool) -> None:
    """Check FILE, the body of GET /v1/receipts/{id}, without asking anybody.

    Exits with 0 only if every signature, digest and amount in it holds.
    """
    known = load_market(market)
    bundle = parse_bundle(read_bounded(file, MAX_BUNDLE_BYTES))
    findings = check_bundle(bundle, known, open_manifest(manifest, known) if manifest else None)
    good = holds(findings)
    if as_json:
        print_json(
            {
                "holds": good,
                "findings": [{"check": f.name, "ok": f.ok, "detail": f.detail} for f in findings],
                "not_proven": list(NOT_PROVEN),
            }
        )
    else:
        rows = [(f.name, _WORDS[f.ok], f.detail) for f in findings]
        print_table(f"Request {bundle.request_id.hex()}", ("check", "", "found"), rows)
        click.echo("This does not prove:")
        for line in NOT_PROVEN:
            click.echo(f"  - {line}")
    if not good:
        wrong = next((f.name for f in findings if f.ok is False), "charge")
        raise ReceiptRefused(
            f"the receipt does not hold ({wrong})",
            check=wrong,
            hint="Keep the file: its signatures show who signed what.",
        )

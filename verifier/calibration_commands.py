"""``trueweight verifier calibrations``: null means and what they rest on, from a file or log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trueweight.protos.calibrations import CalibrationLeaf
from trueweight.runtime import cli
from trueweight.verifier.calibration_file import read_measured
from trueweight.verifier.calibration_tables import as_figures, print_calibration
from trueweight.verifier.command_support import ledger_option, read_log

# Of a model, in a title: what follows must be seen, too.
_LONGEST_NAME = 64


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@cli.path_option(
    "--market",
    default=None,
    envvar=f"{cli.ENV_PREFIX}_MARKET",
    help="Market file; for what is in its public log.",
)
@ledger_option
@cli.option("--verifier-id", default="", help="Only this verifier's.")
@cli.json_option
def calibrations(file: Path | None, as_json: bool, **options: Any) -> None:
    """Null means by class, and what they rest on: node and reference, tokens, bounds.

    Of a calibration FILE, or else of every calibration in the public log of --market; each binds
    only its own verifier, for receipts logged after it.
    """
    if file is not None:
        _show_file(file, as_json)
    elif options["market"] is not None:
        _show_log(options, as_json)
    else:
        raise click.UsageError("Name a calibration FILE, or a market with --market.")


def _show_file(file: Path, as_json: bool) -> None:
    measured = read_measured(file)
    if as_json:
        cli.print_json(
            {
                "file": str(file),
                "weights_sha256": measured.weights.hex(),
                "version": measured.version,
                "provenance": measured.provenance,
                "entries": as_figures(measured.entries),
            }
        )
        return
    print_calibration(f"calibration {file}, version {measured.version}", measured.entries)
    click.echo(f"Measured by: {measured.provenance}")


def _show_log(options: dict[str, Any], as_json: bool) -> None:
    view = read_log(options)
    wanted = options["verifier_id"]
    found = [c for c in view.calibrations.all() if wanted in ("", c.verifier_id)]
    names = {digest: manifest.name for digest, manifest in view.registry.manifests.items()}
    if as_json:
        cli.print_json([_facts(c, names[c.manifest_digest]) for c in found])
        return
    for leaf in found:
        model = names[leaf.manifest_digest][:_LONGEST_NAME]
        about = f"{model}: version {leaf.version} of {leaf.verifier_id}"
        entries = list(leaf.entries.values())
        print_calibration(f"{about}, for receipts after leaf {leaf.index}", entries)
    if not found:
        click.echo("The log has no calibration of it." if wanted else "The log has none.")


def _facts(leaf: CalibrationLeaf, model: str) -> dict[str, Any]:
    return {
        "verifier_id": leaf.verifier_id,
        "model": model,
        "manifest_digest": leaf.manifest_digest.hex(),
        "version": leaf.version,
        "log_index": leaf.index,
        "calibration_digest": leaf.digest.hex(),
        "entries": as_figures(leaf.entries.values()),
    }

"""``trueweight verifier``: run one, and ask what the log proves."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.identity import Signer
from trueweight.protos.money import PPM, format_credits, parse_credits
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime import cli
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import EVENT, load_or_create, load_signer
from trueweight.runtime.ledger_port import connect_ledger
from trueweight.runtime.market import Market, load_market
from trueweight.verifier import report
from trueweight.verifier.app import VerifierConfig, access_tokens, run_verifier
from trueweight.verifier.appeal_commands import appeal, bundle, recheck
from trueweight.verifier.audit_commands import owed, pay
from trueweight.verifier.balances import read_stakes
from trueweight.verifier.calibration_commands import calibrations
from trueweight.verifier.calibration_file import read_measured
from trueweight.verifier.challenge import DOES_NOT_PROVE, PROVES, Challenger, ChallengeResult
from trueweight.verifier.command_support import (
    at_endpoint,
    fetch_view,
    ledger_option,
    market_of,
    read_log,
    read_view,
)
from trueweight.verifier.deterrence import KNOWN_CHEATS, read_cheats
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.plot import write_png
from trueweight.verifier.reference import GrpcNode
from trueweight.verifier.state import LogView

EXTENSIONS = "trueweight.verifier.commands"


class _Group(click.Group):
    """Also offers commands that other rooms register (``calibrate`` needs engines)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        extra = {point.name for point in entry_points(group=EXTENSIONS)}
        return sorted({*super().list_commands(ctx), *extra})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for point in entry_points(group=EXTENSIONS):
            if point.name == cmd_name:
                command: click.Command = point.load()
                return command
        return None


@click.group(cls=_Group)
def verifier() -> None:
    """Verifiers: audit sampled answers and publish signed verdicts."""


@verifier.command()
@cli.market_option
@cli.keys_option
@cli.path_option("--data", required=True, help="Directory for epoch secrets; keep it.")
@ledger_option
@cli.option("--router", default="", help="Router HOST:PORT, if not the market file's.")
@cli.option("--reference", required=True, help="Reference node HOST:PORT ('node up --score-only').")
@cli.path_option("--reference-cert", required=True, help="PEM certificate of that node to pin.")
@cli.option("--reference-id", default="", help="Its node id; asked for if empty.")
@cli.path_option("--calibration", multiple=True, help="Measured calibration to sign and publish.")
@cli.option("--epoch-s", default=600.0, type=click.FloatRange(1, 86_400), help="Epoch length.")
@cli.option("--newcomer-tokens", default=50_000, type=click.IntRange(0), help="Audited in full.")
@cli.option("--floor", default=0.01, type=click.FloatRange(0.0001, 1), help="Lowest audit rate.")
@cli.path_option("--cheats", default=None, help="JSON: what cheats show and save; see the docs.")
@cli.option("--audit-deadline-s", default=300.0, type=click.FloatRange(1), help="Stated deadline.")
@cli.option("--full-charge", default="0", help="Credits of full weight; 0: any.")
@cli.option("--duplicates", default=0.1, type=click.FloatRange(0, 1), help="Second opinions.")
@cli.option("--patience-s", default=60.0, type=click.FloatRange(1), help="For transcripts.")
@cli.option("--reward", default=0.05, type=click.FloatRange(0, 0.1), help="Of the forfeit.")
@cli.log_options
def run(**options: Any) -> None:
    """Follow the log, audit what is owed, publish verdicts, convict."""
    cli.configure_logs(options["log_level"], options["log_json"])
    config = _config(options)

    def on_ready() -> None:
        cli.print_ready(role="verifier", verifier_id=config.signer.identity)

    async def serve(stop: asyncio.Event) -> None:
        await run_verifier(config, stop, on_ready)

    cli.run_async(cli.serve_until_signal(serve))


@verifier.command()
@cli.market_option
@cli.keys_option
@cli.path_option("--operator-keys", default=None, help="Keys of the owner, to declare him.")
@cli.json_option
def keys(as_json: bool, **options: Any) -> None:
    """Make the keys of a verifier, for a market whose owner admits it."""
    market_id = load_market(options["market"]).market_id
    directory: Path = options["keys"]
    signer = load_or_create(directory, market_id, SystemClock(), options["operator_keys"])
    facts = {"verifier_id": signer.identity, "key_event": str(directory / EVENT)}
    if as_json:
        cli.print_json(facts)
        return
    cli.print_table("verifier", ("", ""), list(facts.items()))
    click.echo("Next: the market's owner runs 'trueweight market reissue --admit-verifier FILE'.")


def _config(options: dict[str, Any]) -> VerifierConfig:
    certificate: Path = options["reference_cert"]
    if not certificate.is_file():
        raise InvalidRequest(
            f"there is no certificate at {certificate}",
            hint="It is tls-cert.pem in the reference node's key directory.",
        )
    market = market_of(options)
    if options["router"]:
        market = at_endpoint(market, Member.ROUTER, options["router"])
    return VerifierConfig(
        market=market,
        signer=load_signer(options["keys"]),
        data_directory=options["data"],
        reference_endpoint=options["reference"],
        reference_certificate_pem=certificate.read_text(),
        reference_id=options["reference_id"],
        policy=policy_of(options),
        measured=tuple(read_measured(path) for path in options["calibration"]),
        cheats=read_cheats(options["cheats"]) if options["cheats"] else KNOWN_CHEATS,
        reward_ppm=round(options["reward"] * PPM),
    )


def policy_of(options: dict[str, Any]) -> RatePolicy:
    """The rates and deadlines that the options of ``run`` name."""
    return RatePolicy(
        newcomer_tokens=options["newcomer_tokens"],
        floor_ppm=round(options["floor"] * PPM),
        epoch_ms=round(options["epoch_s"] * 1000),
        audit_deadline_ms=round(options["audit_deadline_s"] * 1000),
        transcript_patience_ms=round(options["patience_s"] * 1000),
        charge_reference_nano=parse_credits(options["full_charge"]),
        duplicate_ppm=round(options["duplicates"] * PPM),
    )


@verifier.command()
@cli.market_option
@cli.optional_keys_option
@ledger_option
@cli.json_option
def status(as_json: bool, **options: Any) -> None:
    """Every node: wealth, state, audit rate, audited tokens, and whether cheating would pay.

    What is at stake are balances, which the ledger shows to members (--keys) only."""
    signer = load_signer(options["keys"]) if options["keys"] else None
    view, rows = cli.run_async(_status(market_of(options), signer))
    if as_json:
        cli.print_json([asdict(row) for row in rows])
        return
    titles = (
        "node state wealth rate receipts audits tokens mean_x refunds "
        "at_stake needed unsettled cap deterred judges"
    )
    cli.print_table(
        f"{len(rows)} nodes at leaf {view.next_index}",
        titles.split(),
        [
            (
                row.node_id,
                row.state,
                f"{row.wealth:.3g}",
                f"{row.rate:.0%}",
                row.receipts,
                row.audits,
                row.audited_tokens,
                f"{row.mean_x:.6f}",
                row.refunds,
                _credits(row.at_stake_nano),
                _credits(row.needed_nano),
                _credits(row.unsettled_nano),
                _credits(row.cap_nano),
                {None: "unknown", True: "yes", False: "no"}[row.deterred],
                f"{row.judges_needed} of {row.judges}",
            )
            for row in rows
        ],
    )


def _credits(nano: int | None) -> str:
    return "unknown" if nano is None else format_credits(nano)


async def _status(market: Market, signer: Signer | None) -> tuple[LogView, list[report.NodeRow]]:
    tokens = access_tokens(market, signer, SystemClock()) if signer else None
    ledger = connect_ledger(market, tokens)
    try:
        view = await read_view(market, ledger)
        if signer is None:
            return view, report.status_rows(view, None)
        return view, report.status_rows(view, await read_stakes(ledger, list(view.nodes)))
    finally:
        await ledger.close()


@verifier.command()
@click.argument("node_id")
@cli.market_option
@cli.optional_keys_option
@ledger_option
@cli.option("--verifier-id", default="", help="Whose verdicts; default: who gave most.")
@cli.option("--last", default=30, type=click.IntRange(1), help="Audits to list.")
@cli.path_option("--png", default=None, help="Also draw the wealth (needs matplotlib).")
@cli.json_option
def explain(node_id: str, as_json: bool, **options: Any) -> None:
    """Recompute a node's wealth from logged verdicts and say what it means."""
    view = read_log(options)
    if node_id not in view.nodes:
        raise NotFound(f"the log knows no node {node_id}", hint="See 'trueweight verifier status'.")
    found = report.explain(view, node_id, options["verifier_id"])
    if options["png"]:
        write_png(found, options["png"])
    if as_json:
        cli.print_json(found.as_json())
        return
    last = options["last"]
    click.echo(found.words)
    cli.print_table(
        f"last {min(last, len(found.steps))} of {len(found.steps)} audits",
        ("leaf", "receipt", "outcome", "class", "tokens", "exact", "mean x", "wealth", "note"),
        [
            (
                step.verdict_index,
                step.receipt_index,
                step.outcome,
                step.parameter_class,
                step.tokens,
                step.exact,
                f"{step.mean_x:.6f}",
                f"{step.wealth:.4g}",
                step.note,
            )
            for step in found.steps[-last:]
        ],
    )


@verifier.command()
@click.argument("endpoint")
@cli.market_option
@cli.keys_option
@ledger_option
@cli.path_option("--model", required=True, help="Our own copy of the weights.")
@cli.path_option("--node-cert", required=True, help="PEM certificate of the node to pin.")
@cli.option("--chunks", default=8, type=click.IntRange(1, 64), help="Random chunks to ask for.")
@cli.option(
    "--deadline-ms", default=10_000, type=click.IntRange(1, 600_000), help="Time to answer."
)
@cli.json_option
def challenge(endpoint: str, as_json: bool, **options: Any) -> None:
    """Ask the node at ENDPOINT to prove that it holds the registered weights now."""
    node_id, result = cli.run_async(_challenge(endpoint, options))
    facts = {
        "node_id": node_id,
        "passed": result.passed,
        "chunks": list(result.chunks),
        "wrong": list(result.wrong),
        "elapsed_ms": round(result.elapsed_ms, 1),
        "deadline_ms": result.deadline_ms,
        "error": result.error,
        "proves": PROVES if result.passed else "",
        "does_not_prove": DOES_NOT_PROVE,
    }
    if as_json:
        cli.print_json(facts)
    else:
        cli.print_table("weights challenge", ("", ""), list(facts.items()))
    if not result.passed:
        raise SystemExit(1)


async def _challenge(endpoint: str, options: dict[str, Any]) -> tuple[str, ChallengeResult]:
    market, signer, clock = market_of(options), load_signer(options["keys"]), SystemClock()
    tokens = access_tokens(market, signer, clock)
    node = GrpcNode(endpoint, options["node_cert"].read_text(), "", tokens)
    try:
        offer = await node.offer()
        view = await fetch_view(market)
        for served in offer.models:
            manifest = view.registry.manifests.get(served.manifest_digest)
            if manifest is not None:
                challenger = Challenger(
                    options["model"], manifest, served.manifest_digest, clock, os.urandom
                )
                result = await challenger.challenge(
                    node, offer.node_id, options["chunks"], options["deadline_ms"]
                )
                return offer.node_id, result
        raise NotFound("the node offers no weights that the market registered")
    finally:
        await node.close()


for _command in (owed, pay, bundle, recheck, appeal, calibrations):
    verifier.add_command(_command)

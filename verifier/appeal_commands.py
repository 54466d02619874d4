"""``trueweight verifier bundle | recheck | appeal``: hand out evidence, replay it, run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from trueweight.protos.envelope import seal
from trueweight.protos.errors import Conflict, InvalidRequest, NotFound
from trueweight.protos.identity import Signer
from trueweight.protos.v1.market_pb2 import Member, Suspension
from trueweight.runtime import cli
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.files import read_bounded
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import connect_ledger
from trueweight.runtime.market import Market
from trueweight.verifier.app import access_tokens
from trueweight.verifier.appeal import Appeal, missing_requests, rerun
from trueweight.verifier.audit import Auditor
from trueweight.verifier.bundle import MAX_BUNDLE_BYTES, Bundle, read_bundle, write_bundle
from trueweight.verifier.command_support import (
    at_endpoint,
    fetch_view,
    ledger_option,
    market_of,
    read_view,
)
from trueweight.verifier.epochs import EpochPlan, SecretStore
from trueweight.verifier.export import (
    find_any_verdict,
    find_verdict,
    held_transcript,
    make_bundle,
    open_transcript,
)
from trueweight.verifier.recheck import Replay, replay, with_log
from trueweight.verifier.reference import GrpcNode, Scorer
from trueweight.verifier.state import LogView
from trueweight.verifier.transcripts import GrpcTranscripts


def _reference_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = cli.option("--reference", required=True, help="Reference node HOST:PORT.")(function)
    return cli.path_option(
        "--reference-cert", required=True, help="PEM certificate of that node to pin."
    )(function)


def _scorer(options: dict[str, Any], market: Market, signer: Signer) -> Scorer:
    tokens = access_tokens(market, signer, SystemClock())
    pem = options["reference_cert"].read_text()
    return Scorer(GrpcNode(options["reference"], pem, "", tokens))


def _with_router(options: dict[str, Any]) -> Market:
    market = market_of(options)
    return at_endpoint(market, Member.ROUTER, options["router"]) if options["router"] else market


@click.command()
@click.argument("leaf", type=click.IntRange(0))
@cli.market_option
@cli.optional_keys_option
@ledger_option
@cli.option("--router", default="", help="Router HOST:PORT, if not the market file's.")
@cli.path_option("--data", default=None, help="One's data directory, to open one's own audit.")
@cli.path_option(
    "--transcript",
    default=None,
    help="What one holds of the request: the client's receipt file, or another bundle.",
)
@cli.path_option("--out", required=True, help="Bundle to write. It holds the request's text.")
def bundle(leaf: int, **options: Any) -> None:
    """Write the evidence bundle of one audit (log index of its receipt or verdict).

    A verifier opens the transcript of its own audit (--keys, --data); anybody else brings it."""
    if options["transcript"] is None and not (options["keys"] and options["data"]):
        raise InvalidRequest(
            "nothing says what was asked and answered",
            hint="Name --transcript FILE, or as the verifier --keys and --data.",
        )
    held: Path | None = options["transcript"]
    if held is None:
        made = cli.run_async(_export(leaf, options))
    else:
        transcript = read_bounded(held, MAX_BUNDLE_BYTES)
        made = cli.run_async(_export_held(leaf, transcript, options))
    write_bundle(options["out"], made)
    click.echo(f"wrote {options['out']}; it holds the text of a request", err=True)


async def _export(leaf: int, options: dict[str, Any]) -> Bundle:
    market, signer = _with_router(options), load_signer(options["keys"])
    tokens = access_tokens(market, signer, SystemClock())
    ledger, transcripts = connect_ledger(market, tokens), GrpcTranscripts(market, tokens)
    try:
        view = await read_view(market, ledger)
        found = find_verdict(view, signer.identity, leaf)
        secrets = SecretStore(options["data"], _no_new_secrets)
        transcript = await open_transcript(view, secrets, transcripts, found)
        return await make_bundle(view, ledger, found, transcript)
    finally:
        await transcripts.close()
        await ledger.close()


async def _export_held(leaf: int, data: bytes, options: dict[str, Any]) -> Bundle:
    market = market_of(options)
    ledger = connect_ledger(market)
    try:
        view = await read_view(market, ledger)
        found = find_any_verdict(view, leaf)
        held = held_transcript(data, found.leaf.message.receipt_digest)
        return await make_bundle(view, ledger, found, held)
    finally:
        await ledger.close()


def _no_new_secrets(_count: int) -> bytes:
    raise InvalidRequest("this is not the data directory of the verifier", hint="Name --data.")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@cli.market_option
@cli.keys_option
@ledger_option
@_reference_options
@cli.option(
    "--log/--no-log",
    default=True,
    help="Also look in the market's log for verdict, receipt, request and calibration.",
)
@cli.json_option
def recheck(file: Path, as_json: bool, **options: Any) -> None:
    """Replay the audit in an evidence bundle on one's own reference node."""
    bundle = read_bundle(read_bounded(file, MAX_BUNDLE_BYTES))
    found = cli.run_async(_recheck(bundle, options))
    if as_json:
        cli.print_json({"agrees": found.agrees, "steps": [asdict(s) for s in found.steps]})
    else:
        rows = [(s.number, s.name, "ok" if s.passed else "FAILED", s.detail) for s in found.steps]
        cli.print_table(f"replay of {file}", ("step", "what", "result", "detail"), rows)
        click.echo("The verdict follows." if found.agrees else "The verdict does not follow.")
    if not found.agrees:
        raise SystemExit(1)


async def _recheck(evidence: Bundle, options: dict[str, Any]) -> Replay:
    market = market_of(options)
    # First what fails fast: without the log, say so with --no-log.
    view = await fetch_view(market) if options["log"] else None
    scorer = _scorer(options, market, load_signer(options["keys"]))
    try:
        found = await replay(evidence, market, scorer)
    finally:
        await scorer.close()
    return found if view is None else with_log(found, view)


@click.command()
@click.argument("node_id")
@cli.market_option
@cli.keys_option
@ledger_option
@cli.option("--router", default="", help="Router HOST:PORT, if not the market file's.")
@cli.path_option("--data", required=True, help="The verifier's data directory.")
@_reference_options
@cli.option("--of", "of_verifier", default="", help="Whose conviction; default: one's own.")
@cli.option(
    "--lift", is_flag=True, help="If it is not upheld, say in the log that the node may work."
)
@cli.json_option
def appeal(node_id: str, lift: bool, as_json: bool, **options: Any) -> None:
    """Re-run the audits that convicted NODE_ID on another reference node, also another's."""
    found = cli.run_async(_appeal(node_id, lift, options))
    facts = {
        "node_id": found.node_id,
        "upheld": found.upheld,
        "wealth_then": found.wealth_then,
        "wealth_now": found.wealth.value,
        "audits": [asdict(r) for r in found.retried],
    }
    if as_json:
        cli.print_json(facts)
        return
    cli.print_table(
        f"appeal of {node_id}: {'upheld' if found.upheld else 'not upheld'}",
        ("leaf", "tokens", "mean x then", "now", "note"),
        [
            (r.verdict_index, r.tokens, f"{r.mean_then:.6f}", f"{r.mean_now:.6f}", r.error)
            for r in found.retried
        ],
    )
    click.echo(f"wealth then {found.wealth_then:.4g}, now {found.wealth.value:.4g}")


async def _appeal(node_id: str, lift: bool, options: dict[str, Any]) -> Appeal:
    market, signer = _with_router(options), load_signer(options["keys"])
    tokens = access_tokens(market, signer, SystemClock())
    ledger, transcripts = connect_ledger(market, tokens), GrpcTranscripts(market, tokens)
    scorer = _scorer(options, market, signer)
    try:
        view = await read_view(market, ledger)
        if node_id not in view.nodes:
            raise NotFound(f"the log knows no node {node_id}")
        if lift:
            check_not_convicted(view, node_id)
        secrets = SecretStore(options["data"], _no_new_secrets)
        whose, me = options["of_verifier"] or signer.identity, signer.identity
        reader = EpochPlan(market.market_id, me, 0, SystemClock().now_unix_ms())
        requests = missing_requests(view, whose, node_id, reader, secrets.wrapping())
        for request in requests:
            await ledger.publish(seal(request, signer))
        if requests:
            view = await read_view(market, ledger)
        auditor = Auditor(view, secrets, transcripts, scorer)
        found = await rerun(view, auditor, whose, node_id, me)
        if lift:
            check_lift(view, found)
            await ledger.publish(seal(lifted(market, signer, node_id), signer))
        return found
    finally:
        await scorer.close()
        await transcripts.close()
        await ledger.close()


def check_not_convicted(view: LogView, node_id: str) -> None:
    """Raises Conflict: no verifier frees a convicted node, whose captures the ledger undoes."""
    if view.convicted(node_id):
        raise Conflict(
            "the node is convicted, so that lifting its suspension would not let it earn",
            hint="Appeal without --lift; the market's owner then runs 'trueweight ledger "
            "reinstate'.",
        )


def check_lift(view: LogView, found: Appeal) -> None:
    """Raises Conflict unless the appeal speaks for the node."""
    check_not_convicted(view, found.node_id)
    if found.upheld or any(r.error for r in found.retried):
        raise Conflict("the suspension stays: the appeal is upheld or incomplete")


def lifted(market: Market, signer: Signer, node_id: str) -> Suspension:
    return Suspension(
        market_id=market.market_id,
        node_id=node_id,
        issuer=signer.identity,
        reason="appeal: the audits do not hold on another reference",
        lifted=True,
        issued_at_unix_ms=SystemClock().now_unix_ms(),
    )

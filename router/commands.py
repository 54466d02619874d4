"""``trueweight router``: serve the OpenAI API, and keep its API keys."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from pathlib import Path

import click

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.money import parse_credits
from trueweight.protos.v1.market_pb2 import Member
from trueweight.router import api_keys
from trueweight.router.app import STORE_FILE, Router, RouterConfig
from trueweight.router.lifecycle import Timing
from trueweight.router.store import Store
from trueweight.runtime import rpc
from trueweight.runtime.cli import (
    configure_logs,
    json_option,
    keys_option,
    log_options,
    market_option,
    option,
    path_option,
    print_json,
    print_ready,
    print_table,
    run_async,
    serve_until_signal,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import connect_ledger
from trueweight.runtime.market import Market, load_market

_data_option = path_option("--data", required=True, help="Directory of this router's database.")


@click.group()
def router() -> None:
    """The OpenAI front of the market: it assigns each paid request to a node."""


@router.command()
@market_option
@keys_option
@_data_option
@option(
    "--http",
    "http_address",
    default="127.0.0.1:8000",
    help="host:port of the OpenAI API; port 0 picks one.",
)
@option(
    "--grpc",
    "grpc_address",
    default="",
    help="host:port for nodes and verifiers; default: the market file's.",
)
@option(
    "--model-dir",
    "model_dirs",
    multiple=True,
    metavar="MODEL_ID=DIR",
    help="Where a model's tokenizer files lie; checked against the registered manifest.",
)
@option("--allow-synthetic", is_flag=True, help="Give work to synthetic engines (simulation).")
@option("--min-bond", default="0", help="Credits a node must have staked; 0 asks for none.")
@option(
    "--transcript-days",
    default=7.0,
    type=click.FloatRange(0, 3650),
    help="How long transcripts are kept.",
)
@option(
    "--request-timeout-s",
    default=600.0,
    type=click.FloatRange(1, 3600),
    help="Until an answer must be complete; nodes take no work that may last longer than an hour.",
)
@option(
    "--hold-grace-s",
    default=120.0,
    type=click.FloatRange(1, 86_400),
    help="How long a hold outlives its request's deadline.",
)
@log_options
def serve(  # noqa: PLR0917  (click passes them by name)
    market: Path,
    keys: Path,
    data: Path,
    http_address: str,
    grpc_address: str,
    model_dirs: tuple[str, ...],
    allow_synthetic: bool,
    min_bond: str,
    transcript_days: float,
    request_timeout_s: float,
    hold_grace_s: float,
    log_level: str,
    log_json: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C; prints one JSON line when it is ready."""
    configure_logs(log_level, log_json)
    known = load_market(market)
    grpc_address = grpc_address or known.member(Member.ROUTER).endpoint or "127.0.0.1:0"
    for address in (http_address, grpc_address):
        rpc.split_address(address)
    config = RouterConfig(
        data=data,
        keys=keys,
        model_directories=dict(_model_dir(text) for text in model_dirs),
        http_address=http_address,
        grpc_address=grpc_address,
        allow_synthetic=allow_synthetic,
        min_bond_nano=parse_credits(min_bond),
        transcript_days=transcript_days,
        timing=Timing(request_ms=request_timeout_s * 1000, hold_grace_ms=hold_grace_s * 1000),
    )
    run_async(_serve(config, known))


async def _serve(config: RouterConfig, market: Market) -> None:
    signer = load_signer(config.keys)
    if not market.has_role(signer.identity, Member.ROUTER):
        raise InvalidRequest(
            f"the keys in {config.keys} are not those of a router of this market",
            hint="Name the router's key directory, for example MARKET/keys/router.",
        )
    clock = SystemClock()
    tokens = rpc.AccessTokens(signer, market.market_id, clock, os.urandom)
    ledger = connect_ledger(market, tokens)
    instance = Router(config, market, signer, ledger, clock=clock)

    async def run(stop: asyncio.Event) -> None:
        await instance.start()
        print_ready(
            role="router",
            identity=signer.identity,
            http=f"http://{instance.http_endpoint}/v1",
            grpc=instance.grpc_endpoint,
        )
        await stop.wait()

    try:
        await serve_until_signal(run)
    finally:
        await instance.close()
        await ledger.close()


@router.group("key")
def key_group() -> None:
    """API keys of clients."""


@key_group.command("create")
@_data_option
@option("--account", required=True, metavar="client:NAME", help="Account that pays.")
@option("--name", default="", help="For people, to tell keys apart.")
@json_option
def key_create(data: Path, account: str, name: str, as_json: bool) -> None:
    """Make a key and show it this once."""
    made, text = api_keys.create_key(_store(data), account, name, SystemClock(), os.urandom)
    if as_json:
        print_json({"key": text, "key_id": made.key_id, "account": made.account})
        return
    print_table("API key (shown only now)", ["key", "account"], [[text, made.account]])


@key_group.command("list")
@_data_option
@json_option
def key_list(data: Path, as_json: bool) -> None:
    """List all keys, without their secrets."""
    found = api_keys.list_keys(_store(data))
    if as_json:
        print_json([asdict(key) for key in found])
        return
    rows = [
        [k.key_id, k.account, k.name, "revoked" if k.revoked_unix_ms else "active"] for k in found
    ]
    print_table("API keys", ["key id", "account", "name", "state"], rows)


@key_group.command("revoke")
@_data_option
@click.argument("key_id")
@json_option
def key_revoke(data: Path, key_id: str, as_json: bool) -> None:
    """End KEY_ID; requests with it are refused within seconds."""
    api_keys.revoke_key(_store(data), key_id, SystemClock())
    if as_json:
        print_json({"key_id": key_id, "revoked": True})
        return
    click.echo(f"{key_id} is revoked")


def _store(data: Path) -> Store:
    return Store(data / STORE_FILE)


def _model_dir(text: str) -> tuple[str, Path]:
    model_id, found, directory = text.partition("=")
    if not found or not model_id or not Path(directory).is_dir():
        raise InvalidRequest(
            f"{text!r} does not name a model directory", hint="Write MODEL_ID=DIR."
        )
    return model_id, Path(directory)

"""What the ledger's commands share: where the books are, who asks, and one operation at a time."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from trueweight.ledger.connect import connected
from trueweight.ledger.court import court_of
from trueweight.ledger.prepare import DERIVES_IDS
from trueweight.protos.ids import as_uuid7, derived_id, uuid7
from trueweight.protos.money import format_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.cli import (
    json_option,
    keys_option,
    market_option,
    option,
    path_option,
    print_json,
    print_table,
    run_async,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import LedgerPort, raise_refused
from trueweight.runtime.market import load_market

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


def database_option(function: F) -> F:
    """--database URL."""
    return option(
        "--database",
        required=True,
        envvar="TRUEWEIGHT_LEDGER_DATABASE",
        help="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.",
    )(function)


def archive_option(function: F) -> F:
    """--archive DIR."""
    return path_option(
        "--archive",
        default=None,
        envvar="TRUEWEIGHT_LEDGER_ARCHIVE",
        help="Directory of what 'trueweight ledger archive' moved out of the database.",
    )(function)


def ledger_options(function: F) -> F:
    """Where a running ledger is and who asks."""
    function = option(
        "--ledger", "endpoint", default=None, help="host:port; default: the market's."
    )(function)
    return market_option(keys_option(function))


def rail_options(function: F) -> F:
    """Which payment rail brought the money, under which reference."""
    function = option(
        "--reference", default="", help="The rail's reference: the same one never counts twice."
    )(function)
    return option("--rail", default="manual", help="Where the money came from.")(function)


def one_operation(
    make: Callable[..., pb.Operation | list[pb.Operation]],
) -> Callable[..., None]:
    """A command that makes an operation (or several, one after the other) out of its own arguments:
    applies it to a running ledger and prints what became of it. Where that ledger is, and who asks,
    the function hears if it has parameters of these names."""
    wanted = inspect.signature(make).parameters.keys()

    @functools.wraps(make)
    def run(*, market: Path, keys: Path, endpoint: str | None, as_json: bool, **own: Any) -> None:
        where = {"market": market, "keys": keys, "endpoint": endpoint}
        made = make(**own, **{name: where[name] for name in where.keys() & wanted})
        for operation in made if isinstance(made, list) else [made]:
            move(market, keys, endpoint, operation, as_json)

    return ledger_options(json_option(run))


def move(
    market: Path, keys: Path, endpoint: str | None, operation: pb.Operation, as_json: bool
) -> None:
    """Applies one operation and prints what became of it."""

    async def run(port: LedgerPort) -> pb.Result:
        return raise_refused((await port.apply([operation]))[0])

    result = with_ledger(market, keys, endpoint, run)
    facts = {
        "id": operation.id.hex(),
        "status": pb.Result.Status.Name(result.status).lower(),
        "credits": format_credits(result.amount_nano),
    }
    if as_json:
        print_json(facts)
    else:
        kind = (operation.WhichOneof("body") or "").replace("_", " ")
        print_table(kind, tuple(facts), [tuple(facts.values())])


def with_ledger(
    market: Path, keys: Path, endpoint: str | None, use: Callable[[LedgerPort], Awaitable[T]]
) -> T:
    """Runs something with a running ledger."""

    async def run() -> T:
        async with connected(market, keys, endpoint) as port:
            return await use(port)

    return run_async(run())


def deposit_id(kind: str, rail: str, reference: str) -> tuple[bytes, str]:
    """Operation id and reference. The same reference gives the same id for one kind of deposit, so
    that a command that is run again after a lost answer is a replay."""
    if not reference:
        id_ = new_id()
        return id_, id_.hex()
    return derived_id(kind, rail.encode(), reference.encode()), reference


def reference_id(market: Path, keys: Path, tag: str, *parts: bytes) -> bytes:
    """The same for whoever these keys are. Ids of nodes have the form of a UUIDv7: the ledger takes
    derived ones from those only who are entitled to them."""
    known, signer = load_market(market), load_signer(keys)
    if court_of(known).roles_of(signer.identity) & DERIVES_IDS:
        return derived_id(tag, *parts)
    return as_uuid7(derived_id(tag, signer.identity.encode(), *parts))


def new_id() -> bytes:
    """A fresh UUIDv7."""
    return uuid7(SystemClock().now_unix_ms(), os.urandom(10))

"""What all commands share: options with environment twins, tables or JSON, exit codes, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import uvloop
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from trueweight.runtime.logs import configure

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
ENV_PREFIX = "TRUEWEIGHT"
_UNFOLDED = 400
_MANY_COLUMNS = 5
_MOST = 2**63 - 1
_SURROGATES = re.compile("[\ud800-\udfff]")


class _Option(click.Option):
    """An option whose environment twin is named after its flag: TRUEWEIGHT_NODE_UP_LEASE_MS for
    --lease-ms. Click itself would name it after the function's parameter."""

    def twin(self, ctx: click.Context) -> str:
        """Name of the environment variable that stands in for the flag."""
        if isinstance(self.envvar, str):
            return self.envvar
        flag = max(self.opts, key=len).lstrip("-")
        return f"{ctx.auto_envvar_prefix or ENV_PREFIX}_{flag.replace('-', '_').upper()}"

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        found = super().type_cast_value(ctx, value)
        # Every range lets "nan" pass, and some "inf".
        if isinstance(found, float) and not math.isfinite(found):
            raise click.BadParameter(f"{found} is no number.", ctx, self)
        if isinstance(found, int) and abs(found) > _MOST:
            raise click.BadParameter("this number is too large.", ctx, self)
        for text in found if isinstance(found, tuple) else (found,):
            # Bytes that are no UTF-8, as a shell passes them on.
            if isinstance(text, str) and not text.isascii() and _SURROGATES.search(text):
                raise click.BadParameter("this is not UTF-8.", ctx, self)
        return found

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return os.environ.get(self.twin(ctx)) or None

    def get_help_extra(self, ctx: click.Context) -> Any:
        return super().get_help_extra(ctx) | {"envvars": (self.twin(ctx),)}

    def get_error_hint(self, ctx: click.Context | None) -> str:
        hint = f"'{max(self.opts, key=len)}'"
        return f"{hint} (env var: '{self.twin(ctx)}')" if ctx else hint


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """A click option whose help shows its default and its environment twin."""
    settings.setdefault("cls", _Option)
    settings.setdefault("show_default", True)
    settings.setdefault("show_envvar", True)
    return click.option(*names, **settings)


def path_option(*names: str, **settings: Any) -> Callable[[F], F]:
    """An option that is a path."""
    settings.setdefault("type", click.Path(path_type=Path))
    return option(*names, **settings)


def market_option(function: F) -> F:
    """--market FILE: the market this process takes part in."""
    return path_option(
        "--market",
        required=True,
        envvar=f"{ENV_PREFIX}_MARKET",
        help="Market file, made by 'trueweight market init'.",
    )(function)


def keys_option(function: F) -> F:
    """--keys DIR: who this process is."""
    return path_option("--keys", required=True, help="Directory with this identity's key files.")(
        function
    )


def optional_keys_option(function: F) -> F:
    """--keys DIR where the public log is enough."""
    text = "Directory with an identity's key files; not needed to read the public log."
    return path_option("--keys", default=None, help=text)(function)


def log_options(function: F) -> F:
    """--log-level and --log-json; call ``configure_logs`` with them."""
    function = option(
        "--log-level",
        default="info",
        envvar=f"{ENV_PREFIX}_LOG_LEVEL",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="How much to log on stderr.",
    )(function)
    return option(
        "--log-json",
        is_flag=True,
        envvar=f"{ENV_PREFIX}_LOG_JSON",
        help="Log JSON lines.",
    )(function)


def json_option(function: F) -> F:
    """--json: machine-readable output instead of a table."""
    return option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(
        function
    )


def configure_logs(log_level: str, log_json: bool) -> None:
    """Applies ``log_options``."""
    configure(log_level, as_json=log_json)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    sys.stdout.flush()


def print_ready(**facts: Any) -> None:
    """The one line that a long-running command prints when it serves."""
    sys.stdout.write(json.dumps({"ready": True, **facts}, default=str) + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people; numbers are right-aligned. Cells are shown as they are: no markup."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell}" for cell in row))
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        # Into a file or pipe nothing needs to be folded.
        console = Console(width=_UNFOLDED, markup=False, emoji=False)
    elif len(columns) > _MANY_COLUMNS and _width(table, console) > console.width:
        # Folded to a few letters a column nobody could read it.
        _print_records(title, columns, rows, console)
        return
    console.print(table)


def _width(table: Table, console: Console) -> int:
    options = console.options.update(max_width=_UNFOLDED)
    return Measurement.get(console, options, table).maximum


def _print_records(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console
) -> None:
    """One line a value."""
    console.print(title, style="italic", markup=False)
    widest = max(len(column) for column in columns)
    for row in rows:
        console.print()
        for column, cell in zip(columns, row, strict=True):
            console.print(f"{column:<{widest}}  {cell}", markup=False, highlight=False)


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine on uvloop."""
    result: T = uvloop.run(main)
    return result


async def serve_until_signal(run: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs ``run(stop)``; SIGTERM or SIGINT sets ``stop``, a second one exits at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await run(stop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):
                loop.remove_signal_handler(number)

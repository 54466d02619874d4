"""``trueweight simulate``: a whole market on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from trueweight.protos.errors import Conflict
from trueweight.runtime.cli import option, path_option
from trueweight.simulation.demo import LEAST_REQUESTS, Demo, DemoSettings
from trueweight.simulation.display import Display
from trueweight.simulation.market import DEMO_MODEL, ENGINES, MARKER, fresh_directory
from trueweight.simulation.report import Result, show

T = TypeVar("T")
STATE = Path(".trueweight")
TABLE_WIDTH = 140


@click.group()
def simulate() -> None:
    """Run a whole market on this machine."""


@simulate.command()
@option(
    "--requests", default=LEAST_REQUESTS, type=click.IntRange(1, 10_000), help="At least so many."
)
@option("--engine", default="vllm", type=click.Choice(ENGINES), help="What the nodes compute with.")
@option("--concurrency", default=8, type=click.IntRange(1, 256), help="Requests at once.")
@option("--seed", default=1, help="Of the mix of requests.")
@path_option("--model", default=DEMO_MODEL, help="Model directory in Hugging Face layout.")
@path_option("--directory", default=STATE / "demo", help="Where the run's files go; emptied first.")
@path_option("--json", "json_file", default=None, help="Also write the result to this file.")
def demo(
    *,
    requests: int,
    engine: str,
    concurrency: int,
    seed: int,
    model: Path,
    directory: Path,
    json_file: Path | None,
) -> None:
    """Three nodes, one of them cheating: paid requests, verdicts, books.

    Exit status 0 only if the cheat, and only the cheat, was convicted, its clients were refunded
    and the books balance.
    """
    with only_one(directory):
        settings = DemoSettings(
            directory=fresh_directory(directory),
            model=model,
            engine=engine,
            requests=requests,
            concurrency=concurrency,
            seed=seed,
        )
        result = run_interruptible(_demo(settings))
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_json(), indent=2) + "\n")
    raise SystemExit(0 if result.passed else 1)


async def _demo(settings: DemoSettings) -> Result:
    with Display() as display:
        run = Demo(settings, display)
        try:
            result = await run.run()
        finally:
            await _end(run, display)
    console = wide_console()
    show(result, console)
    total = sum(result.seconds.values())
    laps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(f"{total:.0f} s: {laps}. Logs and books: {settings.directory}", highlight=False)
    return result


def wide_console() -> Console:
    """Stdout; wide enough for the tables where nobody says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


async def _end(run: Demo, display: Display) -> None:
    display.say("ending all processes")
    try:
        await run.close()
    finally:
        run.supervisor.kill_all_now()
    left = run.supervisor.left_behind()
    if left:
        display.say(f"[red]still running: {', '.join(left)}[/]")


def run_interruptible(main: Coroutine[Any, Any, T]) -> T:
    """Runs to the end; SIGINT and SIGTERM cancel it, so that everything it started is ended, a
    second one ends at once. Not uvloop: it cannot put a child into a process group."""

    async def guarded() -> T:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _cancel_or_exit, task)
        return await task

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _cancel_or_exit(task: asyncio.Future[Any]) -> None:
    if task.cancelling() if isinstance(task, asyncio.Task) else False:
        os._exit(130)  # children die with this process
    task.cancel()


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Refuses to run twice in one directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(directory.name + ".lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another run uses {directory}", hint="Wait for it, or name another --directory."
            ) from None
        yield


__all__ = ["MARKER", "demo", "only_one", "run_interruptible", "simulate"]

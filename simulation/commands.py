"""``trueweight simulate``: a whole market on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from trueweight.protos.errors import Conflict, Unavailable
from trueweight.runtime.cli import json_option, option, path_option, print_json
from trueweight.runtime.locks import only_one
from trueweight.simulation import background
from trueweight.simulation.demo import REQUESTS, Demo, DemoSettings
from trueweight.simulation.demo_files import DEMO_MODEL
from trueweight.simulation.display import Display
from trueweight.simulation.market_plan import ENGINES
from trueweight.simulation.report import Result, show
from trueweight.simulation.run_directory import fresh_directory

T = TypeVar("T")
STATE = Path(".trueweight")
TABLE_WIDTH = 140
FOLLOW_EVERY_S = 0.2
EXAMPLE = "Write a function that reads a file."


@click.group()
def simulate() -> None:
    """Run a whole market on this machine."""


@simulate.command()
@option("--requests", default=REQUESTS, type=click.IntRange(1, 10_000), help="At least so many.")
@option("--engine", default="vllm", type=click.Choice(ENGINES), help="What the nodes compute with.")
@option("--concurrency", default=8, type=click.IntRange(1, 256), help="Requests at once.")
@option("--seed", default=1, help="Of the mix of requests.")
@path_option("--model", default=DEMO_MODEL, help="Model directory in Hugging Face layout.")
@path_option("--directory", default=STATE / "demo", help="Where the run's files go; emptied first.")
@path_option("--calibration", default=None, help="Default: MODEL.calibration.json.")
@path_option("--json", "json_file", default=None, help="Also write the result to this file.")
def demo(
    *,
    requests: int,
    engine: str,
    concurrency: int,
    seed: int,
    model: Path,
    directory: Path,
    calibration: Path | None,
    json_file: Path | None,
) -> None:
    """Three nodes, one of them cheating: paid requests, verdicts, books.

    Exit status 0 only if the cheat, and only the cheat, was convicted, its clients were refunded
    and the books balance.
    """
    with _only_one(directory):
        settings = DemoSettings(
            directory=fresh_directory(directory),
            model=model,
            engine=engine,
            requests=requests,
            concurrency=concurrency,
            seed=seed,
            calibration=calibration,
        )
        result = _run_interruptible(_demo(settings))
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
    console = _wide_console()
    show(result, console)
    total = sum(result.seconds.values())
    laps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(f"{total:.0f} s: {laps}. Logs and books: {settings.directory}", highlight=False)
    return result


def _wide_console() -> Console:
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


@simulate.command()
@option("--engine", default="vllm", type=click.Choice(ENGINES), help="What the nodes compute with.")
@path_option("--model", default=DEMO_MODEL, help="Model directory in Hugging Face layout.")
@option("--model-id", default="", help="Name that clients ask for; default: the directory's.")
@option("--licence", default="", help="SPDX expression shown to clients; default: none claimed.")
@option("--max-context", default=0, type=click.IntRange(0), help="Tokens; 0: what fits.")
@option("--kv-cache-mib", default=256, type=click.IntRange(1), help="vllm: cache of each engine.")
@path_option(
    "--directory", default=STATE / "up", help="Where the market's files go; emptied first."
)
@json_option
def up(
    *,
    engine: str,
    model: Path,
    model_id: str,
    licence: str,
    max_context: int,
    kv_cache_mib: int,
    directory: Path,
    as_json: bool,
) -> None:
    """Start the market without the cheat and keep it running until 'trueweight simulate down'."""
    options = ("--max-context", str(max_context), "--kv-cache-mib", str(kv_cache_mib))
    plan = background.UpPlan(str(model.resolve()), engine, model_id, licence, options)
    with _only_one(directory):
        state = background.read_state(directory)
        if state is not None and background.keeper_is_alive(state):
            _check_same(state, plan)
            Console(stderr=True).print("The market is up already.", highlight=False)
        else:
            background.end_keeper(directory)  # what a killed keeper may have left
            state = _start(fresh_directory(directory), plan)
    _print_market(directory.resolve(), state, as_json)


def _check_same(state: background.State, plan: background.UpPlan) -> None:
    if state.plan != plan.to_json():
        raise Conflict(
            f"the market is up already, with {state.model!r} and other options",
            hint="End it first: make down.",
        )


def _start(directory: Path, plan: background.UpPlan) -> background.State:
    signal.signal(signal.SIGTERM, _interrupt)
    keeper = background.start_keeper(directory, plan)
    try:
        with Display() as display:
            state = _follow_start(directory, keeper, display)
    except BaseException:
        background.abandon_keeper(keeper, directory)
        raise
    if state.status != background.SERVING:
        background.end_keeper(directory)
        raise Unavailable(
            "the market did not start", hint=background.failure_text(directory, state)
        )
    return state


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _follow_start(
    directory: Path, keeper: subprocess.Popen[bytes], display: Display
) -> background.State:
    """Shows what the keeper says until the market serves or the keeper ended."""
    shown = 0
    while True:
        ended = keeper.poll() is not None
        state = background.read_state(directory) or background.State(keeper.pid, 0)
        for text in state.said[shown:]:
            display.say(text)
        shown = len(state.said)
        if ended or state.status != background.STARTING:
            return state
        time.sleep(FOLLOW_EVERY_S)


def _print_market(directory: Path, state: background.State, as_json: bool) -> None:
    logs = directory / "logs"
    environment = background.write_environment(directory, state)
    facts = {
        "status": state.status,
        "base_url": state.base_url,
        "api_key": state.api_key,
        "model": state.model,
        "logs": str(logs),
        "directory": str(directory),
        "environment": str(environment),
    }
    if as_json:
        print_json(facts)
        return
    for line in (
        f"BASE_URL={state.base_url}",
        f"API_KEY={state.api_key}",
        f"Both for your shell:  . {shlex.quote(str(environment))}",
        _curl_line(state),
        f"Logs: {logs}",
        f"End it with: {_down_line(directory)}",
    ):
        click.echo(line)


def _down_line(directory: Path) -> str:
    if directory == (STATE / "up").resolve():
        return "make down"
    return f"trueweight simulate down --directory {shlex.quote(str(directory))}"


def _curl_line(state: background.State) -> str:
    """A request that can be pasted into a shell."""
    path, ask = "completions", {"prompt": EXAMPLE, "max_tokens": 64}
    if state.has_chat:
        path, ask = "chat/completions", {"messages": [{"role": "user", "content": EXAMPLE}]}
    body = json.dumps({"model": state.model, **ask, "seed": 1})
    return (
        f"curl -s {state.base_url}/{path} -H 'Authorization: Bearer {state.api_key}' "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


@simulate.command()
@path_option("--directory", default=STATE / "up", help="The market's directory.")
def down(*, directory: Path) -> None:
    """End the market that 'trueweight simulate up' started."""
    if background.read_state(directory) is None:
        click.echo("No market is up.")
        return
    left = background.end_keeper(directory.resolve())
    if left:
        raise Unavailable(
            f"still running: {', '.join(left)}", hint=f"See {directory / background.STATE_FILE}."
        )
    click.echo(f"The market is down. Its books and logs stay in {directory} until the next start.")


def _run_interruptible(main: Coroutine[Any, Any, T]) -> T:
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
def _only_one(directory: Path) -> Iterator[None]:
    """Refuses to run twice in one directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    taken = Conflict(
        f"another run uses {directory}", hint="Wait for it, or name another --directory."
    )
    with only_one(directory.with_name(directory.name + ".lock"), taken):
        yield

"""``make up`` and ``make down``: a market that stays, repairs itself, and goes without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from trueweight.simulation.background import read_state
from trueweight.simulation.market import trueweight

REPOSITORY = Path(__file__).resolve().parents[2]


def wait_for(condition, within_s, what):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture
def directory(command, tmp_path):
    made = tmp_path / "up"
    yield made
    command("simulate", "down", "--directory", str(made))


def up(command, directory, *more, **settings):
    arguments = ("simulate", "up", "--engine", "synthetic", "--directory", str(directory), *more)
    return command(*arguments, within_s=200, **settings)


def ask(facts, text="hello"):
    return httpx.post(
        f"{facts['base_url']}/chat/completions",
        headers={"Authorization": f"Bearer {facts['api_key']}"},
        json={
            "model": facts["model"],
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 12,
        },
        timeout=30,
    )


def test_up_serves_repairs_itself_and_down_leaves_nothing(command, directory, live_processes):
    started = up(command, directory, "--json")
    assert started.returncode == 0, started.stderr
    facts = json.loads(started.stdout)
    assert ask(facts).status_code == 200

    again = up(command, directory)
    assert again.returncode == 0
    assert "up already" in again.stderr
    for text in (facts["base_url"], facts["api_key"], "curl -s", str(directory / "logs")):
        assert text in again.stdout
    for name in ("state.json", "env"):
        assert (directory / name).stat().st_mode & 0o077 == 0
    other = up(command, directory, "--max-context", "100")
    assert other.returncode == 1
    assert "make down" in other.stderr
    follow_the_readme(directory)

    for role in ("ledger", "router", "node-honest-cheap", "reference"):
        os.kill(read_state(directory).groups[role], signal.SIGKILL)
    wait_for(lambda: _answers(facts), 60, "the market did not repair itself")

    down = command("simulate", "down", "--directory", str(directory))
    assert down.returncode == 0, down.stderr
    assert live_processes(str(directory)) == []
    assert read_state(directory) is None
    assert "No market is up" in command("simulate", "down", "--directory", str(directory)).stdout


def follow_the_readme(directory):
    """What a newcomer pastes, literally, between `make up` and `make down`."""
    head = (REPOSITORY / "README.md").read_text().split("## What it proves")[0]
    blocks = re.findall(r"```sh\n(.*?)```", head, re.DOTALL)
    pasted = "\n".join(blocks[1:]).replace("make down", "")
    for name in ("answer.json", "receipt.json", ".trueweight/up"):
        assert name in pasted
    pasted = pasted.replace(".trueweight/up", str(directory))
    pasted = re.sub(r"(answer|receipt)\.json", rf"{directory}/\1.json", pasted)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", pasted],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This does not prove:" in done.stdout


def _answers(facts):
    try:
        return ask(facts).status_code == 200
    except httpx.HTTPError:
        return False


def test_kill_9_of_the_keeper_takes_the_market_with_it(command, directory, live_processes):
    assert up(command, directory).returncode == 0
    os.kill(read_state(directory).pid, signal.SIGKILL)
    wait_for(lambda: live_processes(str(directory)) == [], 10, "something outlived the keeper")
    assert command("simulate", "down", "--directory", str(directory)).returncode == 0


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
def test_a_start_that_is_interrupted_at_once_leaves_nothing(directory, live_processes, ending):
    """The keeper has not said a word by then."""
    arguments = ("simulate", "up", "--engine", "synthetic", "--directory", str(directory))
    starting = subprocess.Popen(
        [*trueweight(), *arguments],
        stderr=subprocess.DEVNULL,
        # Shells start what runs in the background with SIGINT ignored, these tests perhaps too.
        preexec_fn=lambda: signal.signal(ending, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        keeper = f"background {directory}"
        wait_for(lambda: live_processes(keeper) != [], 60, "no keeper")
        os.kill(starting.pid, ending)
        assert starting.wait(70) == 130
    finally:
        starting.kill()
    assert live_processes(str(directory)) == []


def test_a_failed_start_says_why_and_leaves_nothing(command, directory, live_processes, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    failed = up(command, directory, "--model", str(broken))
    assert failed.returncode not in (0, 130)
    assert "the market did not start" in failed.stderr
    assert "config.json names no vocab_size" in failed.stderr

    # A role that fails by itself: the end of its log is shown, and what to look at.
    environment = {**os.environ, "TRUEWEIGHT_NODE_UP_CAPACITY": "many"}
    failed = up(command, directory, env=environment)
    assert failed.returncode not in (0, 130)
    assert "The end of its log" in failed.stderr
    assert "'many' is not a valid integer" in failed.stderr
    assert live_processes(str(directory)) == []

"""The launcher: clear errors, exit codes, environment twins, rooms loaded only when used."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import click
import pytest

from trueweight.client import launcher
from trueweight.protos.errors import InsufficientFunds, Unavailable


def test_version(trueweight):
    outcome = trueweight("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("trueweight 0.")


def test_help_names_every_room(trueweight):
    outcome = trueweight("--help")
    assert outcome.code == 0
    for name in ("market", "model", "receipt", "node", "router", "verifier", "ledger", "simulate"):
        assert f"  {name} " in outcome.out
    assert "Not available" not in outcome.out


def test_an_unknown_command_is_a_usage_error(trueweight):
    outcome = trueweight("no-such-thing")
    assert outcome.code == 2
    assert "No such command" in outcome.err


@pytest.fixture
def failing(monkeypatch):
    """A launcher whose only command raises what it is given."""

    def make(error):
        def refuse():
            raise error

        command = click.Command("fail", callback=refuse)
        monkeypatch.setattr(launcher._Rooms, "get_command", lambda *_: command)

    return make


def test_our_errors_become_one_line_with_what_to_do(failing, trueweight):
    failing(Unavailable("nobody serves it", hint="Start a node."))
    outcome = trueweight("fail")
    assert outcome.code == 69
    assert outcome.err == "error [UNAVAILABLE]: nobody serves it — Start a node.\n"
    failing(InsufficientFunds("no money"))
    outcome = trueweight("fail")
    assert (outcome.code, outcome.err) == (1, "error [INSUFFICIENT_FUNDS]: no money\n")


def test_a_file_that_cannot_be_used_is_one_line(failing, trueweight):
    failing(PermissionError(13, "Permission denied", "/root/books"))
    outcome = trueweight("fail")
    assert outcome.code == 74
    assert outcome.err == "error [OS]: cannot use '/root/books': Permission denied\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--http", "here"), "'here' is not HOST:PORT"),
        (("--http", "127.0.0.1:99999"), "is not HOST:PORT"),
        (("--grpc", "127.0.0.1:-1"), "is not HOST:PORT"),
        (("--transcript-days", "-1"), "--transcript-days"),
        (("--request-timeout-s", "0"), "--request-timeout-s"),
        # Nodes would refuse every request.
        (("--request-timeout-s", "3601"), "--request-timeout-s"),
        (("--min-bond", "much"), "not an amount"),
        (("--model-dir", "nothing"), "MODEL_ID=DIR"),
    ],
)
def test_a_router_with_wrong_options_says_which(market, trueweight, tmp_path, options, words):
    who = ("--market", str(market.file), "--keys", str(tmp_path), "--data", str(tmp_path))
    outcome = trueweight("router", "serve", *who, *options)
    assert outcome.code == 2
    assert words in outcome.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_not_a_traceback(failing, trueweight, error):
    failing(error)
    outcome = trueweight("fail")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_a_room_that_cannot_be_imported_says_why_and_spares_the_others(monkeypatch, trueweight):
    class Broken:
        name = "node"

        def load(self):
            raise ImportError("No module named 'vllm'")

    real = metadata.entry_points

    def entry_points(**wanted):
        return [Broken()] if wanted.get("name") == "node" else real(**wanted)

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    outcome = trueweight("node", "up", "--anything")
    assert outcome.code == 1
    assert "No module named 'vllm'" in outcome.err
    assert trueweight("market", "--help").code == 0


def test_options_have_environment_twins(monkeypatch, market, trueweight):
    monkeypatch.setenv("TRUEWEIGHT_MARKET", str(market.file))
    monkeypatch.setenv("TRUEWEIGHT_MARKET_SHOW_JSON", "1")
    assert trueweight("market", "show").json()["name"] == "test"


def test_a_missing_option_is_named_with_its_twin(trueweight):
    outcome = trueweight("market", "show")
    assert outcome.code == 2
    assert "'--market' (env var: 'TRUEWEIGHT_MARKET')" in outcome.err


def test_commands_of_one_room_do_not_import_the_others():
    code = (
        "import sys; from trueweight.client.launcher import run; "
        "run(['receipt', '--help']); "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch', 'sqlalchemy')"
        " or m.startswith(('trueweight.node', 'trueweight.ledger'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_the_console_command_exits_with_the_code(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from trueweight.client.launcher import main; main()",
            "market",
            "show",
            "--market",
            str(tmp_path / "none.json"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no market file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from trueweight.client.launcher import main; "
            "read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
            "sys.argv = ['trueweight', 'market', '--help']; main()",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr

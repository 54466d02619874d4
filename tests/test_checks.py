"""`make check` is worth something: a planted error in each room fails it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
ROOMS = ("protos", "runtime", "node", "router", "verifier", "ledger", "client", "simulation")


# What tests name and the rooms no longer have.
GONE = """\
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.clock import NoSuchClock
def test_it():
    SystemClock().no_such_method()
"""


@pytest.fixture
def copy(tmp_path):
    for room in ROOMS:
        ignored = shutil.ignore_patterns("models", "*.json")
        shutil.copytree(TOP / room, tmp_path / room, ignore=ignored)
    (tmp_path / "tests").mkdir()
    (tmp_path / "deploy").mkdir()
    shutil.copy(TOP / "deploy/typecheck.sh", tmp_path / "deploy")
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    return tmp_path


def run(command, cwd, **env):
    return subprocess.run(
        command,
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **env},
    )


def test_a_planted_lint_error_is_found_in_every_room(copy):
    for room in ROOMS:
        (copy / room / "planted.py").write_text("import os\n")
    result = run([sys.executable, "-m", "ruff", "check", ".", "--output-format", "concise"], copy)
    assert result.returncode != 0
    for room in ROOMS:
        assert f"{room}/planted.py:1" in result.stdout


def test_a_planted_type_error_is_found_in_every_room(copy):
    for room in ROOMS:
        (copy / room / "planted.py").write_text('def wrong() -> int:\n    return "text"\n')
    (copy / "tests/test_planted.py").write_text(GONE)
    cache = str(copy / "cache")
    result = run(["deploy/typecheck.sh"], copy, PYTHON=sys.executable, MYPY_CACHE=cache)
    assert result.returncode != 0
    for room in ROOMS:
        assert f"trueweight/{room}/planted.py:2" in result.stdout, result.stdout + result.stderr
    for line in (2, 4):
        assert f"tests/test_planted.py:{line}: error: " in result.stdout

"""`make setup` where it cannot work says so clearly: other platforms, other Pythons, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "env", "cat", "cut", "date", "dirname", "grep", "sha256sum", "touch", "uname")


@pytest.fixture
def clone(tmp_path):
    """What setup reads of a checkout, in a path with a blank, and a PATH with little in it."""
    top, tools = tmp_path / "a clone", tmp_path / "bin"
    locks = [f"requirements/{kind}.txt" for kind in ("cpu", "dev", "gpu")]
    for path in ("deploy/setup.sh", *locks, "pyproject.toml"):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / path, top / path)
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    return top, tools


def script(path, text):
    path.unlink(missing_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def setup(clone, kind="cpu", **environment):
    top, tools = clone
    return subprocess.run(
        [str(top / "deploy/setup.sh"), kind],
        env={"PATH": str(tools), "HOME": str(top), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_platforms_are_told_what_is_tested(clone, system, machine):
    script(clone[1] / "uname", f'[ "$1" = -s ] && echo {system} || echo {machine}')
    done = setup(clone)
    assert done.returncode == 1
    assert f"this is {system} on {machine}" in done.stderr
    assert "tested on Linux x86-64" in done.stderr
    assert not (clone[0] / ".venv").exists()


def test_no_python_is_told(clone):
    done = setup(clone)
    assert done.returncode == 1
    assert "no Python 3.11 or newer found; install CPython 3.11" in done.stderr


def test_another_python_is_tried_with_a_warning(clone):
    script(clone[1] / "python3.13", 'case "$*" in *"!= (3, 11)"*|-m*) exit 1;; *) exit 0;; esac')
    done = setup(clone)
    assert done.returncode == 1
    assert "no Python 3.11 here" in done.stderr and "not tested" in done.stderr
    assert "cannot make a virtual environment" in done.stderr


def test_no_network_is_told(clone):
    (clone[1] / "python3.11").symlink_to(sys.executable)
    (clone[0] / ".venv/bin").mkdir(parents=True)
    script(clone[0] / ".venv/bin/python", "exit 1")  # pip, without an index
    done = setup(clone)
    assert done.returncode == 1
    assert "the package index cannot be reached; check the network" in done.stderr
    assert not list((clone[0] / ".venv").glob(".installed-*"))


def test_make_down_where_nothing_is_installed(tmp_path):
    shutil.copy(TOP / "Makefile", tmp_path)
    # This test itself may run below make, which would tell the folder.
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "down"],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "No market is up.\n")


def test_without_triton_the_developers_set_up_fails_unless_that_is_allowed(clone):
    """Else the continuous integration would pass without the tests of the GPU kernels."""
    (clone[1] / "python3.11").symlink_to(sys.executable)
    programs = clone[0] / ".venv/bin"
    programs.mkdir(parents=True)
    script(programs / "python", "exit 0")
    script(programs / "uv", 'case "$*" in *triton*) exit 1;; esac')
    done = setup(clone, "dev")
    assert done.returncode == 1
    assert "TRUEWEIGHT_WITHOUT_TRITON=1" in done.stderr
    assert not list((clone[0] / ".venv").glob(".installed-*"))
    done = setup(clone, "dev", TRUEWEIGHT_WITHOUT_TRITON="1")
    assert done.returncode == 0 and "will be skipped, as you allowed" in done.stderr

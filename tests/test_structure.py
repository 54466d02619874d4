"""The folders are the architecture: who may import whom, and what keeps it honest."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
ROLES = {"node", "router", "verifier", "ledger", "client"}
ALLOWED = {
    "protos": set(),
    "runtime": {"protos"},
    **{role: {"protos", "runtime"} for role in ROLES},
    "simulation": {"protos", "runtime", *ROLES},
}


def python_files(room):
    return [
        p for p in (TOP / room).rglob("*.py") if not p.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


def rooms_imported_by(path):
    for item in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(item, ast.Import):
            names = [alias.name for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{path}: relative import"
            names = [item.module or ""]
            if item.module == "trueweight":
                names = [f"trueweight.{alias.name}" for alias in item.names]
        for name in names:
            if name.startswith("trueweight."):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_what_they_may(room):
    files = python_files(room)
    assert files, f"{room} is empty"
    wrong = {
        f"{path.relative_to(TOP)} imports {other}"
        for path in files
        for other in rooms_imported_by(path)
        if other not in ALLOWED[room] | {room}
    }
    assert not wrong


def test_every_package_is_installed():
    import tomllib

    listed = set(
        tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        "trueweight." + ".".join(init.parent.relative_to(TOP).parts)
        for room in ALLOWED
        for init in (TOP / room).rglob("__init__.py")
    }
    assert found == listed


def test_committed_stubs_match_the_protos(tmp_path):
    subprocess.run(
        [TOP / "deploy/generate_stubs.sh", tmp_path],
        check=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    committed = {p.name: p.read_text() for p in (TOP / "protos/v1").glob("*_pb2*")}
    generated = {p.name: p.read_text() for p in tmp_path.glob("*_pb2*")}
    assert generated == committed


def test_no_function_is_far_too_long():
    long = []
    for room in ALLOWED:
        for path in python_files(room):
            for item in ast.walk(ast.parse(path.read_text())):
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    length = (item.end_lineno or 0) - item.lineno
                    if length > 70:
                        long.append(f"{path.relative_to(TOP)}:{item.lineno} {item.name} {length}")
    assert not long


def test_no_assert_on_foreign_data_and_no_bare_except():
    found = []
    for room in ALLOWED:
        for path in python_files(room):
            for item in ast.walk(ast.parse(path.read_text())):
                if isinstance(item, ast.Assert) or (
                    isinstance(item, ast.ExceptHandler) and item.type is None
                ):
                    found.append(f"{path.relative_to(TOP)}:{item.lineno}")
    assert not found

"""kill -9 of a node leaves no engine process behind."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trueweight.node.vllm import lifeline

# A family like vLLM's, without vLLM: node -> engine core -> worker, spawned.
_FAMILY = """
import multiprocessing, os, sys, time
from trueweight.node.vllm import lifeline

def worker():
    lifeline.install()
    print("pid", os.getpid(), flush=True)
    time.sleep(600)

def core():
    lifeline.install()
    print("pid", os.getpid(), flush=True)
    child = multiprocessing.get_context("spawn").Process(target=worker)
    child.start()
    time.sleep(600)

if __name__ == "__main__":
    os.environ[lifeline.OWNER_VARIABLE] = str(os.getpid())
    lifeline.install()
    multiprocessing.get_context("spawn").Process(target=core).start()
    time.sleep(600)
"""

_NODE = """
import asyncio, sys
from trueweight.node.vllm.engine import VllmEngine, VllmOptions

async def main():
    engine = VllmEngine(sys.argv[1], VllmOptions(max_context_tokens=512, kv_cache_bytes=1 << 20))
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@contextlib.contextmanager
def running(tmp_path: Path, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program as a process of its own; killed in the end, whatever the test does."""
    script = tmp_path / "program.py"
    script.write_text(program)
    node = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield node
    finally:
        node.kill()
        node.wait()


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run; zombies that nobody reaped do not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            running.add(pid)
    return running


def wait_gone(pids: set[int], seconds: float) -> set[int]:
    deadline = time.monotonic() + seconds
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.skipif(not lifeline.supported(), reason="Linux only")
def test_children_and_grandchildren_die_with_a_killed_node(tmp_path):
    with running(tmp_path, _FAMILY) as node:
        assert node.stdout is not None
        family = {int(node.stdout.readline().split()[1]) for _ in range(2)}
        assert len(alive(family)) == 2
    assert wait_gone(family, 5) == set()


@pytest.mark.skipif(not lifeline.supported(), reason="Linux only")
def test_a_child_whose_parent_is_dead_already_ends_itself(monkeypatch):
    class Gone:
        pid = 2**22 + 1

    exits: list[int] = []
    monkeypatch.setenv(lifeline.OWNER_VARIABLE, "1")
    monkeypatch.setattr(multiprocessing, "parent_process", Gone)
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: _Prctl())
    lifeline.install()
    assert exits == [71]


class _Prctl:
    @staticmethod
    def prctl(*_: int) -> int:
        return 0


@pytest.mark.parametrize("owner", [None, str(os.getpid())], ids=["none", "own"])
def test_the_node_itself_and_foreign_engines_are_left_alone(monkeypatch, owner):
    monkeypatch.delenv(lifeline.OWNER_VARIABLE, raising=False)
    if owner is not None:
        monkeypatch.setenv(lifeline.OWNER_VARIABLE, owner)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("bound"))
    lifeline.install()


@pytest.mark.vllm
@pytest.mark.skipif(not lifeline.supported(), reason="Linux only")
def test_no_engine_process_survives_a_killed_node(tmp_path, tiny_model):
    with running(tmp_path, _NODE, str(tiny_model)) as node:
        assert node.stdout is not None
        # Standard output is the command's: vLLM must log elsewhere.
        assert node.stdout.readline().strip() == "ready"
        family = descendants(node.pid)
        assert len(family) >= 2  # engine core and worker
    assert wait_gone(family, 5) == set()

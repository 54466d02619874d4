"""The supervisor starts, watches and ends processes, and leaves none behind however it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueweight.protos.errors import Conflict, DeadlineExceeded, NotFound, Unavailable
from trueweight.simulation.supervisor import ProcessSpec, Supervisor, group_is_alive, tail

READY = "import json,sys; print(json.dumps({'ready': True, 'endpoint': 'here'}), flush=True);"
# A process with a child of its own in the same group, as an engine has.
WITH_CHILD = (
    "import subprocess,sys; child = subprocess.Popen([sys.executable, '-c', "
    "'import time; time.sleep(600)']);" + READY + "import time; time.sleep(600)"
)


def python(name, code, **settings):
    return ProcessSpec(name, (sys.executable, "-c", code), **settings)


def gone(pid, within_s=5.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with Path(f"/proc/{pid}/stat").open() as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def deaths():
    return []


@pytest.fixture
async def supervisor(tmp_path, deaths):
    made = Supervisor(tmp_path, deaths.append)
    yield made
    await made.stop_all()
    assert made.left_behind() == []


async def test_ready_line_is_read_and_everything_else_is_logged(supervisor):
    code = "import sys; print('hello'); print('{not json'); print('[1]');" + READY
    code += "print('after'); print('bad', file=sys.stderr); import time; time.sleep(600)"
    facts = await supervisor.start(python("a", code))
    assert facts == {"ready": True, "endpoint": "here"}
    await asyncio.sleep(0.3)
    log = (supervisor.log_directory / "a.log").read_text()
    for word in ("hello", "{not json", "[1]", "after", "bad"):
        assert word in log


async def test_a_process_that_dies_first_shows_the_end_of_its_log(supervisor):
    code = "import sys; print('the disk is on fire', file=sys.stderr); sys.exit(3)"
    with pytest.raises(Unavailable, match="exit code 3") as caught:
        await supervisor.start(python("a", code))
    assert "the disk is on fire" in str(caught.value)
    assert supervisor.running == []


async def test_a_process_that_never_serves_is_killed_at_its_deadline(supervisor):
    started = time.monotonic()
    spec = python("slow", "import time; time.sleep(600)", ready_timeout_s=0.5)
    with pytest.raises(DeadlineExceeded):
        await supervisor.start(spec)
    assert time.monotonic() - started < 5
    assert supervisor.left_behind() == []


async def test_sigterm_first_then_sigkill(supervisor, deaths):
    polite = "import signal,sys; signal.signal(15, lambda *a: sys.exit(7));"
    await supervisor.start(python("polite", polite + READY + "import time; time.sleep(600)"))
    assert await supervisor.stop("polite") == 7
    deaf = "import signal; signal.signal(15, signal.SIG_IGN);"
    code = deaf + READY + "import time; time.sleep(600)"
    await supervisor.start(python("deaf", code, stop_timeout_s=0.3))
    assert await supervisor.stop("deaf") == -signal.SIGKILL
    assert deaths == []


async def test_killing_a_process_ends_its_whole_group(supervisor):
    await supervisor.start(python("engine", WITH_CHILD))
    group = supervisor.get("engine").pid
    assert group_is_alive(group)
    await supervisor.kill("engine")
    assert not group_is_alive(group)


async def test_an_unexpected_death_is_reported_once(supervisor, deaths):
    await supervisor.start(python("a", WITH_CHILD))
    os.kill(supervisor.get("a").pid, signal.SIGKILL)
    for _ in range(100):
        await asyncio.sleep(0.02)
        if deaths:
            break
    assert [r.spec.name for r in deaths] == ["a"]
    assert supervisor.left_behind() == []


async def test_a_name_runs_once_and_can_be_started_again(supervisor):
    spec = python("a", READY + "import time; time.sleep(600)")
    await supervisor.start(spec)
    with pytest.raises(Conflict):
        await supervisor.start(spec)
    await supervisor.kill("a")
    await supervisor.start(spec)
    assert [r.spec.name for r in supervisor.running] == ["a"]
    with pytest.raises(NotFound):
        supervisor.get("b")


async def test_cancelling_a_start_ends_the_process(supervisor):
    task = asyncio.create_task(supervisor.start(python("a", "import time; time.sleep(600)")))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert supervisor.running == []


PARENT = """
import asyncio, sys
from pathlib import Path
from trueweight.simulation.supervisor import ProcessSpec, Supervisor
async def main():
    s = Supervisor(Path(sys.argv[1]))
    await s.start(ProcessSpec("child", (sys.executable, "-c", sys.argv[2])))
    print(s.get("child").pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_kill_9_of_the_supervisor_leaves_nothing(tmp_path):
    code = READY + "import time; time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), code], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(child)


def test_an_orphan_refuses_to_start():
    command = [sys.executable, "-m", "trueweight.simulation.child", "1", "echo", "hello"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 71
    assert done.stdout == b""


def test_tail_is_bounded_and_survives_odd_bytes(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100_000 + b"\n" + b"\xff\xfe\n" * 50)
    assert len(tail(path, 10).splitlines()) == 10
    assert tail(tmp_path / "missing") == ""

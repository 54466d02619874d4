"""The demo as its command: exit code, JSON, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from trueweight.simulation.demo_files import DEMO_MODEL
from trueweight.simulation.market import trueweight

# What `trueweight simulate demo --json` promises, also to scripts.
KEYS = {
    "format", "passed", "checks", "model", "engine", "requests", "nodes", "balances", "challenges",
    "fsck", "seconds", "machine", "directory",
}  # fmt: skip


def judge(done, document, engine):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(document) == KEYS
    assert document["format"] == "trueweight-demo-1"
    assert document["passed"] is True
    assert document["engine"] == engine
    assert all(check["passed"] for check in document["checks"])
    requests = document["requests"]
    assert len(requests) >= 60
    assert {r["error"] for r in requests} == {""}
    kinds = {r["kind"] for r in requests}
    assert kinds == {"chat", "completion", "chat, streamed", "completion, streamed"}
    nodes = {n["name"]: n for n in document["nodes"]}
    convicted = {name for name, node in nodes.items() if node["evidence"]["convicted"]}
    assert convicted == {name for name, node in nodes.items() if node["cheating"]} == {"cheat"}
    assert all(node["requests"] > 0 for node in nodes.values()), "a node got no work"
    assert nodes["cheat"]["evidence"]["largest_wealth"] >= 10**6
    # The cheat passed the weights challenge: possession is not use.
    assert document["challenges"]["cheat"]["passed"] is True
    assert document["fsck"]["clean"] is True
    changes = {
        account: b["after_nano"] - b["before_nano"] for account, b in document["balances"].items()
    }
    assert sum(changes.values()) == 0
    bond = next(a for a in changes if a == f"node-bond:{nodes['cheat']['node_id']}")
    assert changes[bond] < 0
    assert "Did the market do its job?" in done.stdout


def test_the_demo_with_synthetic_engines(command, live_processes, tmp_path):
    directory, file = tmp_path / "demo", tmp_path / "demo.json"
    done = command(
        *("simulate", "demo", "--engine", "synthetic", "--directory", str(directory)),
        *("--json", str(file)),
        within_s=280,
    )
    judge(done, json.loads(file.read_text()), "synthetic")
    assert live_processes(str(directory)) == []


@pytest.mark.vllm
@pytest.mark.timeout(800)
def test_the_demo_with_real_engines(command, live_processes, tmp_path):
    directory, file = tmp_path / "demo", tmp_path / "demo.json"
    done = command(
        "simulate", "demo", "--directory", str(directory), "--json", str(file), within_s=780
    )
    judge(done, json.loads(file.read_text()), "vllm")
    assert live_processes(str(directory)) == []


@pytest.mark.parametrize(
    ("ending", "when"),
    [
        (signal.SIGINT, "starting router"),
        (signal.SIGINT, "paid requests"),
        (signal.SIGTERM, "paid requests"),
        (signal.SIGKILL, "paid requests"),
    ],
)
def test_however_the_demo_is_ended_no_process_stays(ending, when, live_processes, tmp_path):
    directory = tmp_path / "demo"
    arguments = ("simulate", "demo", "--engine", "synthetic", "--directory", str(directory))
    running = subprocess.Popen(
        [*trueweight(), *arguments, "--requests", "500", "--seed", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in running.stderr:
            if when in line:
                break
        time.sleep(0.5)
        assert len(live_processes(str(directory))) >= 2
        # To the command alone, as a terminal's Ctrl-C reaches only the foreground group.
        os.kill(running.pid, ending)
        running.stderr.read()
        code = running.wait(timeout=60)
    finally:
        running.kill()
    assert code == (-signal.SIGKILL if ending == signal.SIGKILL else 130)
    deadline = time.monotonic() + 10
    while live_processes(str(directory)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert live_processes(str(directory)) == []


def test_the_demo_refuses_what_is_no_model_and_no_run_directory(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    arguments = ("simulate", "demo", "--engine", "synthetic", "--directory")
    refused = command(*arguments, str(tmp_path / "mine"))
    assert refused.returncode == 2
    assert "holds something else" in refused.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    refused = command(*arguments, str(tmp_path / "new"), "--model", str(tmp_path))
    assert refused.returncode == 2
    assert "no model directory" in refused.stderr
    assert DEMO_MODEL.is_dir()

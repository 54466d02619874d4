"""`trueweight node` as a process: ready line, signals, exit codes, describe."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from trueweight.node.commands import _dtype


def up(world, *more):
    return (
        "node",
        "up",
        "--market",
        world.root / "market.json",
        "--keys",
        world.root / "fresh-node",
        "--model",
        world.model_dir,
        "--engine",
        "synthetic",
        "--ask-input",
        "0.10",
        "--ask-output",
        "0.30",
        *more,
    )


async def test_up_prints_a_ready_line_registers_and_ends_cleanly_on_sigterm(world, peers, command):
    from trueweight.node.describe import open_offer

    ready_file = world.root / "ready.json"
    async with command(*up(world, "--ready-file", ready_file, "--capacity", 5)) as process:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        facts = json.loads(line)
        assert facts["ready"]
        assert facts["model_id"] == "toy"
        assert json.loads(ready_file.read_text()) == facts
        offer = open_offer(await asyncio.wait_for(peers.offers.get(), 10), world.market.market_id)
        assert (offer.node_id, offer.endpoint) == (facts["node_id"], facts["endpoint"])
        assert offer.models[0].ask_input_nano_per_mtok == 100_000_000
        assert offer.models[0].ask_output_nano_per_mtok == 300_000_000
        assert (offer.capacity, offer.fingerprint.engine) == (5, "synthetic")
        assert (world.root / "fresh-node" / "operational.pem").stat().st_mode & 0o077 == 0
        described = await run(
            command,
            "node",
            "describe",
            facts["endpoint"],
            "--market",
            world.root / "market.json",
            "--json",
        )
        shown = json.loads(described[1])
        assert shown["node_id"] == facts["node_id"]
        assert shown["models"][0]["ask_output"] == "0.3"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0
        assert await process.stdout.read() == b""


async def run(command, *arguments):
    async with command(*arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()


async def test_altered_weights_exit_65_and_say_which_file(world, peers, command):
    path = world.model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, err = await run(command, *up(world))
    assert code == 65
    assert out == ""
    assert "model.safetensors" in err
    assert "WEIGHTS_REFUSED" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--ask-input", "free"), "not an amount of credits"),
        (("--router", "nobody"), "names no router"),
        (("--listen", "0.0.0.0:0"), "--advertise"),
        (("--model-id", "gpt"), "sells no gpt"),
    ],
)
async def test_wrong_options_end_with_one_clear_line(world, peers, command, more, words):
    code, _, err = await run(command, *up(world, *more))
    assert code not in (0, None)
    assert words in err
    assert "Traceback" not in err


async def test_engine_must_be_asked_for_by_name(world, peers, command):
    code, _, err = await run(command, *up(world, "--engine", "fastest"))
    assert code == 2
    assert "synthetic" in err
    assert "vllm" in err


@pytest.mark.parametrize(
    ("cpu", "gpu", "emulated"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, False, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False, False),
        ({"architecture": "x86_64", "avx2": True}, True, False),
        ({"architecture": "arm64"}, False, False),
    ],
)
def test_a_node_computes_in_float32_where_bfloat16_would_be_emulated(
    monkeypatch, cpu, gpu, emulated
):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    asked = {"dtype": "auto", "engine": "vllm", "score_only": False}
    assert _dtype(asked) == ("float32" if emulated else "auto")
    assert _dtype({**asked, "dtype": "bfloat16"}) == "bfloat16"
    assert _dtype({**asked, "engine": "synthetic"}) == "auto"
    assert _dtype({**asked, "score_only": True}) == "float32"

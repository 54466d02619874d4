"""A load client that nobody here wrote: vLLM's own, 200 requests, streaming, 64 at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys

import pytest

from trueweight.simulation.inprocess import MODEL_DIRECTORY, NodeSpec

RUN = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main\n"
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm.benchmarks")
async def test_vllm_bench_serve_loses_no_request_and_each_is_billed_once(
    start_market, connect, name, model_id, tmp_path
):
    async with start_market(NodeSpec("a"), NodeSpec("b")) as market:
        client = await connect(market)
        arguments = {
            "--backend": "openai", "--endpoint": "/v1/completions",
            "--base-url": market.base_url.removesuffix("/v1"), "--model": model_id,
            "--tokenizer": MODEL_DIRECTORY, "--dataset-name": "random",
            "--random-input-len": 24, "--random-output-len": 4, "--num-prompts": 200,
            "--max-concurrency": 64, "--result-dir": tmp_path, "--result-filename": "r.json",
        }  # fmt: skip
        words = [str(part) for pair in arguments.items() for part in pair]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUN, *words, "--save-result", "--ignore-eos", "--disable-tqdm",
            env={**os.environ, "OPENAI_API_KEY": client.api_key, "OMP_NUM_THREADS": "1"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 240)
        assert process.returncode == 0, output.decode()[-3000:]
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["completed"], result["failed"]) == (200, 0)
        assert result["total_output_tokens"] == 800
        # The client may send one more request to try the server out.
        captured = market.router.settler.captured
        assert captured in (200, 201)
        assert market.router.settler.refused == 0
        assert await market.held_nano(name) == 0
        transfers = (await market.port("admin").transfers(f"client:{name}")).transfers
        holds = [t for t in transfers if t.reason == "hold"]
        assert len(holds) == captured
        assert sum(t.amount_nano for t in transfers if t.reason == "capture") == int(
            (await market.balance(f"client:{name}")).debits_posted_nano
        )

"""The node as it is really run: a process with vLLM behind it and the shipped demo model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from trueweight.protos.sampling import Sampling
from trueweight.protos.v1 import market_pb2 as mp
from trueweight.protos.v1 import node_pb2 as pb
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.runtime import rpc
from trueweight.runtime.tls import ensure_certificate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def descendants(pid):
    """All living processes below one, by /proc."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(entry.parent.name)] = int(fields[1])
    found, added = {pid}, True
    while added:
        new = {p for p, parent in parents.items() if parent in found} - found
        found, added = found | new, bool(new)
    return found - {pid}


async def gone(pids, seconds):
    for _ in range(int(seconds * 10)):
        alive = [p for p in pids if not zombie(p)]
        if not alive:
            return True
        await asyncio.sleep(0.1)
    return False


def zombie(pid):
    """True also for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def up(world):
    return (
        *("node", "up", "--engine", "vllm", "--capacity", 32),
        *("--market", world.root / "market.json", "--keys", world.root / "node"),
        *("--model", world.model_dir, "--ask-input", "0.10", "--ask-output", "0.30"),
        *("--kv-cache-mib", 128, "--score-for", world.signers["verifier"].identity),
    )


async def ready(process):
    line = await asyncio.wait_for(process.stdout.readline(), 200)
    if not line:
        raise AssertionError((await process.stderr.read()).decode()[-3000:])
    return json.loads(line)


async def test_a_real_node_serves_scores_aborts_and_leaves_no_process(
    demo_world, fake_router, command, serve
):
    world = demo_world
    async with serve(world), command(*up(world)) as process:
        drain = asyncio.create_task(swallow(process.stderr))
        facts = await ready(process)
        engine_processes = descendants(process.pid)
        assert engine_processes
        channel = rpc.make_channel(facts["endpoint"], ensure_certificate(world.root / "node", 0))
        router = fake_router(world, facts["node_id"])
        await router.dial(channel)
        await serves_32_at_once(router)
        await scores_zero(world, facts, channel, router)
        await cancelling_aborts_the_engine(router, channel)
        await router.close()
        await channel.close()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert await gone(engine_processes, 10)
        drain.cancel()


async def swallow(stream):
    while await stream.read(65536):
        pass


async def serves_32_at_once(router):
    sampling = Sampling(stop_token_ids=tuple(router.world.manifest.eos_token_ids))
    calls = [router.dispatch(seed=i, max_tokens=48, sampling=sampling) for i in range(1, 33)]
    await router.send(*calls)
    await router.until(lambda: len(router.receipts) == 32, timeout_s=90)
    for call in range(1, 33):
        receipt = router.check(call)
        assert receipt.finish_reason in (mp.EOS, mp.LENGTH)
        assert receipt.fingerprint.engine == "vllm"


async def scores_zero(world, facts, channel, router):
    sampling = Sampling(stop_token_ids=tuple(world.manifest.eos_token_ids)).to_proto()
    items = [
        pb.ScoreItem(
            prompt_token_ids=(5, 6, 7),
            output_token_ids=router.output[call],
            sampling=sampling,
            seed=call,
        )
        for call in range(1, 9)
    ]
    answer = await rpc.call(
        NodeStub(channel).Score,
        pb.ScoreRequest(manifest_digest=world.manifest_digest, items=items, deadline_ms=60_000),
        timeout_ms=90_000,
        metadata=world.tokens("verifier").metadata(facts["node_id"]),
    )
    margins = [min(m, 0.5) for result in answer.results for m in result.margins]
    assert sum(m == 0 for m in margins) > 0.98 * len(margins)
    described = await rpc.call(NodeStub(channel).Describe, pb.DescribeRequest(), timeout_ms=5_000)
    assert described.self_test_positions > 0


async def cancelling_aborts_the_engine(router, channel):
    before = len(router.receipts)
    calls = [router.dispatch(sampling=Sampling(), max_tokens=900) for _ in range(8)]
    await router.send(*calls)
    await router.until(lambda: all(len(router.output.get(d.call, [])) > 5 for d in calls), 60)
    await router.send(cancels=[pb.Cancel(call=d.call) for d in calls])
    await router.until(lambda: len(router.receipts) == before + 8)
    for dispatch in calls:
        receipt = router.check(dispatch.call, cancelled=True)
        assert receipt.finish_reason == mp.CANCELLED
        assert receipt.output_tokens < 900
    await asyncio.sleep(0.5)
    described = await rpc.call(NodeStub(channel).Describe, pb.DescribeRequest(), timeout_ms=5_000)
    made = described.load.generated_tokens_total
    await asyncio.sleep(0.5)
    described = await rpc.call(NodeStub(channel).Describe, pb.DescribeRequest(), timeout_ms=5_000)
    assert described.load.running == 0
    assert described.load.generated_tokens_total == made


async def test_kill_9_of_a_real_node_leaves_no_engine_process(demo_world, command, serve):
    async with serve(demo_world), command(*up(demo_world)) as process:
        drain = asyncio.create_task(swallow(process.stderr))
        await ready(process)
        engine_processes = descendants(process.pid)
        assert engine_processes
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        assert await gone(engine_processes, 5)
        drain.cancel()

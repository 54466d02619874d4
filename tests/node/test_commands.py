"""`trueweight node` as a process: ready line, signals, exit codes, describe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.v1.ledger_pb2_grpc import LedgerServicer, add_LedgerServicer_to_server
from trueweight.protos.v1.market_pb2 import MarketDescriptor, Member
from trueweight.protos.v1.router_pb2 import RegisterResponse
from trueweight.protos.v1.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from trueweight.runtime import rpc
from trueweight.runtime.keys import create_keys
from trueweight.runtime.market import write_market
from trueweight.runtime.tls import ensure_certificate

LAUNCH = "from trueweight.client.launcher import main; main()"


class Peers(LedgerServicer, RouterServicer):
    """A ledger and a router in one, as far as a starting node needs them."""

    def __init__(self, world):
        self._world, self.offers = world, asyncio.Queue()

    async def ReadLog(self, request, context):
        return await self._world.ledger.read_log(request.from_index, kinds=list(request.kinds))

    async def Register(self, request, context):
        await self.offers.put(request.offer)
        return RegisterResponse(lease_ms=15_000, eligible=True)


@pytest.fixture
async def peers(world, clock):
    """Servers of ledger and router, and a market file that names them."""
    ledger_signer = create_keys(world.root / "ledger", world.market.market_id, clock)
    servicer, members = Peers(world), list(world.market.descriptor.members)
    server = rpc.make_server()
    add_LedgerServicer_to_server(servicer, server)
    add_RouterServicer_to_server(servicer, server)
    pem = ensure_certificate(world.root / "ledger", clock.now_unix_ms())
    endpoint = rpc.listen(server, "127.0.0.1:0", world.root / "ledger")
    members.append(
        Member(
            identity=ledger_signer.identity, role=Member.LEDGER, key_event=ledger_signer.key_event
        )
    )
    for member in members:
        if member.role in (Member.LEDGER, Member.ROUTER):
            member.endpoint, member.tls_certificate_pem = endpoint, pem
    descriptor = MarketDescriptor(market_id=world.market.market_id, members=members)
    market = world.signers["market"]
    write_market(world.root / "market.json", seal(descriptor, market), market.key_event)
    await server.start()
    yield servicer
    await server.stop(0)


@contextlib.asynccontextmanager
async def command(*arguments):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LAUNCH,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


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


async def test_up_prints_one_ready_line_registers_and_ends_cleanly_on_sigterm(world, peers):
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
            "node", "describe", facts["endpoint"], "--market", world.root / "market.json", "--json"
        )
        shown = json.loads(described[1])
        assert shown["node_id"] == facts["node_id"]
        assert shown["models"][0]["ask_output"] == "0.3"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0
        assert await process.stdout.read() == b""


async def run(*arguments):
    async with command(*arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()


async def test_altered_weights_exit_65_and_say_which_file(world, peers):
    path = world.model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, err = await run(*up(world))
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
async def test_wrong_options_end_with_one_clear_line(world, peers, more, words):
    code, _, err = await run(*up(world, *more))
    assert code not in (0, None)
    assert words in err
    assert "Traceback" not in err


async def test_engine_must_be_asked_for_by_name(world, peers):
    code, _, err = await run(*up(world, "--engine", "fastest"))
    assert code == 2
    assert "synthetic" in err
    assert "vllm" in err

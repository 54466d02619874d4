"""``trueweight node``: run a worker node, or ask one what it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trueweight.node.app import NodeApp, run_node
from trueweight.node.config import NodeConfig, pick_router
from trueweight.node.describe import Description, describe
from trueweight.node.engine import Engine
from trueweight.node.engines import ENGINE_NAMES, RUNNERS, EngineChoice, make_engine
from trueweight.node.vllm.options import usual_dtype
from trueweight.protos.envelope import digest_of
from trueweight.protos.evidence import REFERENCE_DTYPE
from trueweight.protos.money import format_credits, parse_credits
from trueweight.runtime import cli
from trueweight.runtime.market import Market, load_market


@click.group()
def node() -> None:
    """Worker nodes: serve signed weights and earn credits."""


@node.command()
@cli.market_option
@cli.keys_option
@cli.path_option("--model", required=True, help="Model directory in Hugging Face layout.")
@cli.option("--model-id", default=None, help="Registered name, if the directory fits several.")
@cli.option("--ask-input", default="0", help="Credits per million input tokens.")
@cli.option("--ask-output", default="0", help="Credits per million output tokens.")
@cli.option(
    "--router",
    default="",
    help="Router to work for, HOST:PORT or identity; default: the market's first.",
)
@cli.option("--ledger", default="", help="Ledger HOST:PORT, if not that of the market file.")
@cli.option("--listen", default="127.0.0.1:0", help="HOST:PORT to serve at; port 0 picks one.")
@cli.option("--advertise", default="", help="HOST:PORT under which the router reaches this node.")
@cli.option("--attach", is_flag=True, help="Dial the router (behind NAT) instead of being dialled.")
@cli.option("--score-for", multiple=True, help="Verifier identity that may ask for scores.")
@cli.option("--score-only", is_flag=True, help="Reference node of a verifier: no router, no work.")
@cli.path_option("--operator-keys", default=None, help="Keys of this node's owner, to declare him.")
@cli.option("--lease-ms", default=15_000, type=click.IntRange(1_000, 600_000), help="Offer lease.")
@cli.option("--drain-s", default=30.0, type=click.FloatRange(0, 3600), help="Time to finish calls.")
@cli.path_option("--ready-file", default=None, help="Also write the ready line to this file.")
@cli.option("--engine", type=click.Choice(ENGINE_NAMES), default="vllm", help="What computes.")
@cli.option(
    "--capacity",
    default=0,
    type=click.IntRange(0, 4096),
    help="Requests at once; 0: as the engine.",
)
@cli.option("--max-context", default=0, type=click.IntRange(0), help="Tokens; 0: what fits.")
@cli.option(
    "--dtype",
    default="auto",
    help="vllm: auto is the weights' own; float32 to score only, and on CPUs without bfloat16.",
)
@cli.option("--threads", default=1, type=click.IntRange(0, 512), help="vllm: threads per worker.")
@cli.option("--kv-cache-mib", default=256, type=click.IntRange(0), help="vllm: 0 leaves it to it.")
@cli.option("--tensor-parallel", default=1, type=click.IntRange(1, 64), help="vllm: workers.")
@cli.option("--runner", type=click.Choice(RUNNERS), default="auto", help="vllm: its Model Runner.")
@cli.option("--compile/--eager", "compiled", default=False, help="vllm: compile the model.")
@cli.option(
    "--start-timeout-s",
    default=540.0,
    type=click.FloatRange(1, 7200),
    help="For the engine to start.",
)
@cli.option(
    "--synthetic-speed",
    default=0.0,
    type=click.FloatRange(0),
    help="Tokens/s a request; 0: no limit.",
)
@cli.option(
    "--synthetic-noise",
    default=0.0,
    type=click.FloatRange(0, 10),
    help="Rounding to pretend, in logits.",
)
@cli.log_options
def up(**options: Any) -> None:
    """Serve a model: check its weights, start the engine, register, answer.

    Keys are made on the first start if --keys is empty. SIGTERM finishes running calls first.
    """
    run_up(options, make_engine)


def run_up(options: dict[str, Any], make: Callable[[Path, EngineChoice], Engine]) -> None:
    """What ``up`` does, with the engine that ``make`` gives for a model directory."""
    cli.configure_logs(options["log_level"], options["log_json"])
    config = _config(options, load_market(options["market"]))
    engine = make(config.model_dir, _choice(options))

    def on_ready(app: NodeApp) -> None:
        facts = _ready_facts(app, options["engine"])
        if options["ready_file"]:
            _write_ready(options["ready_file"], facts)
        cli.print_ready(**facts)

    async def main() -> None:
        async def serve(stop: asyncio.Event) -> None:
            await run_node(config, engine, stop, on_ready)

        await cli.serve_until_signal(serve)

    cli.run_async(main())


@node.command("describe")
@click.argument("endpoint")
@cli.market_option
@cli.json_option
def describe_command(endpoint: str, market: Path, as_json: bool) -> None:
    """Show what the node at HOST:PORT serves; its answer is verified."""
    found = cli.run_async(describe(endpoint, load_market(market).market_id))
    facts = _description_facts(found)
    if as_json:
        cli.print_json(facts)
        return
    cli.print_table(f"Node {endpoint}", ("what", "value"), [(k, v) for k, v in facts.items()])


def _ready_facts(app: NodeApp, engine: str) -> dict[str, Any]:
    """What a supervisor needs to know of a serving node."""
    weights = app.weights
    return {
        "role": "node",
        "node_id": app.node_id,
        "endpoint": app.endpoint,
        "engine": engine,
        "model_id": weights.model_id if weights else "",
        "manifest_digest": weights.manifest_digest.hex() if weights else "",
    }


def _description_facts(found: Description) -> dict[str, Any]:
    """A description as plain values, asks in credits per million tokens."""
    names = {digest_of(e): m for e, m in zip(found.answer.manifests, found.manifests, strict=False)}
    models = [
        {
            "manifest": model.manifest_digest.hex(),
            "name": names[model.manifest_digest].name if model.manifest_digest in names else "?",
            "ask_input": format_credits(model.ask_input_nano_per_mtok),
            "ask_output": format_credits(model.ask_output_nano_per_mtok),
            "max_context_tokens": model.max_context_tokens,
        }
        for model in found.offer.models
    ]
    print_of, load = found.offer.fingerprint, found.answer.load
    return {
        "node_id": found.offer.node_id,
        "endpoint": found.offer.endpoint or "dials its router",
        "models": models,
        "engine": f"{print_of.engine} {print_of.engine_version}",
        "dtype": print_of.dtype,
        "quantization": print_of.quantization,
        "accelerator": print_of.accelerator,
        "sampler": f"{print_of.sampler_id} {print_of.sampler_precision}",
        "capacity": found.offer.capacity,
        "running": load.running,
        "waiting": load.waiting,
        "self_test": f"{found.answer.self_test_equal} of {found.answer.self_test_positions} equal",
    }


def _config(options: dict[str, Any], market: Market) -> NodeConfig:
    router = None if options["score_only"] else pick_router(market, options["router"])
    return NodeConfig(
        model_dir=options["model"],
        market=market,
        keys=options["keys"],
        listen=options["listen"],
        advertise=options["advertise"],
        ask_input_nano_per_mtok=parse_credits(options["ask_input"]),
        ask_output_nano_per_mtok=parse_credits(options["ask_output"]),
        capacity=options["capacity"],
        model_id=options["model_id"],
        router=router,
        ledger_endpoint=options["ledger"],
        attach=options["attach"],
        score_for=frozenset(options["score_for"]),
        score_only=options["score_only"],
        operator_keys=options["operator_keys"],
        lease_ms=options["lease_ms"],
        drain_ms=options["drain_s"] * 1000,
        journal_path=options["keys"] / "receipts.sqlite",
    )


def _dtype(options: dict[str, Any]) -> str:
    asked: str = options["dtype"]
    if asked != "auto" or options["engine"] != "vllm":
        return asked
    if options["score_only"]:
        return REFERENCE_DTYPE
    return usual_dtype()


def _choice(options: dict[str, Any]) -> EngineChoice:
    return EngineChoice(
        name=options["engine"],
        capacity=options["capacity"],
        max_context_tokens=options["max_context"],
        dtype=_dtype(options),
        threads=options["threads"],
        kv_cache_mib=options["kv_cache_mib"],
        tensor_parallel=options["tensor_parallel"],
        eager=not options["compiled"],
        runner=options["runner"],
        start_timeout_s=options["start_timeout_s"],
        synthetic_speed=options["synthetic_speed"],
        synthetic_noise=options["synthetic_noise"],
    )


def _write_ready(path: Path, facts: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"ready": True, **facts}) + "\n")
    temporary.replace(path)

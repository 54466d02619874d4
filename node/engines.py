"""Engines by name. The synthetic one must be asked for; nothing falls back to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trueweight.node.engine import Engine
from trueweight.node.synthetic import Speed, SyntheticEngine
from trueweight.node.vllm.engine import VllmEngine
from trueweight.node.vllm.options import MIB, VllmOptions
from trueweight.protos.errors import InvalidRequest

ENGINE_NAMES = ("vllm", "synthetic")
RUNNERS = ("auto", "v1", "v2")


@dataclass(frozen=True)
class EngineChoice:
    """What an operator may choose about an engine. Zeros leave it to the engine."""

    name: str
    capacity: int = 0
    max_context_tokens: int = 0
    dtype: str = "auto"
    threads: int = 1
    kv_cache_mib: int = 256
    tensor_parallel: int = 1
    eager: bool = True
    runner: str = "auto"
    start_timeout_s: float = 540.0
    synthetic_speed: float = 0.0
    synthetic_noise: float = 0.0


def make_engine(model_dir: Path, choice: EngineChoice) -> Engine:
    """The engine, not started."""
    if choice.name == "synthetic":
        return SyntheticEngine.from_directory(
            model_dir,
            speed=Speed(decode_tokens_per_s=choice.synthetic_speed),
            noise=choice.synthetic_noise,
            max_running=choice.capacity or 64,
        )
    if choice.name == "vllm":
        return VllmEngine(model_dir, _vllm_options(choice))
    raise InvalidRequest(f"there is no engine {choice.name!r}", hint=f"Engines: {ENGINE_NAMES}.")


def _vllm_options(choice: EngineChoice) -> VllmOptions:
    return VllmOptions(
        max_context_tokens=choice.max_context_tokens,
        max_running=choice.capacity or 32,
        kv_cache_bytes=choice.kv_cache_mib * MIB,
        dtype=choice.dtype,
        tensor_parallel=choice.tensor_parallel,
        threads=choice.threads,
        enforce_eager=choice.eager,
        runner="" if choice.runner == "auto" else choice.runner,
        start_timeout_s=choice.start_timeout_s,
    )

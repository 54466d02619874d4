"""Options of ``VllmEngine`` and what they mean for vLLM. No vLLM import here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
# vLLM's own word for the longest context that model and cache allow.
FIT_CONTEXT = -1

# By Model Runner: vLLM has two, with interfaces of their own.
SAMPLER_PLUGINS = {
    "v1": "trueweight.node.vllm.sampler_plugin:CanonicalSampler",
    "v2": "trueweight.node.vllm.sampler_v2:CanonicalSampler",
}
SCORER_EXTENSION = "trueweight.node.vllm.scorer.ScorerExtension"


def emulates_bfloat16() -> bool:
    """True on a machine without a GPU whose x86 CPU has no instructions for bfloat16: there float32
    is several times as fast. Imports PyTorch, which takes seconds."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        return False
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return cpu["architecture"] == "x86_64" and not native


def usual_dtype() -> str:
    """What a node computes in unless told otherwise: the weights' own ("auto"), but "float32" where
    bfloat16 would be emulated. That is rounded no better and takes several times as long."""
    return "float32" if emulates_bfloat16() else "auto"


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How to run the engine.

    ``max_context_tokens`` 0 takes the model's own, or what the cache holds if that is less.
    ``kv_cache_bytes`` and ``threads`` are per
    worker; 0 leaves them to vLLM (right for GPUs: all memory that is left). ``threads`` sets
    OMP_NUM_THREADS without pinning, so that engines share a machine. ``enforce_eager`` trades a
    shorter start for slower steps on GPUs; on CPUs the difference is small. ``runner`` is vLLM's
    Model Runner, "v1" or "v2"; empty takes V2 on GPUs and V1 on CPUs, where there is no other.
    """

    max_context_tokens: int = 0
    max_running: int = 32
    max_batched_tokens: int = 2048
    kv_cache_bytes: int = 256 * MIB
    dtype: str = "auto"
    quantization: str = ""
    kv_dtype: str = "auto"
    tensor_parallel: int = 1
    threads: int = 1
    enforce_eager: bool = True
    prefix_caching: bool = True
    runner: str = ""
    log_level: str = "WARNING"
    start_timeout_s: float = 540.0
    score_timeout_s: float = 300.0


def engine_arguments(
    model_dir: Path, options: VllmOptions, *, canonical: bool, runner: str = "v1"
) -> dict[str, Any]:
    """Keyword arguments of ``AsyncEngineArgs``.

    ``canonical=False`` leaves out sampler and scorer: the bare engine that benchmarks compare with.
    """
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": "model",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": options.dtype,
        "quantization": options.quantization or None,
        "kv_cache_dtype": options.kv_dtype,
        "tensor_parallel_size": options.tensor_parallel,
        "enforce_eager": options.enforce_eager,
        "max_num_seqs": options.max_running,
        "max_num_batched_tokens": options.max_batched_tokens,
        "max_model_len": options.max_context_tokens or FIT_CONTEXT,
        "kv_cache_memory_bytes": options.kv_cache_bytes or None,
        "enable_prefix_caching": options.prefix_caching,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "disable_log_stats": True,
        "enable_log_requests": False,
        "trust_remote_code": False,
    }
    if canonical:
        arguments["logits_processors"] = [SAMPLER_PLUGINS[runner]]
        arguments["worker_extension_cls"] = SCORER_EXTENSION
    return arguments


def engine_environment(
    options: VllmOptions, owner_variable: str, runner: str = "v1"
) -> dict[str, str]:
    """Variables that the engine's processes need; set before vLLM is imported."""
    variables = {
        owner_variable: str(os.getpid()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": options.log_level,
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the command's own
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if options.threads:
        variables["OMP_NUM_THREADS"] = str(options.threads)
    return variables

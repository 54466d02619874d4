"""Random-weight Llamas by a fixed recipe: for tests and benchmarks that need size, not sense.

Numpy only. The same arguments give the same bytes on every machine, so that nothing is stored.
Weights are N(0, std²) drawn by PCG64 in the order of ``_shapes``, rounded to bfloat16; norms are 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The recipe. ``std`` 0.02 is the usual initialisation; wider weights give sharper outputs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    max_context_tokens: int = 2048
    std: float = 0.02
    seed: int = 1


TINY = LlamaShape(64, 2, 2, 1, 128, 512, max_context_tokens=1024, std=0.2)
"""Starts fast; for tests."""

WIDE = LlamaShape(1024, 4, 16, 8, 2816, 8192)
"""Hidden 1024: wide enough that batches round differently. For benchmarks."""


def write_random_llama(directory: Path, shape: LlamaShape) -> Path:
    """Write a Hugging Face model directory (config, generation config, one safetensors file)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2), "utf-8")
    generation = {"bos_token_id": 0, "eos_token_id": 1}
    (directory / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in _shapes(shape):
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = np.random.default_rng(shape.seed)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, size in _shapes(shape):
            if name.endswith("norm.weight"):
                values = np.ones(size, dtype=np.float32)
            else:
                values = generator.standard_normal(size, dtype=np.float32) * np.float32(shape.std)
            file.write(_bfloat16_bytes(values))
    return directory


def _bfloat16_bytes(values: np.ndarray) -> bytes:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _shapes(shape: LlamaShape) -> Iterator[tuple[str, list[int]]]:
    head_dim = shape.hidden // shape.heads
    kv = head_dim * shape.kv_heads
    yield "model.embed_tokens.weight", [shape.vocabulary, shape.hidden]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", [shape.hidden]
        yield at + "self_attn.q_proj.weight", [shape.hidden, shape.hidden]
        yield at + "self_attn.k_proj.weight", [kv, shape.hidden]
        yield at + "self_attn.v_proj.weight", [kv, shape.hidden]
        yield at + "self_attn.o_proj.weight", [shape.hidden, shape.hidden]
        yield at + "post_attention_layernorm.weight", [shape.hidden]
        yield at + "mlp.gate_proj.weight", [shape.intermediate, shape.hidden]
        yield at + "mlp.up_proj.weight", [shape.intermediate, shape.hidden]
        yield at + "mlp.down_proj.weight", [shape.hidden, shape.intermediate]
    yield "model.norm.weight", [shape.hidden]
    yield "lm_head.weight", [shape.vocabulary, shape.hidden]


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }

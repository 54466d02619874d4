"""Run by ``test_triton.py`` in a process of its own: compiles every kernel for a GPU, without one.

An interpreter runs what no compiler would take (types that change in a loop, for instance).
"""

from __future__ import annotations

import inspect
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from trueweight.node.vllm import triton_kernels
from trueweight.protos.sampling_parameters import MAX_BAD_WORD_IDS

TARGET = GPUTarget("cuda", 90, 32)
CONSTANTS = {"BLOCK": triton_kernels.BLOCK, "MOST": MAX_BAD_WORD_IDS}
# What ``device_rules`` passes under these names; any other is a pointer to int32.
TYPES = {
    **dict.fromkeys(("size", "logits_stride", "tokens_stride"), "i32"),
    **dict.fromkeys(
        (
            *("out", "logits", "x", "static", "floors", "noisy", "temperatures", "log_min_ps"),
            *("top_ps", "repetitions", "frequencies", "presences"),
        ),
        "*fp32",
    ),
    **dict.fromkeys(("margins", "logprobs"), "*fp64"),
    **dict.fromkeys(("winners", "seeds", "positions", "claimed", "ranks"), "*i64"),
    "masks": "*i1",
    "stops": "*i8",
    **dict.fromkeys(("clip", "rounding"), "fp32"),
}


def main() -> None:
    count = 0
    for name, kernel in inspect.getmembers(triton_kernels):
        if not isinstance(kernel, JITFunction) or name.startswith("_"):
            continue
        constants = {arg: CONSTANTS[arg] for arg in kernel.arg_names if arg in CONSTANTS}
        signature = {
            arg: "constexpr" if arg in CONSTANTS else TYPES.get(arg, "*i32")
            for arg in kernel.arg_names
        }
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
        if not compiled.asm["cubin"]:
            raise SystemExit(f"{name}: no code")
        count += 1
    sys.stdout.write(f"{count} kernels\n")


if __name__ == "__main__":
    main()

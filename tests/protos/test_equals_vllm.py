"""tw-gumbel-1 is vLLM's seeded fp32 sampler, bit for bit in hash and uniform.

vLLM's kernels are read from its installed source and run on numpy: the functions used here only
need integer arithmetic and five names of ``triton.language``. Triton itself is not needed.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.sampling import gumbel, hash_u32
from trueweight.protos.sampling_noise import uniform

WANTED = {
    "_murmur3_rotl32",
    "_murmur3_mix",
    "_murmur3_fmix32",
    "murmur3_hash32",
    "murmur3_uniform32",
    "_log1p_neg_stable",
}


class Value(np.ndarray):
    """An array with Triton's ``.to``."""

    def to(self, dtype):
        return self.astype(dtype)


def value(numbers, dtype):
    return np.asarray(numbers, dtype=dtype).view(Value)


def arguments_of(seed, pos, tokens):
    """Scalars are spread out: numpy's in-place operators do not widen their left side."""
    count = len(tokens)
    return (
        value([seed] * count, np.int64),
        value([pos] * count, np.int64),
        value(list(tokens), np.uint32),
    )


@pytest.fixture(scope="module")
def kernels():
    # find_spec of the package runs nothing of it.
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    source = Path(spec.origin).parent / "v1/worker/gpu/sample/gumbel.py"
    body = []
    for item in ast.parse(source.read_text()).body:
        if isinstance(item, ast.FunctionDef) and item.name in WANTED:
            item.decorator_list = []
            for argument in item.args.args:
                argument.annotation = None
            body.append(item)
    assert {item.name for item in body} == WANTED
    names = SimpleNamespace(
        int64=np.int64,
        int32=np.int32,
        uint32=np.uint32,
        float32=np.float32,
        log=np.log,
        maximum=np.maximum,
        where=np.where,
    )
    space = {"tl": names}
    code = compile(ast.Module(body=body, type_ignores=[]), str(source), "exec")
    exec(code, space)  # noqa: S102  (vLLM's own installed source)
    return SimpleNamespace(**{name: space[name] for name in WANTED})


@settings(max_examples=100, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50),
)
def test_hash_and_uniform_are_bit_equal(kernels, seed, pos, tokens):
    arguments = arguments_of(seed, pos, tokens)
    with np.errstate(over="ignore"):
        theirs = kernels.murmur3_hash32(*arguments)
        their_u = kernels.murmur3_uniform32(*arguments)
    ours = hash_u32(seed, pos, np.array(tokens))
    assert (np.asarray(theirs) == ours).all()
    assert their_u.dtype == np.float32
    assert (np.asarray(their_u) == uniform(ours)).all()


def test_noise_agrees_as_far_as_their_series_goes(kernels):
    seed, pos, size = 20261123, 77, 200_000
    with np.errstate(over="ignore"):
        u = kernels.murmur3_uniform32(*arguments_of(seed, pos, range(size)))
    theirs = np.asarray(-np.log(-kernels._log1p_neg_stable(u)))
    ours = gumbel(seed, pos, size)
    # Their logarithm is a series with an error of 6e-7; in the tail that wins, it is exact.
    assert np.abs(theirs - ours).max() < 1e-5
    tail = ours > 2.5
    assert tail.sum() > 1000
    assert np.abs(theirs - ours)[tail].max() < 2e-6

"""The Triton kernels and vLLM's Model Runner V2, as far as they go without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Triton lies beside the environment, not in it: 0.7 GB that nothing but this test wants on a
# machine without a GPU, and that vLLM would go looking through at every start.
TRITON = Path(sys.prefix) / "triton"
HERE = Path(__file__).parent


@pytest.fixture
def python(tmp_path):
    """Runs Python with Triton in sight; its exit status and output."""
    if not (TRITON / "triton").is_dir():
        if os.environ.get("TRUEWEIGHT_WITHOUT_TRITON"):
            pytest.skip("without Triton, as TRUEWEIGHT_WITHOUT_TRITON allows")
        pytest.fail("Triton is not installed; `make setup-dev` does")

    def run(*arguments, **more):
        environment = {
            **os.environ,
            "PYTHONPATH": str(TRITON),
            "TRITON_CACHE_DIR": str(tmp_path),
            **more,
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout[-4000:] + done.stderr[-2000:]

    return run


def test_kernels_and_adapters_equal_the_reference_in_tritons_interpreter(python):
    options = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")
    status, said = python(
        "-m", "pytest", *options, HERE / "interpreted_triton.py", TRITON_INTERPRET="1"
    )
    assert status == 0, said


def test_every_kernel_compiles_for_a_gpu(python):
    status, said = python("-P", HERE / "compiled_triton.py")
    assert (status, "11 kernels" in said) == (0, True), said

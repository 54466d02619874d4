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
CHECKS = Path(__file__).with_name("interpreted_triton.py")


def test_kernels_and_adapters_equal_the_reference_in_tritons_interpreter():
    if not (TRITON / "triton").is_dir():
        pytest.skip("Triton is not installed; `make setup-dev` does")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON)}
    options = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CHECKS)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

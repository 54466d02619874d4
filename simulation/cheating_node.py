"""A node that serves 4-bit weights under the honest manifest.

``python -m trueweight.simulation.cheating_node`` takes the options of ``trueweight node up``. It is
the honest node's own code, composed with another engine: the weights that the node checks against
the signed manifest are the registered ones, the weights that compute the answers are not. It
declares the honest engine's fingerprint. ``node/`` has no switch for any of this.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from trueweight.node import commands
from trueweight.node.engine import Engine
from trueweight.node.engines import EngineChoice, make_engine
from trueweight.node.synthetic import Speed, SyntheticEngine
from trueweight.node.synthetic_model import SyntheticModel, shape_from_directory
from trueweight.simulation.adversaries import PerturbedModel
from trueweight.simulation.adversary_weights import write_quantised

BITS, GROUP = 4, 32
# What 4-bit weights do to the logits of the demo model, roughly; for the synthetic engine only.
SYNTHETIC_ERROR_LOGITS = 0.25


def _cheap_engine(workplace: Path, model_directory: Path, choice: EngineChoice) -> Engine:
    """The engine that the choice asks for, on worse weights than it says."""
    if choice.name == "synthetic":
        honest = SyntheticModel(shape_from_directory(model_directory))
        return SyntheticEngine(
            PerturbedModel(honest, SYNTHETIC_ERROR_LOGITS),
            speed=Speed(decode_tokens_per_s=choice.synthetic_speed),
            max_running=choice.capacity or 64,
            max_context_tokens=honest.shape.max_context_tokens,
        )
    cheap = workplace / "cheap-weights"
    shutil.rmtree(cheap, ignore_errors=True)
    return make_engine(write_quantised(model_directory, cheap, bits=BITS, group=GROUP), choice)


def cheat(**options: Any) -> None:
    """Serve 4-bit weights under the honest manifest."""
    commands.run_up(options, functools.partial(_cheap_engine, options["keys"]))


def main() -> None:
    """``trueweight node up`` with another engine put into it."""
    click.Command("cheating-node", params=commands.up.params, callback=cheat).main(
        sys.argv[1:], auto_envvar_prefix="TRUEWEIGHT"
    )


if __name__ == "__main__":
    main()

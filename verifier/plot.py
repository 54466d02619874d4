"""A picture of a node's wealth. Needs matplotlib, which only people who want pictures install."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import CONVICT, SUSPECT
from trueweight.verifier.report import Explanation


def write_png(explanation: Explanation, path: Path) -> None:
    """Writes the wealth after each audit, with both thresholds. Raises InvalidRequest without
    matplotlib."""
    axes, figure = canvas()
    wealth = [0.0, *(math.log10(max(step.wealth, 1e-12)) for step in explanation.steps)]
    tokens = [0]
    for step in explanation.steps:
        tokens.append(tokens[-1] + (step.tokens if step.mu0 else 0))
    axes.step(tokens, wealth, where="post", label="wealth")
    axes.axhline(math.log10(SUSPECT), linestyle="--", color="tab:orange", label="suspect")
    axes.axhline(math.log10(CONVICT), linestyle="--", color="tab:red", label="convict")
    axes.set_xlabel("audited tokens")
    axes.set_ylabel("log10 of the wealth")
    axes.set_title(f"{explanation.node_id}: {explanation.state}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=120)


def canvas() -> tuple[Any, Any]:
    """Axes and figure, without a display. Raises InvalidRequest without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise InvalidRequest(
            "a picture needs matplotlib", hint="Install it, or leave out --png."
        ) from None
    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    return figure.add_subplot(), figure

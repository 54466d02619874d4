"""What the log says about a node's standing, as its audit rate sees it. Pure."""

from __future__ import annotations

from trueweight.verifier.epochs import Standing
from trueweight.verifier.state import LogView


def standings(view: LogView) -> dict[str, Standing]:
    """Every known node's standing, from the pooled wealth."""
    return {
        node_id: Standing(
            audited_tokens=record.pooled.wealth.tokens,
            suspect=record.pooled.state != "clear",
        )
        for node_id, record in view.nodes.items()
    }

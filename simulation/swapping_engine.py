"""An engine whose weights change while it runs, so that one start serves many cheats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trueweight.node.vllm.engine import VllmEngine


class SwappingEngine(VllmEngine):
    """The node's engine; vLLM reloads weights of the same shape in place."""

    async def swap_weights(self, model: Path) -> None:
        """Serve these weights from now on. Nothing may be running."""
        llm: Any = self._process._llm
        await llm.reset_prefix_cache()
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})

"""Grammars inside an engine's worker, shared by its sampler and its scorer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from trueweight.node.grammar import GrammarCursor, Grammars
from trueweight.protos.errors import UnsupportedParameter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from trueweight.node.vllm.wire import EngineOrder


def grammars_of(config: VllmConfig) -> Grammars | None:
    """Of the worker's model; None if it has none."""
    return _grammars(str(config.model_config.model), config.model_config.get_vocab_size())


@lru_cache(maxsize=1)
def _grammars(model_directory: str, vocabulary_size: int) -> Grammars | None:
    return Grammars.from_directory(Path(model_directory), vocabulary_size)


def cursor_of(order: EngineOrder, grammars: Grammars | None) -> GrammarCursor | None:
    """Masks of a request; None if it has no grammar."""
    if not order.sampling.grammar_sha256:
        return None
    if grammars is None:  # the node checks this before it sends anything here
        raise UnsupportedParameter("this engine has no grammars", param="response_format")
    return grammars.cursor(order.grammar_source, order.sampling.stop_token_ids)

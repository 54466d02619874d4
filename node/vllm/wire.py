"""What the node tells its engine processes about a request, in ``SamplingParams.extra_args``.

It carries the contract's own message, so that both sides validate with the same code. vLLM itself
always gets neutral values and temperature 0: with others it would reset, reorder or repeat what the
canonical sampler does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trueweight.node.engine import Score
from trueweight.protos.errors import EngineError
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1.market_pb2 import SamplingParams

_KEY = "trueweight"


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """Canonical parameters of one engine request.

    The engine's prompt is ``prompt + prefix`` and, when scoring, the claimed output without its
    last token; ``prompt_len`` says where output begins. ``score_key`` is empty for generation;
    otherwise the engine scores from position ``score_from`` (an index into prompt + outputs) and
    ``last_claimed`` is the token after the engine's prompt. ``grammar_source`` is empty without a
    grammar. ``native``: vLLM's own seeded sampler does it (Model Runner V2, parameters that it
    shares with the contract), the plug-in looks away.
    """

    sampling: Sampling
    seed: int
    prompt_len: int
    score_key: str = ""
    score_from: int = 0
    last_claimed: int = 0
    grammar_source: bytes = b""
    native: bool = False

    def pack(self) -> dict[str, Any]:
        """The value of ``SamplingParams.extra_args``."""
        fields = [self.seed, self.prompt_len, self.score_key, self.score_from, self.last_claimed]
        sampling = self.sampling.to_proto().SerializeToString()
        return {_KEY: [sampling, *fields, self.grammar_source, self.native]}


def unpack(extra_args: Mapping[str, Any] | None) -> EngineOrder | None:
    """The order in ``extra_args``; ``None`` if the request is not ours."""
    packed = (extra_args or {}).get(_KEY)
    if packed is None:
        return None
    sampling = Sampling.from_proto(SamplingParams.FromString(packed[0]))
    return EngineOrder(sampling, *packed[1:])


def pack_score(margins: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> list[bytes]:
    """How a worker returns one request's scores: little-endian fp32, fp32, u32."""
    return [
        margins.astype("<f4").tobytes(),
        logprobs.astype("<f4").tobytes(),
        ranks.astype("<u4").tobytes(),
    ]


def unpack_score(packed: list[bytes] | str) -> Score:
    """The score in a worker's answer. Raises EngineError with the worker's reason."""
    if isinstance(packed, str):
        raise EngineError(f"an output could not be scored: {packed}")
    margins, logprobs, ranks = packed
    return Score(
        tuple(np.frombuffer(margins, "<f4").tolist()),
        tuple(np.frombuffer(logprobs, "<f4").tolist()),
        tuple(np.frombuffer(ranks, "<u4").tolist()),
    )

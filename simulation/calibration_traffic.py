"""Honest traffic for calibration: prompts and parameters that cover every parameter class."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trueweight.node.engine import GenerateJob
from trueweight.protos.grammar import source_of, with_grammar
from trueweight.protos.sampling_parameters import (
    CALIBRATED_CLASSES,
    MAX_REPETITION,
    MIN_REPETITION,
    Sampling,
    parameter_class,
    resolve,
)
from trueweight.simulation import demo_corpus

MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 96, 200
SHORT_OUTPUT_TOKENS = 16
_TEMPERATURES = (0.1, 0.3, 0.6, 0.8, 1.0, 1.0, 1.0, 1.3, 2.0)
_MASKED_SHARE = 0.25
_LOW_TEMPERATURES = (0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Prompts:
    """Token ids to start from, and the ids that end an output."""

    heads: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]


def load_prompts(model_directory: Path, stop_ids: Sequence[int], count: int, seed: int) -> Prompts:
    """Beginnings of standard library sources in the model's own tokens."""
    tokenizer = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    chance = random.Random(seed)  # noqa: S311  (reproducible traffic, no secret)
    heads = []
    for text in _texts(chance, count):
        ids = tokenizer.encode(text).ids[: chance.randint(4, MAX_PROMPT_TOKENS)]
        heads.append(tuple(ids) or (stop_ids[0],))
    return Prompts(tuple(heads), tuple(sorted(stop_ids)))


def random_prompts(_: Path, stop_ids: Sequence[int], count: int, seed: int) -> Prompts:
    """For models that understand nothing."""
    chance = random.Random(seed)  # noqa: S311
    heads = tuple(
        tuple(chance.randrange(3, 500) for _ in range(chance.randint(4, MAX_PROMPT_TOKENS)))
        for _ in range(count)
    )
    return Prompts(heads, tuple(sorted(stop_ids)))


def _texts(chance: random.Random, count: int) -> Iterator[str]:
    sources = [d.source for d in demo_corpus.read_corpus(demo_corpus.standard_library()).documents]
    for _ in range(count):
        yield chance.choice(sources)


def _draw_sampling(wanted: str, chance: random.Random, stop_ids: tuple[int, ...]) -> Sampling:
    """Random resolved parameters of one class, over the range that clients use. For "grammar":
    what goes with one, which is every other class."""
    if wanted == "grammar":
        return _draw_sampling(chance.choice(_UNDER_GRAMMARS), chance, stop_ids)
    cuts: dict[str, Any] = {
        "top_p": chance.choice((0.5, 0.8, 0.9, 0.95, 0.99)),
        "top_k": chance.choice((2, 5, 20, 50)),
        "min_p": chance.choice((0.02, 0.05, 0.1, 0.2)),
    }
    base = Sampling(temperature=chance.choice(_TEMPERATURES), stop_token_ids=stop_ids)
    if wanted == "greedy":
        drawn = replace(base, temperature=0.0)
    elif wanted in cuts:
        drawn = replace(base, **{wanted: cuts[wanted]})
    elif wanted == "multi_cut":
        drawn = replace(base, **dict(chance.sample(sorted(cuts.items()), chance.choice((2, 2, 3)))))
    elif wanted == "penalties":
        drawn = _with_penalties(base, chance, cuts)
    else:
        drawn = base
    if chance.random() < _MASKED_SHARE:
        drawn = replace(drawn, **_masks(chance))
    resolved = resolve(drawn)
    if parameter_class(resolved) != wanted:
        raise ValueError(f"drew {parameter_class(resolved)} for {wanted}")
    return resolved


def _masks(chance: random.Random) -> dict[str, Any]:
    """Biases and masks make no class of their own, so every class must cover them."""
    kind = chance.choice(("logit_bias", "allowed_token_ids", "min_tokens", "bad_words"))
    some = _some_ids(chance)
    values: dict[str, Any] = {
        "logit_bias": tuple((token, chance.choice((-5.0, -1.0, 1.0, 3.0))) for token in some[:8]),
        "allowed_token_ids": tuple(range(3, 500)),
        "min_tokens": chance.choice((4, 16, 64)),
        "bad_words": (*((token,) for token in some[:8]), tuple(some[8:10]), tuple(some[10:13])),
    }
    return {kind: values[kind]}


def _with_penalties(base: Sampling, chance: random.Random, cuts: dict[str, Any]) -> Sampling:
    """Penalties over greedy, plain and every cut, as their class must cover."""
    kind = chance.choice(("plain", "plain", "greedy", "top_p", "top_k", "min_p", "multi"))
    if kind == "greedy":
        base = replace(base, temperature=0.0)
    elif kind == "multi":
        base = replace(base, **cuts)
    elif kind in cuts:
        base = replace(base, **{kind: cuts[kind]})
    return replace(
        base,
        presence_penalty=chance.choice((0.0, 0.5, 1.0)),
        frequency_penalty=chance.choice((0.0, 0.2, 0.7)),
        repetition_penalty=chance.choice((0.8, 1.05, 1.1, 1.3, 2.0)),
    )


CLASSES = CALIBRATED_CLASSES
_UNDER_GRAMMARS = ("plain", "plain", "greedy", "top_p", "top_k", "min_p", "multi_cut", "penalties")
GRAMMARS = (
    source_of("json_schema", {"type": "object"}),
    source_of(
        "json_schema",
        {
            "type": "object",
            "properties": {
                "title": {"type": "string"},
                "count": {"type": "integer"},
                "kind": {"enum": ["module", "class", "function"]},
                "names": {"type": "array", "items": {"type": "string"}, "minItems": 3},
            },
            "required": ["title", "count", "kind", "names"],
            "additionalProperties": False,
        },
    ),
    source_of("regex", r"(def|class) [a-z_]{3,20}\(([a-z_]+, ){0,4}[a-z_]+\):\n(    .+\n){1,8}"),
    source_of("choice", ["import", "from", "class", "return", "raise ValueError", "pass"]),
)
# Kinds of traffic besides the classes themselves: name to class.
SPECIAL = {
    "short outputs": "plain",
    "low entropy": "plain",
    "hostile plain": "plain",
    "hostile top_p": "top_p",
    "hostile top_k": "top_k",
    "hostile min_p": "min_p",
    "hostile multi_cut": "multi_cut",
    "hostile penalties": "penalties",
}


def class_of(kind: str) -> str:
    """The parameter class of a kind of traffic."""
    return SPECIAL.get(kind, kind)


def _draw(kind: str, chance: random.Random, stop_ids: tuple[int, ...]) -> Sampling:
    if kind.startswith("hostile "):
        return _draw_hostile(class_of(kind), chance, stop_ids)
    drawn = _draw_sampling(class_of(kind), chance, stop_ids)
    if kind == "low entropy":
        drawn = resolve(replace(drawn, temperature=chance.choice(_LOW_TEMPERATURES)))
    return drawn


def _draw_hostile(wanted: str, chance: random.Random, stop_ids: tuple[int, ...]) -> Sampling:
    """What a client would ask for who wants to see an honest rival convicted: the corners of
    what is allowed, where rounding is amplified or every token is a close call."""
    base = Sampling(temperature=chance.choice((0.01, 0.05, 2.0, 10.0)), stop_token_ids=stop_ids)
    corners: dict[str, Sequence[dict[str, Any]]] = {
        "plain": ({}, {"allowed_token_ids": _some_ids(chance)}, {"logit_bias": _biases(chance)}),
        "top_p": ({"top_p": chance.choice((0.01, 0.1, 0.3, 0.999))},),
        "top_k": ({"top_k": 2}, {"top_k": 3}),
        # At 1 only the likeliest token is left: rounding decides which.
        "min_p": ({"min_p": 0.9}, {"min_p": 0.999}, {"min_p": 1.0}),
        "multi_cut": (
            {"top_p": 0.5, "top_k": 2},
            {"top_p": 0.999, "top_k": 1000, "min_p": 0.001},
            {"min_p": 0.9, "top_p": 0.3},
        ),
        "penalties": (
            {"repetition_penalty": chance.choice((MIN_REPETITION, MAX_REPETITION))},
            {"frequency_penalty": chance.choice((-2.0, 2.0)), "presence_penalty": -2.0},
        ),
    }
    drawn = resolve(replace(base, **chance.choice(corners[wanted])))
    if parameter_class(drawn) != wanted:
        raise ValueError(f"drew {parameter_class(drawn)} for {wanted}")
    return drawn


def _some_ids(chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.sample(range(3, 500), 64))


def _biases(chance: random.Random) -> tuple[tuple[int, float], ...]:
    return tuple((token, 100.0) for token in chance.sample(range(3, 500), 8))


def draw_jobs(
    prompts: Prompts, kind: str, seed: int | str, max_context: int
) -> Iterator[GenerateJob]:
    """Endless jobs of one class or kind; lengths vary, short ones included."""
    chance = random.Random(f"{seed}/{kind}")  # noqa: S311
    number = 0
    longest = SHORT_OUTPUT_TOKENS if kind == "short outputs" else MAX_OUTPUT_TOKENS
    while True:
        prompt = chance.choice(prompts.heads)
        room = max(1, min(longest, max_context - len(prompt) - 1))
        most = chance.choice((1, 8, room, room, room, room, room, room))
        number += 1
        limit = min(most, room)
        source = chance.choice(GRAMMARS) if kind == "grammar" else b""
        sampling = _draw(kind, chance, prompts.stop_ids)
        sampling = replace(sampling, min_tokens=min(sampling.min_tokens, limit))
        if source:
            sampling = with_grammar(sampling, source)
        yield GenerateJob(
            job_id=f"{kind}-{number}",
            prompt=prompt,
            prefix=(),
            sampling=sampling,
            seed=chance.randrange(2**63 - 1),
            max_tokens=limit,
            grammar_source=source,
        )

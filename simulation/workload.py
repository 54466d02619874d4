"""The demo's requests: a fixed, seeded mix of what real clients send. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Beginnings and wishes that a model trained on the standard library has an answer to.
PROMPTS = (
    "def read_lines(path):\n",
    "def _parse_header(line, sep=':'):\n",
    "class Counter(dict):\n",
    "def walk(top, followlinks=False):\n",
    "def quote(string, safe='/'):\n",
    "def close(self):\n",
    "def _find_module(name, path=None):\n",
    "def __repr__(self):\n",
)
WISHES = (
    "Write a function that reads a file.",
    "Write a function that splits a path.",
    "Write a class that counts words.",
    "Write a method that closes the connection.",
    "Write a function that parses arguments.",
    "Write a function that compares two dates.",
)
STOPS = ("\n\n\n", "\nclass ", "return None")
MAX_TOKENS = (120, 160, 200, 240)
# How often each way to sample is asked for.
_SAMPLING: tuple[tuple[int, dict[str, Any]], ...] = (
    (7, {"temperature": 1.0}),
    (3, {"temperature": 0.8}),
    (2, {"temperature": 0.0}),
    (2, {"temperature": 1.0, "top_p": 0.95}),
    (1, {"temperature": 0.9, "top_k": 20}),
    (1, {"temperature": 1.0, "min_p": 0.05}),
)
# Parameters that the official client sends only as extra body fields.
_EXTRA = ("top_k", "min_p")


@dataclass(frozen=True)
class RequestPlan:
    """One request of one client. ``parameters`` are keyword arguments of the official client."""

    number: int
    client: str
    is_chat: bool
    stream: bool
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """For tables: "chat", "completion, streamed", ..."""
        name = "chat" if self.is_chat else "completion"
        return f"{name}, streamed" if self.stream else name


def make_plans(
    count: int, clients: Sequence[str], model: str, seed: int = 1, first_number: int = 1
) -> list[RequestPlan]:
    """``count`` requests, the same for the same seed. Every second one streams, every third is a
    completion, every fifth has a stop string, two of three have a seed of their own."""
    chance = random.Random(f"{seed}/{first_number}")  # noqa: S311  (reproducible, no secret)
    numbers = range(first_number, first_number + count)
    return [_plan(n, clients[n % len(clients)], model, chance) for n in numbers]


def directed(plan: RequestPlan, node_id: str) -> RequestPlan:
    """The same request with the client's wish for one node."""
    extra = {**plan.parameters.get("extra_body", {}), "provider": {"only": [node_id]}}
    return replace(plan, parameters={**plan.parameters, "extra_body": extra})


def _plan(number: int, client: str, model: str, chance: random.Random) -> RequestPlan:
    is_chat, stream = number % 3 != 0, number % 2 == 0
    parameters: dict[str, Any] = {"model": model, "max_tokens": chance.choice(MAX_TOKENS)}
    if is_chat:
        parameters["messages"] = [{"role": "user", "content": chance.choice(WISHES)}]
    else:
        parameters["prompt"] = chance.choice(PROMPTS)
    if number % 5 == 0:
        parameters["stop"] = [chance.choice(STOPS)]
    if chance.random() < 2 / 3:
        parameters["seed"] = chance.randrange(2**31)
    weights, choices = zip(*_SAMPLING, strict=True)
    sampling = dict(chance.choices(choices, weights)[0])
    extra = {name: sampling.pop(name) for name in _EXTRA if name in sampling}
    parameters.update(sampling)
    if extra:
        parameters["extra_body"] = extra
    if stream:
        parameters["stream_options"] = {"include_usage": True}
    return RequestPlan(number, client, is_chat, stream, parameters)

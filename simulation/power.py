"""How much evidence it takes: from pools of scored requests to tokens until conviction. Pure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trueweight.protos.evidence import Item, Wealth, counted_nano
from trueweight.protos.v1.audit_pb2 import CalibrationEntry

MAX_REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class Power:
    """Audited tokens and requests until conviction over many orders; ``convicted`` of ``orders``
    got there within the limit. The others count as infinitely many."""

    name: str
    pool_tokens: int
    orders: int
    convicted: int
    mean_x: float
    exact: float
    median_tokens: float
    p95_tokens: float
    median_requests: float
    p95_requests: float
    largest_wealth: float
    # Of every order, ascending; infinite if not convicted.
    tokens: tuple[float, ...] = ()


def items_of(requests: Iterable[Sequence[int]], entry: CalibrationEntry) -> tuple[Item, ...]:
    """Evidence of requests, x per token in 10^-9, as a verifier with this entry adds it up."""
    return tuple(
        Item(counted_nano(x, entry.ignored_below_nano), len(x), entry.mu0_nano) for x in requests
    )


@dataclass(frozen=True)
class Pool:
    """Scored requests of one way of serving, and the share of tokens that matched exactly."""

    name: str
    items: tuple[Item, ...]
    exact: float

    @property
    def tokens(self) -> int:
        """All scored tokens."""
        return sum(item.n for item in self.items)

    @property
    def mean_x(self) -> float:
        """Mean clipped margin per token."""
        total = sum(item.sum_x_nano for item in self.items)
        return total / self.tokens / 1e9 if self.items else 0.0


@dataclass(frozen=True, slots=True)
class Mix:
    """How a cheat hides: honest requests before, among (share of the cheated ones), and one-token
    requests of a friendly client per request."""

    honest_before: int = 0
    cheat_share: float = 1.0
    one_token_each: int = 0


def traffic(cheat: Pool, honest: Pool, mix: Mix, chance: random.Random) -> Iterator[Item]:
    """One order of requests, endless."""
    for _ in range(mix.honest_before):
        yield chance.choice(honest.items)
    order = list(cheat.items)
    while True:
        chance.shuffle(order)
        for item in order:
            while chance.random() >= mix.cheat_share:
                yield chance.choice(honest.items)
            yield item
            for _ in range(mix.one_token_each):
                yield Item(0, 1, item.mu0_nano)


class _Run(NamedTuple):
    requests: int
    tokens: int
    largest: float
    convicted: bool


def _until_conviction(items: Iterator[Item], skip: int) -> _Run:
    """What is counted after the first ``skip`` requests."""
    wealth, requests, tokens, largest = Wealth(), 0, 0, 1.0
    for number, item in enumerate(items):
        wealth = wealth.add(*item)
        largest = max(largest, wealth.value)
        if number >= skip:
            requests, tokens = requests + 1, tokens + item.n
        if wealth.state == "convict":
            return _Run(requests, tokens, largest, True)
        if requests >= MAX_REQUESTS:
            return _Run(requests, tokens, largest, False)
    raise ValueError("traffic never ends")


def power(cheat: Pool, honest: Pool, mix: Mix, orders: int, seed: int) -> Power:
    """Tokens to conviction over random orders of the pool."""
    runs = []
    for number in range(orders):
        chance = random.Random(f"{seed}/{number}")  # noqa: S311  (reproducible orders)
        runs.append(_until_conviction(traffic(cheat, honest, mix, chance), mix.honest_before))
    requests = sorted(float(run.requests) if run.convicted else math.inf for run in runs)
    tokens = sorted(float(run.tokens) if run.convicted else math.inf for run in runs)
    return Power(
        name=cheat.name,
        pool_tokens=cheat.tokens,
        orders=orders,
        convicted=sum(run.convicted for run in runs),
        mean_x=cheat.mean_x,
        exact=cheat.exact,
        median_tokens=statistics.median_high(tokens),
        p95_tokens=_p95(tokens),
        median_requests=statistics.median_high(requests),
        p95_requests=_p95(requests),
        largest_wealth=max(run.largest for run in runs),
        tokens=tuple(tokens),
    )


def _p95(values: Sequence[float]) -> float:
    return values[min(len(values) - 1, math.ceil(0.95 * len(values)) - 1)]

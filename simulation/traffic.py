"""Sends planned requests through the official ``openai`` client and notes what came back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import openai

from trueweight.simulation.workload import RequestPlan

REQUEST_TIMEOUT_S = 120.0
RECEIPT_HEADER, ROUTE_HEADER = "x-trueweight-receipt", "x-trueweight-route"


@dataclass
class Outcome:
    """What one request brought. ``error`` is empty if it was answered; costs in nanocredits."""

    plan: RequestPlan
    receipt_id: str = ""
    node_id: str = ""
    why: str = ""
    ask_output_nano_per_mtok: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nano: int = 0
    finish_reason: str = ""
    text: str = ""
    first_token_ms: float | None = None
    total_ms: float = 0.0
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """For machines; the text is the client's own business and stays out."""
        facts = asdict(self)
        del facts["plan"], facts["text"]
        plan = self.plan
        return {"number": plan.number, "client": plan.client, "kind": plan.kind, **facts}


class Clients:
    """One official client per account."""

    def __init__(self, base_url: str, api_keys: Mapping[str, str]) -> None:
        self._clients = {
            name: openai.AsyncOpenAI(
                base_url=base_url, api_key=key, max_retries=0, timeout=REQUEST_TIMEOUT_S
            )
            for name, key in api_keys.items()
        }

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.close()

    async def send(self, plan: RequestPlan) -> Outcome:
        """Sends one request; errors are noted, never raised."""
        outcome = Outcome(plan)
        started = time.monotonic()
        try:
            await self._send(plan, outcome, started)
        except openai.APIStatusError as error:
            outcome.error = f"{error.status_code}: {error.message}"
        except openai.APIError as error:
            outcome.error = f"{type(error).__name__}: {error.message}"
        outcome.total_ms = (time.monotonic() - started) * 1000
        return outcome

    async def _send(self, plan: RequestPlan, outcome: Outcome, started: float) -> None:
        client = self._clients[plan.client]
        api: Any = client.chat.completions if plan.is_chat else client.completions
        raw = await api.with_raw_response.create(stream=plan.stream, **plan.parameters)
        _note_headers(outcome, raw.headers)
        if plan.stream:
            async with contextlib.aclosing(raw.parse()) as stream:
                async for chunk in stream:
                    _note_chunk(outcome, chunk, started)
            if not outcome.finish_reason:
                outcome.error = "the stream ended without a finish reason"
            return
        answer = raw.parse()
        choice = answer.choices[0]
        outcome.text = (choice.message.content if plan.is_chat else choice.text) or ""
        outcome.finish_reason = choice.finish_reason
        _note_usage(outcome, answer.usage)


@asynccontextmanager
async def connected_clients(base_url: str, api_keys: Mapping[str, str]) -> AsyncIterator[Clients]:
    """Clients that are closed in the end."""
    clients = Clients(base_url, api_keys)
    try:
        yield clients
    finally:
        await clients.close()


async def send_all(
    clients: Clients,
    plans: Sequence[RequestPlan],
    concurrency: int,
    on_done: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Sends all, at most ``concurrency`` at once; outcomes in the order of the plans."""
    room = asyncio.Semaphore(concurrency)

    async def one(plan: RequestPlan) -> Outcome:
        async with room:
            outcome = await clients.send(plan)
        on_done(outcome)
        return outcome

    return list(await asyncio.gather(*(one(plan) for plan in plans)))


def _note_headers(outcome: Outcome, headers: Mapping[str, str]) -> None:
    outcome.receipt_id = headers.get(RECEIPT_HEADER, "")
    route = json.loads(headers.get(ROUTE_HEADER, "{}"))
    outcome.node_id, outcome.why = route.get("node", ""), route.get("why", "")
    outcome.ask_output_nano_per_mtok = route.get("ask_output_nano_per_mtok", 0)


def _note_chunk(outcome: Outcome, chunk: Any, started: float) -> None:
    if chunk.usage is not None:
        _note_usage(outcome, chunk.usage)
    for choice in chunk.choices:
        text = (choice.delta.content if outcome.plan.is_chat else choice.text) or ""
        if text and outcome.first_token_ms is None:
            outcome.first_token_ms = (time.monotonic() - started) * 1000
        outcome.text += text
        outcome.finish_reason = choice.finish_reason or outcome.finish_reason


def _note_usage(outcome: Outcome, usage: Any) -> None:
    outcome.prompt_tokens = usage.prompt_tokens
    outcome.completion_tokens = usage.completion_tokens
    # Not one of OpenAI's fields, so the client's types do not know it.
    outcome.cost_nano = int(getattr(usage, "cost_nano", 0))

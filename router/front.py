"""What the HTTP routes do, without HTTP: authenticate, plan, start, look up."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections import Counter
from typing import Any

from trueweight.protos.errors import NotFound, OverCapacity, Unavailable
from trueweight.protos.ids import uuid7
from trueweight.router.api_keys import ApiKey, KeyGate
from trueweight.router.catalog import Catalog, SoldModel
from trueweight.router.choosing import Work, eligible
from trueweight.router.lifecycle import RequestRun, Services
from trueweight.router.metrics import Metrics
from trueweight.router.openai_requests import ParsedRequest
from trueweight.router.planning import Origin, make_plan
from trueweight.router.receipts_view import ReceiptsView

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2048
_MAX_IN_FLIGHT_PER_ACCOUNT = 1024


class Front:
    """One router's public face. ``drain`` ends it in good order."""

    def __init__(
        self,
        *,
        services: Services,
        catalog: Catalog,
        gate: KeyGate,
        receipts: ReceiptsView,
        metrics: Metrics,
    ) -> None:
        self._services, self.catalog, self._gate = services, catalog, gate
        self.receipts, self.metrics = receipts, metrics
        self._runs: dict[asyncio.Task[None], RequestRun] = {}
        self._per_account: Counter[str] = Counter()
        self._draining = False

    async def who(self, authorization: str | None) -> ApiKey:
        """The API key behind a header. Raises Unauthenticated."""
        return await self._gate.check(authorization)

    async def start(self, request: ParsedRequest, key: ApiKey, client_nonce: bytes) -> RequestRun:
        """Plans a request and sets it going. Raises before any hold for whatever is wrong with
        the request itself."""
        self._check_room(key.account)
        model = self.catalog.get(request.model)
        services = self._services
        now = services.clock.now_unix_ms()
        origin = Origin(
            request_id=uuid7(now, services.random(10)),
            account=key.account,
            api_key_id=key.key_id,
            salt=services.random(16),
            router_nonce=services.random(16),
            client_nonce=client_nonce,
            date=datetime.datetime.fromtimestamp(now / 1000, datetime.UTC).date().isoformat(),
        )
        prompt = await self._encode(request, model, origin.date)
        run = RequestRun(make_plan(request, model, prompt, origin), services)
        task = asyncio.create_task(run.run())
        self._runs[task] = run
        self._per_account[key.account] += 1
        task.add_done_callback(self._forget)
        return run

    def models(self) -> list[tuple[SoldModel, dict[str, Any]]]:
        """All names with what is known of their price, for /v1/models."""
        return [(model, self._terms_of(model)) for model in self.catalog.all()]

    def model(self, model_id: str) -> tuple[SoldModel, dict[str, Any]]:
        """One name. Raises NotFound."""
        model = self.catalog.get(model_id)
        return model, self._terms_of(model) | {"model_card": model.card}

    def health(self) -> dict[str, Any]:
        """State in a few numbers; ``ready`` is true if some node can serve some model."""
        ready = any(self._able(model) for model in self.catalog.all())
        return {
            "status": "draining" if self._draining else "ok",
            "ready": ready and not self._draining,
            "models": [m.model_id for m in self.catalog.all()],
            "nodes": sum(1 for r in self._services.fleet.all() if r.session is not None),
            "running": len(self._runs),
            "unsettled": self._services.settler.in_background,
        }

    def metrics_text(self) -> bytes:
        """For /metrics."""
        return self.metrics.render(self._services.fleet, self._services.settler)

    async def drain(self, wait_ms: float) -> None:
        """No new requests; running ones get ``wait_ms``, then are ended and settled."""
        self._draining = True
        if self._runs:
            await asyncio.wait(set(self._runs), timeout=wait_ms / 1000)
        for run in list(self._runs.values()):
            run.withdraw()
        if self._runs:
            grace_s = self._services.timing.leg.receipt_ms / 1000 + 2
            await asyncio.wait(set(self._runs), timeout=grace_s)
        for task in list(self._runs):
            task.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)

    def _check_room(self, account: str) -> None:
        if self._draining:
            raise Unavailable("This router is going away.", hint="Try again in a moment.")
        if len(self._runs) >= MAX_IN_FLIGHT:
            raise OverCapacity("This router is full.", hint="Try again in a few seconds.")
        if self._per_account[account] >= _MAX_IN_FLIGHT_PER_ACCOUNT:
            raise OverCapacity(
                f"More than {_MAX_IN_FLIGHT_PER_ACCOUNT} of your requests are running.",
                hint="Wait for some to end.",
            )

    async def _encode(self, request: ParsedRequest, model: SoldModel, date: str) -> tuple[int, ...]:
        if model.tokenizer is None:
            raise NotFound(f"The model {model.model_id!r} has no tokenizer here.", param="model")
        return await model.tokenizer.encode(request, date)

    def _able(self, model: SoldModel) -> list[Any]:
        views = self._services.fleet.views(model.manifest_digest)
        return eligible(views, Work(prompt_tokens=1, max_tokens=1))

    def _terms_of(self, model: SoldModel) -> dict[str, Any]:
        able = self._able(model)
        return {
            # A node may hold less than the model allows.
            "context_length": min(
                model.manifest.max_context_tokens,
                max((n.max_context_tokens for n in able), default=2**31),
            ),
            "licence": model.manifest.licence,
            "revision": model.manifest.revision,
            "manifest_digest": model.manifest_digest.hex(),
            "publisher": model.publisher,
            "registered_at_leaf": model.log_index,
            "nodes": len(able),
            "ask_input_nano_per_mtok": min(
                (n.prices.input_nano_per_mtok for n in able), default=None
            ),
            "ask_output_nano_per_mtok": min(
                (n.prices.output_nano_per_mtok for n in able), default=None
            ),
        }

    def _forget(self, task: asyncio.Task[None]) -> None:
        run = self._runs.pop(task)
        account = run.plan.account
        self._per_account[account] -= 1
        if self._per_account[account] <= 0:
            del self._per_account[account]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            log.error("a request's task failed: %s", type(error).__name__)

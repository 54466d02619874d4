"""What Prometheus reads. A registry of its own, so that several routers fit in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trueweight.router.fleet import Fleet
from trueweight.router.settling import Settler

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of requests and gauges of the fleet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "trueweight_router_requests_total",
            "Answered requests by HTTP status.",
            ["status"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "trueweight_router_tokens_total",
            "Tokens by kind.",
            ["kind"],
            registry=self._registry,
        )
        self.charged = Counter(
            "trueweight_router_charged_nanocredits_total",
            "Sum of all bills.",
            registry=self._registry,
        )
        self.first_token = Histogram(
            "trueweight_router_first_token_seconds",
            "From the request to its first text.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "trueweight_router_request_seconds",
            "From the request to its last byte.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._nodes = Gauge(
            "trueweight_router_nodes", "Known nodes by state.", ["state"], registry=self._registry
        )
        self._in_flight = Gauge(
            "trueweight_router_in_flight", "Requests at a node.", ["node"], registry=self._registry
        )
        self._unsettled = Gauge(
            "trueweight_router_unsettled",
            "Captures and voids without a known outcome.",
            registry=self._registry,
        )
        self._refused = Gauge(
            "trueweight_router_captures_refused",
            "Bills that the ledger refused since the start.",
            registry=self._registry,
        )

    def render(self, fleet: Fleet, settler: Settler) -> bytes:
        """The exposition text, gauges brought up to date."""
        records = fleet.all()
        connected = sum(1 for r in records if r.session is not None and r.session.is_open)
        self._nodes.labels("known").set(len(records))
        self._nodes.labels("connected").set(connected)
        self._nodes.labels("suspended").set(
            sum(1 for r in records if fleet.is_suspended(r.node_id))
        )
        self._in_flight.clear()
        for record in records:
            self._in_flight.labels(record.node_id).set(record.in_flight)
        self._unsettled.set(settler.in_background)
        self._refused.set(settler.refused)
        return generate_latest(self._registry)

"""Telling nodes which of their receipts the ledger has captured, so that they need not claim them.

A courtesy: what is lost here costs a node one claim that the ledger refuses.
"""

from __future__ import annotations

from collections.abc import Callable

from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.v1.ledger_pb2 import Operation
from trueweight.protos.v1.market_pb2 import Assignment
from trueweight.protos.v1.node_pb2 import Captured
from trueweight.router.fleet import Fleet


def reporter(fleet: Fleet) -> Callable[[Operation], None]:
    """What reports every leg of a capture to its node, as far as there is a session with it."""
    return lambda operation: _report(operation, fleet)


def _report(operation: Operation, fleet: Fleet) -> None:
    for envelope in operation.capture.assignments:
        # This router's own signature: nothing to check.
        assignment = parse_payload(parse_envelope(envelope), Assignment)
        record = fleet.get(assignment.node_id)
        if record is not None and record.session is not None:
            record.session.report(
                Captured(assignment_digest=digest_of(envelope), bill_id=operation.id)
            )

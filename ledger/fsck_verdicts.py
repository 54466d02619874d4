"""Rows of verdicts, and of what verifiers committed to before, against their leaves, in the log's
half of ``fsck``."""

from __future__ import annotations

import sqlalchemy as sa

from trueweight.ledger.audits import VerdictRow
from trueweight.ledger.blind_fold import BlindFold
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.findings import Findings, kept_rows
from trueweight.protos.envelope import parse_payload
from trueweight.protos.v1.audit_pb2 import MarginCommitment, Verdict
from trueweight.protos.v1.envelope_pb2 import Envelope

VERDICT, COMMITMENT = "verdict", "margin-commitment"
KINDS = (VERDICT, COMMITMENT)


class Verdicts:
    """Give it every leaf of ``KINDS``, in their order."""

    def __init__(self, connection: sa.Connection) -> None:
        self._fold = BlindFold(connection)
        self._rows = {
            VERDICT: kept_rows(connection, "verdict", VerdictRow._fields),
            COMMITMENT: kept_rows(connection, "margin_commitment", CommitmentRow._fields),
        }

    def check(
        self, findings: Findings, kind: str, place: tuple[int, int], envelope: Envelope
    ) -> str:
        """Who says what is in one leaf; with its index and time. Raises BadSignature if it is none
        of its kind."""
        index, merged_at = place
        message: Verdict | MarginCommitment
        said: VerdictRow | CommitmentRow | None
        if kind == VERDICT:
            message = parse_payload(envelope, Verdict)
            said = self._fold.verdict(message, index)
        else:
            message = parse_payload(envelope, MarginCommitment)
            said = self._fold.commitment(message, index, merged_at)
        if said is not None and next(self._rows[kind], None) != tuple(said):
            findings.add(f"the {kind} in leaf {index} is not what is kept of it")
        return message.verifier_id

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        for kind, rows in self._rows.items():
            for row in rows:
                findings.add(f"the {kind} that is kept of leaf {row[0]} is in no leaf")

"""Follows the log, the market's notice board: names sold, keys, suspensions, convictions."""

from __future__ import annotations

import logging
from collections import defaultdict

from trueweight.protos.envelope import open_envelope, parse_envelope, parse_payload
from trueweight.protos.errors import BadSignature, InvalidRequest, TrueweightError
from trueweight.protos.market_terms import epoch_refusal
from trueweight.protos.suspension import Suspensions
from trueweight.protos.v1.audit_pb2 import Conviction, EpochOpen, Verdict
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.market_pb2 import Bill, Member, Reinstatement, Suspension
from trueweight.router.catalog import Catalog
from trueweight.router.exposure import Exposure
from trueweight.router.fleet import Fleet
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import Market

log = logging.getLogger(__name__)

KINDS = (
    *("key-event", "registry-entry", "suspension", "conviction", "reinstatement"),
    *("verdict", "epoch-open"),
)
# At a start, bills further back than this are not read again: a verifier that is so far behind
# shows in ``verifier owed``.
_RECENT_LEAVES = 200_000
_VERIFIED = frozenset({Verdict.SCORED})
_REFUNDED = frozenset({Verdict.REFUND, Verdict.INVALID_RECEIPT})


class MarketFeed:
    """Applies leaves in order. A leaf that does not hold is skipped, never trusted."""

    def __init__(
        self,
        market: Market,
        keys: Keys,
        catalog: Catalog,
        fleet: Fleet,
        *,
        judges: Judges,
        exposure: Exposure,
    ) -> None:
        self._market, self._keys, self._catalog, self._fleet = market, keys, catalog, fleet
        self._judges, self._exposure = judges, exposure
        self._standing: defaultdict[str, Suspensions] = defaultdict(
            lambda: Suspensions(judges.needed)
        )
        self.next_index = 0

    async def follow(self, ledger: LedgerPort) -> None:
        """Runs until cancelled."""
        async for entry in ledger.follow_log(self.next_index, (*KINDS, "bill")):
            await self.apply(entry)

    async def catch_up(self, ledger: LedgerPort) -> None:
        """Everything that is in the log now."""
        tree_size = 2**63
        while True:
            recent = self.next_index >= tree_size - _RECENT_LEAVES
            kinds = (*KINDS, "bill") if recent else KINDS
            page = await ledger.read_log(self.next_index, kinds=kinds)
            tree_size = page.tree_size
            for entry in page.entries:
                await self.apply(entry)
            if page.next_index <= self.next_index or page.next_index >= page.tree_size:
                self.next_index = max(self.next_index, page.next_index)
                return
            self.next_index = page.next_index

    async def apply(self, entry: LogEntry) -> None:
        """One leaf."""
        self.next_index = max(self.next_index, entry.index + 1)
        try:
            await self._apply(_kind(entry.kind), entry)
        except TrueweightError as error:
            log.warning("leaf %d is not believed: %s", entry.index, error)
        except Exception:
            # One that meets a bug here must not make this router deaf to those after it.
            log.exception("leaf %d is not understood", entry.index)

    async def _apply(self, kind: str, entry: LogEntry) -> None:
        if kind == "key-event":
            self._keys.learn(entry.body)
        elif kind == "registry-entry":
            await self._catalog.learn(entry.body, entry.index)
        elif kind == "suspension":
            self._suspend(entry.body)
        elif kind == "conviction":
            self._convict(entry.body)
        elif kind == "reinstatement":
            self._reinstate(entry.body)
        elif kind == "verdict":
            self._note_verdict(entry.body, entry.index)
        elif kind == "epoch-open":
            self._open_epoch(entry.body)
        elif kind == "bill":
            # Its signatures were checked at the capture; the ledger is who says that it stands.
            self._exposure.billed(parse_payload(parse_envelope(entry.body), Bill), entry.index)

    def _open_epoch(self, body: bytes) -> None:
        opened = open_envelope(body, EpochOpen, self._keys.ring, self._market.market_id)
        if not self._is_verifier(opened.signer) or opened.message.verifier_id != opened.signer:
            raise BadSignature("an epoch opened by somebody who is no verifier")
        if refusal := epoch_refusal(self._market.descriptor, opened.message):
            raise InvalidRequest(refusal)
        self._exposure.opened(opened.message)

    def _note_verdict(self, body: bytes, log_index: int) -> None:
        """Answers that were refunded make a node's price per verified answer dearer."""
        opened = open_envelope(body, Verdict, self._keys.ring, self._market.market_id)
        if not self._is_verifier(opened.signer):
            raise BadSignature("a verdict by somebody who is no verifier")
        self._judges.check(opened.signer, opened.message.node_id)
        if opened.message.verifier_id == opened.signer:
            self._exposure.judged(opened.message, log_index)
        if opened.message.outcome in _VERIFIED | _REFUNDED:
            self._fleet.note_audit(
                opened.message.node_id, verified=opened.message.outcome in _VERIFIED
            )

    def _suspend(self, body: bytes) -> None:
        opened = open_envelope(body, Suspension, self._keys.ring, self._market.market_id)
        message = opened.message
        if opened.signer != self._market.market_id and not self._is_verifier(opened.signer):
            raise BadSignature("a suspension by somebody who may not suspend")
        if message.issuer != opened.signer:
            raise BadSignature("a suspension in another's name")
        self._judges.check(opened.signer, message.node_id)
        who = "" if opened.signer == self._market.market_id else opened.signer
        standing = self._standing[message.node_id]
        if message.lifted:
            standing.lift(who)
        else:
            standing.suspend(who)
        self._apply_standing(message.node_id)

    def _convict(self, body: bytes) -> None:
        opened = open_envelope(body, Conviction, self._keys.ring, self._market.market_id)
        if not self._is_verifier(opened.signer) or opened.message.verifier_id != opened.signer:
            raise BadSignature("a conviction by somebody who is no verifier")
        node_id = opened.message.node_id
        self._judges.check(opened.signer, node_id)
        self._standing[node_id].convict(opened.signer)
        self._apply_standing(node_id)

    def _reinstate(self, body: bytes) -> None:
        opened = open_envelope(body, Reinstatement, self._keys.ring, self._market.market_id)
        if not self._market.may_reinstate(opened.signer):
            raise BadSignature("a reinstatement by somebody who may not reinstate")
        node_id = opened.message.node_id
        self._standing[node_id].reinstate()
        self._apply_standing(node_id)

    def _apply_standing(self, node_id: str) -> None:
        stopped = self._standing[node_id].stopped
        if stopped == self._fleet.is_suspended(node_id):
            return
        if stopped:
            self._fleet.suspend(node_id)
        else:
            self._fleet.lift(node_id)
        log.info("node %s %s", node_id, "gets no more work" if stopped else "is back")

    def _is_verifier(self, identity: str) -> bool:
        return self._market.has_role(identity, Member.VERIFIER)


def _kind(kind: str) -> str:
    """The short name; the log may carry the whole payload type."""
    return kind.removeprefix("application/vnd.trueweight.").removesuffix(".v1+proto")

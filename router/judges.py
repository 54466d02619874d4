"""Who may judge whom: never a verifier that declared an owner in common with the node."""

from __future__ import annotations

from trueweight.protos.errors import BadSignature
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1.market_pb2 import Member
from trueweight.router.keyring import Keys
from trueweight.runtime.market import Market


class Judges:
    """Answers from the ring as it is now. ``needed`` is how many verifiers convict."""

    def __init__(self, market: Market, keys: Keys) -> None:
        self._market, self._keys = market, keys
        self.needed = max(1, market.descriptor.convictions_needed)
        self._verifiers = tuple(m.identity for m in market.members(Member.VERIFIER))
        self._ring: KeyRing | None = None
        self._enough: dict[str, bool] = {}

    def check(self, signer: str, node_id: str) -> None:
        """Raises BadSignature if the signer may not judge this node. The market itself may."""
        if signer != self._market.market_id and not self.are_independent(signer, node_id):
            raise BadSignature("verifier and node have a declared owner in common")

    def are_enough_for(self, node_id: str) -> bool:
        """True if as many verifiers as convict may judge this node. One that nobody could convict
        gets no paid work."""
        if self._ring is not self._keys.ring:
            self._ring = self._keys.ring
            self._enough.clear()
        known = self._enough.get(node_id)
        if known is None:
            known = sum(self.are_independent(v, node_id) for v in self._verifiers) >= self.needed
            self._enough[node_id] = known
        return known

    def are_independent(self, verifier_id: str, node_id: str) -> bool:
        """False if they ever declared a common owner."""
        return not self._keys.ring.have_common_owner(verifier_id, node_id)

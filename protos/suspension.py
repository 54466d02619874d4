"""Whether a node gets work, from what the log says in leaf order. Pure; roles agree by it.

One verifier alone stops nobody where several are needed to convict, and frees nobody. The market's
own word is enough for both. A convicted node comes back by a Reinstatement only.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Suspensions:
    """One node's. ``needed`` is how many verifiers convict; callers pass only verifiers that may
    judge the node, and the market as ``""``. Memory is bounded by the number of verifiers."""

    needed: int = 1
    by_word: bool = False
    _stopping: set[str] = field(default_factory=set)
    _lifting: set[str] = field(default_factory=set)
    _convicting: set[str] = field(default_factory=set)

    @property
    def convicted(self) -> bool:
        """True once as many verifiers convicted as the market asks for."""
        return len(self._convicting) >= self.needed

    @property
    def stopped(self) -> bool:
        """True if the node gets no new work."""
        return self.by_word or self.convicted

    def suspend(self, verifier_id: str = "") -> None:
        """A Suspension of this verifier, or of the market, was logged."""
        self._lifting.discard(verifier_id)
        if verifier_id:
            self._stopping.add(verifier_id)
        if not verifier_id or len(self._stopping) >= self.needed:
            self.by_word = True
            self._lifting.clear()

    def lift(self, verifier_id: str = "") -> None:
        """A lifted Suspension of this verifier, or of the market, was logged."""
        self._stopping.discard(verifier_id)
        if verifier_id:
            self._lifting.add(verifier_id)
        if not verifier_id or len(self._lifting) >= self.needed:
            self.by_word = False
            self._stopping.clear()
            self._lifting.clear()

    def convict(self, verifier_id: str) -> None:
        """A Conviction of this verifier was logged."""
        self._convicting.add(verifier_id)

    def reinstate(self) -> None:
        """A Reinstatement was logged: nothing said before counts."""
        self.by_word = False
        for said in (self._stopping, self._lifting, self._convicting):
            said.clear()

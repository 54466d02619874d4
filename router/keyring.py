"""Keys that this router knows, kept up to date from the log."""

from __future__ import annotations

from trueweight.protos.envelope import apply_key_event
from trueweight.protos.errors import Conflict
from trueweight.protos.identity import KeyRing


class Keys:
    """A ring that grows: the market's members first, then nodes by their logged key events."""

    def __init__(self, market_id: str, ring: KeyRing) -> None:
        self.market_id = market_id
        self.ring = ring

    def learn(self, key_event: bytes) -> None:
        """Applies a key event; an older one than known changes nothing. Raises BadSignature."""
        try:
            self.ring = apply_key_event(self.ring, key_event, self.market_id)
        except Conflict:
            return

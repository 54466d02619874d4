"""Does cheating pay? The arithmetic on which verifiers and routers must agree. Pure, integers.

    locked + bond >= 2 * gain / rate + 2 * unsettled work

``gain`` is what the best detectable cheat saves until it is convicted at full audit: saving per
token times audited tokens to conviction (95th percentile). A verifier states it in EpochOpen, in
tokens' worth of the price. Work is *unsettled* until a verifier has judged that receipt or a later
one of the same node: what nobody has looked at yet could all be cheap. So a router gives a node no
work beyond ``unsettled_cap_nano``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trueweight.protos.money import PPM, TOKENS_PER_MTOK

SAFETY = 2
# Share of a stake that the audit rate may use up; the rest is for work that is not settled yet.
RATE_SHARE_PPM = 500_000
MAX_LEGS_KEPT = 4_096
# After so many legs earlier ones count half as much in a node's price.
PRICE_HALF_LIFE_LEGS = 1_024


def kth_largest(values: Sequence[int], k: int) -> int:
    """What at least k of the values reach, the largest if there are fewer: one verifier alone can
    neither stop a market by an absurd gain nor, where k have spoken, hide one."""
    ordered = sorted(values, reverse=True)
    return ordered[min(k, len(ordered)) - 1] if ordered else 0


def needed_nano(price_nano_per_mtok: int, gain_tokens: int, rate_ppm: int) -> int:
    """Stake at which cheating does not pay at an audit rate above 0, with nothing unsettled."""
    gain = SAFETY * price_nano_per_mtok * gain_tokens * PPM
    return -(-gain // (rate_ppm * TOKENS_PER_MTOK))


def needed_rate_ppm(stake_nano: int, price_nano_per_mtok: int, gain_tokens: int) -> int:
    """Lowest rate at which half of the stake deters; all requests (10^6) if none does."""
    if price_nano_per_mtok <= 0 or gain_tokens <= 0:
        return 0
    usable = stake_nano * RATE_SHARE_PPM // PPM
    if usable <= 0:
        return PPM
    return min(PPM, needed_nano(price_nano_per_mtok, gain_tokens, PPM) * PPM // usable + 1)


def unsettled_cap_nano(stake_nano: int, needed: int) -> int:
    """Charges that may be unsettled at a time: what is left of the stake, over the safety."""
    return max(0, stake_nano - needed) // SAFETY


@dataclass
class PaidPrice:
    """What a node is paid per output token, input included, weighted by money: the mean of
    charge / tokens over its credits, not over its tokens.

    A cheat chooses which requests it serves cheaply. Were all tokens alike, long cheap answers to
    an accomplice would hide what short answers to long prompts earn; weighted by money, halving the
    price takes as much money as is to be hidden. Bounded state; old work fades.
    """

    _charged_nano: int = 0
    _weighted: int = 0
    _legs: int = 0

    def earned(self, charge_nano: int, output_tokens: int) -> None:
        """A leg was billed."""
        self._charged_nano += charge_nano
        self._weighted += charge_nano * charge_nano // max(1, output_tokens)
        self._legs += 1
        if self._legs >= PRICE_HALF_LIFE_LEGS:
            self._charged_nano, self._weighted, self._legs = (
                self._charged_nano // 2,
                self._weighted // 2,
                0,
            )

    @property
    def nano_per_mtok(self) -> int:
        """Rounded up; 0 without work."""
        if not self._charged_nano:
            return 0
        return -(-self._weighted * TOKENS_PER_MTOK // self._charged_nano)


@dataclass
class UnsettledWork:
    """Charges of one node's receipts that no verifier has come to yet. Bounded memory.

    ``judges`` is how many verifiers convict: work is settled once so many have passed it.
    """

    judges: int = 1
    nano: int = 0
    # (log index, charge) in order of the log.
    _legs: deque[tuple[int, int]] = field(default_factory=deque)
    _seen: dict[str, int] = field(default_factory=dict)

    def earned(self, receipt_index: int, charge_nano: int) -> None:
        """A receipt was captured."""
        if receipt_index <= self._settled_index():
            return
        self._legs.append((receipt_index, charge_nano))
        self.nano += charge_nano
        if len(self._legs) > MAX_LEGS_KEPT:
            # Joined with the next: settled later than it might be, never sooner.
            _, oldest = self._legs.popleft()
            index, charge = self._legs.popleft()
            self._legs.appendleft((index, oldest + charge))

    def judged(self, verifier_id: str, receipt_index: int) -> None:
        """An entitled verifier judged the receipt at this log index."""
        if receipt_index > self._seen.get(verifier_id, -1):
            self._seen[verifier_id] = receipt_index
        settled = self._settled_index()
        while self._legs and self._legs[0][0] <= settled:
            self.nano -= self._legs.popleft()[1]

    def _settled_index(self) -> int:
        found = sorted(self._seen.values(), reverse=True)
        return found[self.judges - 1] if len(found) >= self.judges else -1

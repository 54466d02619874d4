"""What the ledger should do, written down once more from docs/ledger.md: plain numbers.

It shares no code with the ledger: no transfers, no groups, no evidence, no database. Every method
that stands for an operation returns the code with which it must be answered, "applied" or an
error's, and does what it must do in the first case.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FEE, POOL, TREASURY = "fee:market", "pool:market", "treasury:market"
DAY_MS = 24 * 3600 * 1000
YEAR_MS = 366 * DAY_MS


def locked(node):
    return f"node-locked:{node}"


def free(node):
    return f"node-available:{node}"


def bond(node):
    return f"node-bond:{node}"


@dataclass
class Receipt:
    """What one receipt earned. The market's terms: 5 % fee, 2 % pool, rounded down."""

    client: str
    node: str
    charge: int
    tokens: int = 0
    subsidy: int = 0
    at: int = 0  # when it was settled
    index: int = -1  # where it is in the log: seen, not predicted
    claimed: bool = False
    refunded: bool = False
    taken_back: int = 0  # so much of it does not count as earned any more

    @property
    def fee(self):
        return self.charge * 5 // 100

    @property
    def pool(self):
        return self.charge * 2 // 100

    @property
    def rest(self):
        return self.charge - self.fee - self.pool

    @property
    def counts(self):
        return self.rest + self.subsidy - self.taken_back


@dataclass
class Held:
    client: str
    amount: int
    due: int
    claims: dict = field(default_factory=dict)  # receipt digest -> Receipt


@dataclass
class Waiting:
    """A payout, or a bond's withdrawal that is not paid before ``due``."""

    node: str
    source: str
    target: str
    amount: int
    due: int = 0


class PlainBooks:
    """Who has what, what is held, what each receipt earned."""

    def __init__(self, window_ms):
        self.window_ms = window_ms
        self.money = Counter()  # available, by account
        self.held, self.waiting = {}, {}  # by the operation's id
        self.receipts = {}  # by digest, in the order in which they were settled
        self.asked = {}  # receipt digest -> answered, in the order of the requests
        self.debts = Counter()
        self.earned, self.taken, self.paid = Counter(), Counter(), Counter()  # by node
        self.let_go, self.forfeited, self.since = Counter(), Counter(), Counter()
        self.convicted, self.rewarded, self.rewardable = set(), set(), set()
        self.budget, self.era = (0, 0), 0  # most in a period and its length; how often it changed
        self.keyed = {}  # hold id -> [what it counts, when: era and period]

    def _move(self, source, target, amount):
        self.money[source] -= amount
        self.money[target] += amount

    def _up_to(self, source, target, amount):
        paid = min(amount, self.money[source])
        self._move(source, target, paid)
        return paid

    # -- holds ---------------------------------------------------------------------------------

    def deposit(self, account, amount, rail="card"):
        self._move(f"external:{rail}", account, amount)
        return "applied"

    def limit(self, most, length, now):
        length = length if most else 0
        self.era += length != self.budget[1]
        self.budget = (most, length)
        return "applied"

    def _period(self, now):
        return (self.era, now // self.budget[1]) if self.budget[1] else None

    def hold(self, id_, client, amount, due, now, *, keyed=False):
        period = self._period(now)
        used = sum(counts for counts, when in self.keyed.values() if when == period)
        if keyed and self.budget[1] and used + amount > self.budget[0]:
            return "LIMIT_EXCEEDED"
        if amount > self.money[client]:
            return "INSUFFICIENT_FUNDS"
        if keyed:
            self.keyed[id_] = [amount, period]
        self.money[client] -= amount
        self.held[id_] = Held(client, amount, due)
        return "applied"

    def open_hold(self, id_, now):
        held = self.held.get(id_)
        return held if held and held.due > now else None

    def void(self, id_, now):
        held = self.open_hold(id_, now)
        if held is None or held.claims:
            return "CONFLICT"
        self._end(id_, 0)
        return "applied"

    def capture(self, id_, bill, now):
        """``bill``: receipt digest -> Receipt."""
        held = self.open_hold(id_, now)
        if held is None:
            return "CONFLICT"
        if sum(r.charge for r in bill.values()) > held.amount:
            return "INVALID_REQUEST"
        if not held.claims.keys() <= bill.keys():
            return "CONFLICT"
        self._settle(id_, bill, held, now)
        return "applied"

    def claim(self, id_, digest, receipt, not_before, now):
        if not receipt.tokens:
            return "INVALID_REQUEST"
        held = self.open_hold(id_, now)
        if held is None or now < not_before or digest in held.claims:
            return "CONFLICT"
        if sum(r.charge for r in held.claims.values()) + receipt.charge > held.amount:
            return "INVALID_REQUEST"
        held.claims[digest] = receipt
        return "applied"

    def expire(self, now):
        for id_ in [id_ for id_, held in self.held.items() if held.due <= now]:
            held = self.held[id_]
            self._settle(id_, held.claims, held, now)
        return "applied"

    def _end(self, id_, spent):
        held = self.held.pop(id_)
        self.money[held.client] += held.amount - spent
        if not spent:
            self.keyed.pop(id_, None)
        elif id_ in self.keyed:
            self.keyed[id_][0] = spent

    def _settle(self, id_, bill, held, now):
        self._end(id_, sum(r.charge for r in bill.values()))
        self.money[FEE] += sum(r.fee for r in bill.values())
        self.money[POOL] += sum(r.pool for r in bill.values())
        for digest, r in bill.items():
            r.client, r.at, r.claimed = held.client, now, digest in held.claims
            self.receipts[digest] = r
            promised, r.subsidy = r.subsidy, min(r.subsidy, self.money[POOL])
            self.debts[locked(r.node)] += promised - r.subsidy
            self._move(POOL, locked(r.node), r.subsidy)
            self.money[locked(r.node)] += r.rest
            self.earned[r.node] += r.counts
            if r.node in self.convicted:
                self._give_back_at_once(r)

    def _give_back_at_once(self, r):
        self.taken[r.node] += r.counts
        self._move(locked(r.node), POOL, r.subsidy)
        for source, share in ((locked(r.node), r.rest), (FEE, r.fee)):
            self._move(source, r.client, share)
        paid = self._up_to(POOL, r.client, r.pool)
        paid += self._up_to(TREASURY, r.client, r.pool - paid)
        self.debts[r.client] += r.pool - paid
        r.refunded, r.taken_back = True, r.rest + r.subsidy

    # -- audits --------------------------------------------------------------------------------

    def ask(self, digest):
        self.asked.setdefault(digest, False)
        return "applied"

    def answer(self, digest, verdict):
        if not self.asked[digest]:
            self.rewardable.add(verdict)
        self.asked[digest] = True
        return "applied"

    def waits_for_an_answer(self, node):
        return any(
            not answered and self.receipts[digest].node == node
            for digest, answered in self.asked.items()
        )

    def zeros(self, node):
        """Receipts with an audit that speaks for the node, in the order of the requests."""
        asked = [self.receipts[digest] for digest in self.asked]
        return [
            (r.index, r.tokens)
            for r in asked
            if r.node == node and r.tokens and r.index >= self.since[node]
        ]

    def refund(self, digest, how, verdict=b""):
        """``how``: by a "verdict", for a "missing" transcript, or by an "admin" without either."""
        r = self.receipts[digest]
        if r.refunded or (how != "admin" and digest not in self.asked):
            return "CONFLICT"
        if how != "admin":
            self.answer(digest, verdict)
        r.refunded = True
        by_market = how == "missing" and not r.claimed
        if by_market:  # it pays for its router
            paid = self._up_to(FEE, r.client, r.rest)
        else:
            paid = self._from_forfeit(r)
            r.taken_back = self._up_to(locked(r.node), r.client, r.rest - paid)
            paid += r.taken_back
            self._free_bond(r.node, r.rest - paid)
            paid += self._up_to(bond(r.node), r.client, r.rest - paid)
        paid += self._up_to(FEE, r.client, r.fee)
        paid += self._up_to(POOL, r.client, r.pool)
        paid += self._up_to(TREASURY, r.client, r.charge - paid)
        if not by_market:
            r.taken_back += self._up_to(locked(r.node), POOL, r.subsidy)
        self.taken[r.node] += r.taken_back
        self.debts[r.client] += r.charge - paid
        return "applied"

    def _from_forfeit(self, r):
        """A conviction has taken already what was earned before the reinstatement."""
        if r.index >= self.since[r.node]:
            return 0
        paid = self._up_to(TREASURY, r.client, min(r.rest, self.forfeited[r.node]))
        self.forfeited[r.node] -= paid
        return paid

    def _free_bond(self, node, amount):
        """Withdrawals end, the last due first, until the bond can pay."""
        mine = [(w.due, id_) for id_, w in self.waiting.items() if w.source == bond(node)]
        for _, id_ in sorted(mine, reverse=True):
            if self.money[bond(node)] < amount:
                self._end_waiting(id_, paid=False)

    def convict(self, node, change_point, verifier, ppm):
        if node in self.convicted:
            return "CONFLICT"
        self.convicted.add(node)
        for id_, waiting in list(self.waiting.items()):
            if waiting.source == bond(node):
                self._end_waiting(id_, paid=False)
        forfeited = self.money[locked(node)] + self.money[bond(node)]
        self.taken[node] += self._up_to(locked(node), TREASURY, forfeited)
        self._up_to(bond(node), TREASURY, forfeited)
        self.forfeited[node] += forfeited
        reward = forfeited * ppm // 1_000_000
        self._move(TREASURY, f"verifier:{verifier}", reward)
        victims = [
            r
            for r in sorted(self.receipts.values(), key=lambda r: r.index)
            if r.node == node
            and r.index >= max(change_point, self.since[node])
            and not r.refunded
            and r.charge
        ]
        total, seen = sum(r.charge for r in victims), 0
        pay = min(forfeited - reward, total)
        for r in victims:
            before = pay * seen // total
            seen += r.charge
            share = pay * seen // total - before
            self._move(TREASURY, r.client, share)
            self.debts[r.client] += r.charge - share
            r.refunded, r.taken_back = True, r.rest + r.subsidy
        return "applied"

    def reinstate(self, node, pay_back):
        if node not in self.convicted or pay_back > self.may_pay_back(node):
            return "CONFLICT"
        self.convicted.remove(node)
        self._move(TREASURY, bond(node), pay_back)
        self.forfeited[node] -= pay_back
        # What it earned until now was forfeited, and makes no room for what it earns from now on.
        self.let_go[node] = sum(r.counts for r in self.receipts.values() if r.node == node)
        return "applied"

    def may_pay_back(self, node):
        return min(self.forfeited[node], self.money[TREASURY])

    def reward(self, verdict, verifier, amount, known):
        if not known:
            return "NOT_FOUND"
        if verdict not in self.rewardable or verdict in self.rewarded:
            return "CONFLICT"
        if amount > self.money[POOL]:
            return "INSUFFICIENT_FUNDS"
        self.rewarded.add(verdict)
        self._move(POOL, f"verifier:{verifier}", amount)
        return "applied"

    # -- paying nodes --------------------------------------------------------------------------

    def stuck(self, node):
        """Locked, and will not be released however long it waits."""
        counts = sum(r.counts for r in self.receipts.values() if r.node == node)
        return self.money[locked(node)] - (counts - self.let_go[node])

    def releasable(self, node, below, now):
        held_from = min(
            (
                self.receipts[digest].index
                for digest, answered in self.asked.items()
                if not answered
                and self.receipts[digest].node == node
                and self.receipts[digest].at > now - self.window_ms - DAY_MS
            ),
            default=below,
        )
        earned = sum(
            r.counts
            for r in self.receipts.values()
            if r.node == node and r.index < min(below, held_from) and r.at <= now - self.window_ms
        )
        return max(0, min(earned - self.let_go[node], self.money[locked(node)]))

    def release(self, node, amount, below, now):
        """Amount 0: all that may be."""
        most = self.releasable(node, below, now)
        if node in self.convicted or amount > most:
            return "CONFLICT"
        self._move(locked(node), free(node), amount or most)
        self.let_go[node] += amount or most
        return "applied"

    def payout(self, id_, node, amount):
        return self._start(id_, Waiting(node, free(node), "external:bank", amount))

    def bond_withdraw(self, id_, node, amount, not_before, now):
        if not now + self.window_ms <= not_before <= now + YEAR_MS:
            return "INVALID_REQUEST"
        return self._start(id_, Waiting(node, bond(node), "external:bond", amount, not_before))

    def _start(self, id_, waiting):
        if waiting.amount > self.money[waiting.source]:
            return "INSUFFICIENT_FUNDS"
        self.money[waiting.source] -= waiting.amount
        self.waiting[id_] = waiting
        return "applied"

    def settle(self, id_, paid, now):
        waiting = self.waiting.get(id_)
        if waiting is None or (paid and waiting.due > now):
            return "CONFLICT"
        self._end_waiting(id_, paid)
        return "applied"

    def _end_waiting(self, id_, paid):
        waiting = self.waiting.pop(id_)
        self.money[waiting.target if paid else waiting.source] += waiting.amount
        if paid and waiting.source == free(waiting.node):
            self.paid[waiting.node] += waiting.amount

    # -- what must be true ---------------------------------------------------------------------

    def pending(self):
        """Debits pending by account."""
        sums = Counter()
        for held in self.held.values():
            sums[held.client] += held.amount
        for waiting in self.waiting.values():
            sums[waiting.source] += waiting.amount
        return sums

    def leaving(self, node):
        return sum(w.amount for w in self.waiting.values() if w.source == bond(node))

    def on_its_way(self, node):
        return sum(w.amount for w in self.waiting.values() if w.source == free(node))

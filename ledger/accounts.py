"""Accounts: who owns them, what kind they are, and the four counters.

A counter only grows or, for pending ones, shrinks when a pending transfer is resolved. All
amounts are integer nanocredits; sums beyond 2^63-1 are refused, never wrapped.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.money import MAX_NANO
from trueweight.protos.v1 import ledger_pb2 as pb

CURRENCY = "CREDIT"
CLIENT = int(pb.CLIENT)
NODE_LOCKED = int(pb.NODE_LOCKED)
NODE_AVAILABLE = int(pb.NODE_AVAILABLE)
NODE_BOND = int(pb.NODE_BOND)
FEE = int(pb.FEE)
POOL = int(pb.VERIFICATION_POOL)
TREASURY = int(pb.TREASURY)
CLEARING = int(pb.CLEARING)
EXTERNAL = int(pb.EXTERNAL)
VERIFIER = int(pb.VERIFIER)

_KIND_OF_PREFIX = {
    "client": CLIENT,
    "node-locked": NODE_LOCKED,
    "node-available": NODE_AVAILABLE,
    "node-bond": NODE_BOND,
    "fee": FEE,
    "pool": POOL,
    "treasury": TREASURY,
    "clearing": CLEARING,
    "external": EXTERNAL,
    "verifier": VERIFIER,
}
_ACCOUNT = re.compile(r"[a-z-]{1,20}:[a-z0-9._:-]{1,100}")
_OWNER = re.compile(r"[a-z0-9._:-]{1,100}")

FEE_ACCOUNT, POOL_ACCOUNT, TREASURY_ACCOUNT = "fee:market", "pool:market", "treasury:market"


class Account(NamedTuple):
    """One account's row: identity and four counters."""

    no: int
    id: str
    kind: int
    debits_pending: int = 0
    debits_posted: int = 0
    credits_pending: int = 0
    credits_posted: int = 0

    @property
    def available(self) -> int:
        """What may still be debited; negative only for the outside world."""
        return self.credits_posted - self.debits_posted - self.debits_pending


def kind_of(account_id: str) -> int:
    """The kind of an account id. Raises InvalidRequest if it is not one."""
    if not isinstance(account_id, str) or not _ACCOUNT.fullmatch(account_id):
        raise InvalidRequest("not an account id", hint="Write kind:owner, e.g. client:acme.")
    kind = _KIND_OF_PREFIX.get(account_id.partition(":")[0])
    if kind is None:
        raise InvalidRequest(f"{account_id!r} has no known kind of account")
    return kind


def owner_of(account_id: str) -> str:
    """The part after the kind."""
    return account_id.partition(":")[2]


def check_owner(owner: str, what: str) -> str:
    """The owner part of an account, or InvalidRequest."""
    if not _OWNER.fullmatch(owner):
        raise InvalidRequest(f"{what} is not an identifier of at most 100 characters")
    return owner


@lru_cache(maxsize=16_384)
def clearing_of(client_account: str) -> str:
    """Holds of a client go through its own clearing account."""
    return f"clearing:{owner_of(client_account)}"


def node_locked(node_id: str) -> str:
    return f"node-locked:{node_id}"


def node_available(node_id: str) -> str:
    return f"node-available:{node_id}"


def node_bond(node_id: str) -> str:
    return f"node-bond:{node_id}"


def external(rail: str) -> str:
    """The outside world, one account per payment rail."""
    return f"external:{rail}"


def paid_out_of(node_id: str, account: str) -> str:
    """The account that a payout names, or its node's available earnings."""
    return account or node_available(node_id)


def check_amount(amount: int, what: str = "the amount") -> int:
    """A positive amount that fits, or InvalidRequest."""
    if not 0 < amount <= MAX_NANO:
        raise InvalidRequest(f"{what} must be between 1 and 2^63-1 nanocredits")
    return amount

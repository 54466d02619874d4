"""How a command reaches a running ledger: endpoint and pin from the market descriptor."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from trueweight.protos.errors import NotFound
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import GrpcLedger
from trueweight.runtime.market import load_market
from trueweight.runtime.rpc import AccessTokens


@asynccontextmanager
async def connected(
    market_path: Path, keys: Path, endpoint: str | None
) -> AsyncIterator[GrpcLedger]:
    """A client of the market's ledger, as the identity of a key directory."""
    market = load_market(market_path)
    member = market.member(Member.LEDGER)
    address = endpoint or member.endpoint
    if not address:
        raise NotFound(
            "the market descriptor names no ledger endpoint", hint="Give it with --ledger."
        )
    tokens = AccessTokens(load_signer(keys), market.market_id, SystemClock(), os.urandom)
    client = GrpcLedger(address, member.tls_certificate_pem, member.identity, tokens)
    try:
        yield client
    finally:
        await client.close()

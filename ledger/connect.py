"""How a command reaches a running ledger: endpoint and pin from the market descriptor."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import GrpcLedger, connect_ledger
from trueweight.runtime.market import load_market
from trueweight.runtime.rpc import AccessTokens


@asynccontextmanager
async def connected(
    market_path: Path, keys: Path, endpoint: str | None
) -> AsyncIterator[GrpcLedger]:
    """A client of the market's ledger, as the identity of a key directory."""
    market = load_market(market_path)
    tokens = AccessTokens(load_signer(keys), market.market_id, SystemClock(), os.urandom)
    client = connect_ledger(market, tokens, endpoint or "")
    try:
        yield client
    finally:
        await client.close()

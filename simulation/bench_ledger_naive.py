"""What ``make bench-ledger`` compares with: a transaction for each transfer, no log, no proof."""

from __future__ import annotations

import asyncio
import os
import time

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from trueweight.ledger.schema import normal_url


async def naive(url: str, count: int) -> float:
    """Pairs per second with a transaction for each transfer, 16 connections, no log, no proof."""
    parsed = normal_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    engine = create_async_engine(
        parsed.set(drivername="sqlite+aiosqlite") if sqlite else parsed,
        pool_size=16, max_overflow=0, connect_args={"timeout": 60} if sqlite else {},
    )  # fmt: skip
    metadata = sa.MetaData()
    accounts = sa.Table(
        "naive_account", metadata,
        sa.Column("id", sa.Text, primary_key=True), sa.Column("balance", sa.BigInteger),
    )  # fmt: skip
    transfers = sa.Table(
        "naive_transfer", metadata,
        sa.Column("id", sa.LargeBinary, primary_key=True), sa.Column("debit", sa.Text),
        sa.Column("credit", sa.Text), sa.Column("amount", sa.BigInteger),
    )  # fmt: skip
    async with engine.begin() as connection:
        if sqlite:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        await connection.run_sync(metadata.create_all)
        names = ["market", *(f"c{i}" for i in range(1000)), *(f"n{i}" for i in range(64))]
        await connection.execute(sa.insert(accounts), [{"id": n, "balance": 10**15} for n in names])

    async def transfer(debit: str, credit: str, amount: int) -> None:
        async with engine.begin() as connection:
            if sqlite:
                await connection.exec_driver_sql("PRAGMA synchronous=FULL")
            await connection.execute(
                sa.insert(transfers),
                {"id": os.urandom(16), "debit": debit, "credit": credit, "amount": amount},
            )
            for name, change in sorted(((debit, -amount), (credit, amount))):
                await connection.execute(
                    sa.update(accounts)
                    .where(accounts.c.id == name)
                    .values(balance=accounts.c.balance + change)
                )

    places = iter(range(count))

    async def worker() -> None:
        for index in places:
            await transfer(f"c{index % 1000}", "market", 2)
            await transfer("market", f"n{index % 64}", 1)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(16)))
    rate = count / (time.perf_counter() - started)
    await engine.dispose()
    return rate

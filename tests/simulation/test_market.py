"""The market of processes: what people are told while it starts, and what is claimed of models."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from trueweight.simulation import market
from trueweight.simulation.market import DEMO_MODEL, LocalMarket, MarketSettings
from trueweight.simulation.supervisor import ProcessSpec, Supervisor


async def test_people_are_told_who_is_still_starting(tmp_path, monkeypatch):
    monkeypatch.setattr(market, "STILL_EVERY_S", 0.05)
    supervisor, told = Supervisor(tmp_path), []
    made = LocalMarket(MarketSettings(tmp_path, (), ()), supervisor, told.append)
    slow = ProcessSpec("node-slow", (sys.executable, "-c", "import time; time.sleep(60)"))
    starting = asyncio.create_task(supervisor.start(slow))
    talking = asyncio.create_task(made._say_who_is_starting())
    async with asyncio.timeout(10):
        while "still starting: node-slow" not in told:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for task in (talking, starting):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert supervisor.left_behind() == []


def test_no_licence_is_claimed_for_a_foreign_model():
    ours = MarketSettings(Path("x"), (), (), model=DEMO_MODEL)
    foreign = MarketSettings(Path("x"), (), (), model=Path("/somewhere/else"))
    assert (ours.sold_under, foreign.sold_under) == ("PSF-2.0", "NOASSERTION")
    assert MarketSettings(Path("x"), (), (), licence="MIT").sold_under == "MIT"

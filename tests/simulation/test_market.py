"""The market of processes: what people are told while it starts, and what is claimed of models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest

from tests.byte_tokenizer import byte_tokenizer
from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.simulation import market
from trueweight.simulation.demo_files import DEMO_MODEL
from trueweight.simulation.market import LocalMarket
from trueweight.simulation.market_plan import MarketSettings
from trueweight.simulation.random_llama import TINY, write_random_llama
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


def made_of(model, directory, **settings):
    made = LocalMarket(
        MarketSettings(directory, (), (), model=model, **settings), Supervisor(directory)
    )
    made._create()
    return made


def test_a_foreign_model_is_signed_and_what_it_lacks_is_said_before_anything_starts(tmp_path):
    foreign = write_random_llama(tmp_path / "Foreign Llama", TINY)
    with pytest.raises(EngineError) as lacking:
        made_of(foreign, tmp_path / "a", model_id="foreign")
    assert "no tokenizer.json" in str(lacking.value) and "save_pretrained" in lacking.value.hint
    byte_tokenizer().save(str(foreign / "tokenizer.json"))
    plain = made_of(foreign, tmp_path / "b", model_id="foreign")
    assert not plain.has_chat
    assert (tmp_path / "b/model/foreign.manifest").is_file()
    config = {"chat_template": "{{ messages[0].content }}"}
    (foreign / "tokenizer_config.json").write_text(json.dumps(config))
    assert made_of(foreign, tmp_path / "c", model_id="foreign").has_chat
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(InvalidRequest):
        made_of(broken, tmp_path / "d")


async def test_a_name_that_clients_cannot_ask_for_is_refused_before_anything_starts(tmp_path):
    foreign = write_random_llama(tmp_path / "Foreign Llama", TINY)
    byte_tokenizer().save(str(foreign / "tokenizer.json"))
    with pytest.raises(InvalidRequest) as refused:
        made_of(foreign, tmp_path / "a")
    assert "--model-id" in refused.value.hint

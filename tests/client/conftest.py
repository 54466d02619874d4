"""A market directory, a small model directory, and a runner of command lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from trueweight.client.launcher import run
from trueweight.client.market_setup import MarketPlan, create_market
from trueweight.runtime.clock import ManualClock


@dataclass
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


@pytest.fixture
def trueweight(capfd):
    """Runs one command line in this process."""

    def call(*arguments):
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@dataclass
class MarketDirectory:
    path: Path

    @property
    def file(self):
        return self.path / "market.json"

    def keys(self, role):
        return self.path / "keys" / role


@pytest.fixture
def market(tmp_path):
    create_market(tmp_path / "market", MarketPlan("test"), ManualClock())
    return MarketDirectory(tmp_path / "market")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    config = {"vocab_size": 50, "max_position_embeddings": 64, "eos_token_id": 3}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return path

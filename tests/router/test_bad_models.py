"""A registered model that cannot be loaded is not sold, and harms nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil

import pytest

from trueweight.client.model_files import registry_entry
from trueweight.protos.envelope import open_envelope, seal
from trueweight.protos.manifest import build_manifest
from trueweight.protos.v1.market_pb2 import Suspension
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.router import catalog
from trueweight.simulation.inprocess import MODEL_DIRECTORY, MODEL_ID, NodeSpec

TEMPLATES = {
    "number": "{{ " + "1" * 5000 + " }}",
    "ifs": "{% if true %}" * 120 + "x" + "{% endif %}" * 120,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "fors": "{% for a in [1] %}" * 40 + "x" + "{% endfor %}" * 40,
}
PANIC = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}


def break_template(directory, text):
    (directory / "chat_template.jinja").write_text(text)


def break_tokenizer(directory):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": PANIC}))


@pytest.fixture
def evil(tmp_path):
    directory = tmp_path / "evil"
    shutil.copytree(MODEL_DIRECTORY, directory)
    return directory


async def register(market, directory, name="evil"):
    """The publisher signs it and the market registers it, as for any model."""
    now, about = market.clock.now_unix_ms(), market.market
    market_id = about.market_id
    manifest = build_manifest(
        directory, market_id=market_id, name=name, revision="1", licence="x", now_unix_ms=now
    )
    opened = open_envelope(
        seal(manifest, market.signer("publisher")), Manifest, about.ring, market_id
    )
    entry = registry_entry(name, opened, market.signer("market"), about, now)
    await market.port("market").publish(entry)


async def suspend(market, node):
    verifier = market.signer("verifier")
    message = Suspension(
        market_id=market.market.market_id, node_id=node, issuer=verifier.identity, reason="x"
    )
    await market.port("verifier").publish(seal(message, verifier))


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("how", [*TEMPLATES, "tokenizer"])
async def test_attack_suspensions_are_heard_after_a_bad_model(start_market, evil, how):
    if how == "tokenizer":
        break_tokenizer(evil)
    else:
        break_template(evil, TEMPLATES[how])
    async with start_market(NodeSpec("a")) as market:
        market.router.catalog._directories["evil"] = evil
        await register(market, evil)
        node = market.nodes["a"].node_id
        await suspend(market, node)
        await until(lambda: market.router.fleet.is_suspended(node))
        assert [m.model_id for m in market.router.catalog.all()] == [MODEL_ID]


async def test_attack_a_bad_model_does_not_prevent_a_restart(start_market, evil, monkeypatch):
    break_tokenizer(evil)
    async with start_market(NodeSpec("a")) as market:
        await register(market, evil)
        await market.router.close(drain_ms=0)
        real = catalog.Catalog.__init__
        monkeypatch.setattr(
            catalog.Catalog,
            "__init__",
            lambda self, keys, directories: real(self, keys, {**directories, "evil": evil}),
        )
        await market.start_router()
        assert [m.model_id for m in market.router.catalog.all()] == [MODEL_ID]


async def test_a_model_that_meets_a_bug_is_not_sold_and_logged_once(
    start_market, evil, monkeypatch, caplog
):
    def buggy(*_):
        raise RuntimeError("a bug")

    async with start_market(NodeSpec("a")) as market:
        market.router.catalog._directories["evil"] = evil
        await register(market, evil)
        await until(lambda: len(market.router.catalog.all()) == 2)
        monkeypatch.setattr(catalog, "load_tokenizer", buggy)
        # Its next version: the one before is no longer what the name stands for.
        with caplog.at_level(logging.ERROR):
            await register(market, evil)
            await until(lambda: len(market.router.catalog.all()) == 1)
        assert [r.message for r in caplog.records if r.exc_info] == [
            "model evil cannot be served here"
        ]

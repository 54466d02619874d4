"""Real engines, real ledger, real verifier: every cheat is convicted, no honest node is."""

import asyncio
import random
from dataclasses import replace

import pytest

from tests.byte_tokenizer import EOS, byte_tokenizer
from trueweight.node.grammar import Grammars
from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.protos.errors import ReceiptRefused
from trueweight.protos.grammar import source_of, with_grammar
from trueweight.protos.sampling_parameters import Sampling, resolve
from trueweight.protos.v1.audit_pb2 import CalibrationEntry, Verdict
from trueweight.protos.v1.model_pb2 import FileEntry, Manifest
from trueweight.protos.v1.node_pb2 import ScoreItem
from trueweight.simulation import adversaries as cheats
from trueweight.simulation.audited_market import AuditedMarket, Order, audit_everything
from trueweight.verifier.calibration_file import Measured, weights_sha256

SHAPE = ModelShape(vocabulary_size=512, mean_output_tokens=250)
BOND = 10**9
NOISE = 0.01


def engine(shape=SHAPE, model=None, seed=0):
    return SyntheticEngine(model or SyntheticModel(shape), noise=NOISE, noise_seed=seed)


def manifest():
    files = [FileEntry(path="model.safetensors", size_bytes=1, sha256=b"x" * 32)]
    return Manifest(name="synthetic", vocabulary_size=512, eos_token_ids=[0], files=files)


def measured():
    entries = [
        CalibrationEntry(
            parameter_class=name,
            mu0_nano=600_000,
            upper_bound_nano=300_000,
            requests=1,
            tokens=1,
            refund_above_nano=100_000_000,
        )
        for name in ("plain", "greedy", "top_p", "grammar")
    ]
    return Measured(weights_sha256(manifest()), 1, "synthetic", tuple(entries))


def orders(count, *, sampling=None, seed=1, max_tokens=180):
    chance = random.Random(seed)
    chosen = resolve(sampling or Sampling(stop_token_ids=(0,)))
    for _ in range(count):
        prompt = tuple(chance.randrange(1, 512) for _ in range(12))
        yield Order(prompt, chosen, chance.randrange(2**62), max_tokens)


CHEATS = {
    "wrong seed": cheats.WrongSeed,
    "another model": lambda e: cheats.OtherEngine(
        e, engine(ModelShape(vocabulary_size=512, model_seed=2, mean_output_tokens=250))
    ),
    "quantised weights": lambda e: cheats.OtherEngine(
        e, engine(model=cheats.PerturbedModel(SyntheticModel(SHAPE), 0.1))
    ),
    "T = 0.95 for 1": lambda e: cheats.WrongTemperature(e, 0.95),
    "top_p 0.9 for 1": lambda e: cheats.WrongTopP(e, 0.9),
    "hidden prompt": lambda e: cheats.HiddenPrompt(e, [7] * 12),
}


@pytest.fixture
async def market(tmp_path):
    found = AuditedMarket(tmp_path, manifest(), nodes=3)
    await found.start()
    yield found
    await found.close()


async def run(market, served, count, **settings):
    """Nodes serve ``count`` orders each under one verifier; the verifier."""
    reference = engine(seed=99)
    engines = [*served.values(), reference]
    await asyncio.gather(*(e.start() for e in engines))
    try:
        await audit_everything(market.verifier(reference, [measured()]), 0)
        for number, (signer, node_engine) in enumerate(served.items()):
            for order in orders(count, seed=number, **settings):
                await market.serve(signer, node_engine, order)
        app = market.verifier(reference, [measured()])
        page = await market.port("").read_log(0, 1)
        await audit_everything(app, page.tree_size)
        return app.service.view
    finally:
        await asyncio.gather(*(e.close() for e in engines))


@pytest.mark.parametrize("name", CHEATS)
async def test_the_cheat_and_only_the_cheat_is_convicted(market, name):
    good, bad = market.world.node[0], market.world.node[1]
    await market.join(good, BOND), await market.join(bad, BOND)
    before = await market.available("client:client")
    served = {_key(good): engine(seed=1), _key(bad): CHEATS[name](engine(seed=2))}
    view = await run(market, served, 30)
    assert view.convicted(bad.identity), view.nodes[bad.identity].pooled.wealth.value
    assert not view.convicted(good.identity)
    assert view.nodes[good.identity].pooled.largest < 100
    assert view.nodes[bad.identity].suspended
    assert await market.available(f"node-bond:{bad.identity}") == 0
    assert await market.available(f"node-locked:{bad.identity}") == 0
    assert await market.available(f"node-bond:{good.identity}") == BOND
    # Clients paid the honest node and nothing to the cheat (its bond covers all refunds).
    paid = before - await market.available("client:client")
    honest = await market.available(f"node-locked:{good.identity}")
    assert 0 < honest <= paid <= honest * 1.2


class _key:
    """A signer that can be a dictionary key."""

    def __init__(self, signer):
        self._signer = signer

    def __getattr__(self, name):
        return getattr(self._signer, name)


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.0, 1.0), (0.8, 0.9)])
async def test_honest_nodes_with_other_rounding_stay_clear(market, temperature, top_p):
    sampling = Sampling(temperature=temperature, top_p=top_p, stop_token_ids=(0,))
    nodes = market.world.node
    for node in nodes:
        await market.join(node, BOND)
    served = {_key(node): engine(seed=i) for i, node in enumerate(nodes)}
    view = await run(market, served, 12, sampling=sampling)
    assert not any(view.convicted(node.identity) for node in nodes)
    assert max(view.nodes[n.identity].pooled.largest for n in nodes) < 50
    assert {v.leaf.message.outcome for v in view.verdicts.values()} == {Verdict.SCORED}
    assert len(view.verdicts) == 36


async def test_under_a_grammar_only_who_ignores_it_is_convicted(market):
    source = source_of("regex", "([a-m]{3,9} ){12}(yes|no)")
    sampling = resolve(with_grammar(Sampling(stop_token_ids=(EOS,)), source))
    grammars = Grammars(byte_tokenizer().to_str(), 512, [EOS])
    shape = ModelShape(vocabulary_size=512, eos_token_ids=(EOS,))
    good, bad = market.world.node[0], market.world.node[1]
    await market.join(good, BOND), await market.join(bad, BOND)

    def node(seed):
        model = SyntheticModel(shape)
        return SyntheticEngine(model, noise=NOISE, noise_seed=seed, grammars=grammars)

    reference = node(99)
    served = {_key(good): node(1), _key(bad): cheats.IgnoredGrammar(node(2))}
    await asyncio.gather(reference.start(), *(e.start() for e in served.values()))
    await audit_everything(market.verifier(reference, [measured()]), 0)
    for signer, serving in served.items():
        for order in orders(12):
            wanted = replace(order, sampling=sampling, grammar_source=source, max_tokens=120)
            await market.serve(signer, serving, wanted)
    app = market.verifier(reference, [measured()])
    page = await market.port("").read_log(0, 1)
    await audit_everything(app, page.tree_size)
    view = app.service.view
    assert view.convicted(bad.identity) and not view.convicted(good.identity)
    assert {v.leaf.message.parameter_class for v in view.verdicts.values()} == {"grammar"}
    await asyncio.gather(reference.close(), *(e.close() for e in served.values()))


async def test_cached_text_from_another_seed_is_refunded_at_once_and_convicts(market):
    node = market.world.node[0]
    await market.join(node, BOND)
    cached = cheats.CachedText(engine(seed=1))
    reference = engine(seed=99)
    await asyncio.gather(cached.start(), reference.start())
    await audit_everything(market.verifier(reference, [measured()]), 0)
    (first,) = orders(1)
    for number in range(11):
        order = Order(first.prompt, first.sampling, first.seed + number, first.max_tokens)
        await market.serve(node, cached, order)
    app = market.verifier(reference, [measured()])
    page = await market.port("").read_log(0, 1)
    await audit_everything(app, page.tree_size)
    outcomes = [v.leaf.message.outcome for v in app.service.view.verdicts.values()]
    assert outcomes.count(Verdict.REFUND) == 10 and outcomes.count(Verdict.SCORED) == 1
    assert app.service.view.convicted(node.identity)
    await asyncio.gather(cached.close(), reference.close())


@pytest.mark.parametrize(
    "cheat,check,limit",
    [
        (lambda e: cheats.Truncation(e, 0.5), "length", 30),
        (cheats.Padding, "after_eos", 400),
    ],
    ids=["truncation", "padding"],
)
async def test_truncation_and_padding_are_never_paid(market, cheat, check, limit):
    node = market.world.node[0]
    await market.join(node, BOND)
    bad = cheat(engine(seed=1))
    await bad.start()
    refused = 0
    for order in orders(12, max_tokens=limit):
        try:
            await market.serve(node, bad, order)
        except ReceiptRefused as error:
            assert error.check == check
            refused += 1
    assert refused >= 2
    await bad.close()


async def test_the_log_shows_margins_and_no_text(market):
    node = market.world.node[0]
    await market.join(node, BOND)
    view = await run(market, {_key(node): engine(seed=1)}, 3)
    page = await market.port("").read_log(0, 1000)
    assert len(view.verdicts) == 3 and len(page.entries) > 10
    for order in orders(3, seed=0):
        (transcript,) = [
            t for t in market.transcripts.values() if tuple(t.prompt_token_ids) == order.prompt
        ]
        for ids in (transcript.prompt_token_ids, transcript.output_token_ids):
            packed = ScoreItem(prompt_token_ids=ids[:6]).SerializeToString()[2:]
            assert packed in transcript.SerializeToString()
            assert not any(packed in entry.body for entry in page.entries)

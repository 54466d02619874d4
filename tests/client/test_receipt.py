"""A receipt of a real paid request, checked offline, and every way to forge it."""

from __future__ import annotations

import asyncio
import base64
import copy
import json

import aiohttp
import pytest

from trueweight.client.receipt_check import check_bundle, holds
from trueweight.protos.envelope import seal
from trueweight.protos.money import charge_nano, split_charge
from trueweight.protos.receipt_bundle import bundle_of
from trueweight.protos.v1.envelope_pb2 import Envelope
from trueweight.protos.v1.market_pb2 import Bill
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.runtime.keys import load_signer
from trueweight.simulation.inprocess import InProcessMarket, MarketSpec, NodeSpec


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
    """(bundle JSON, market directory, router's signer) of one real request."""
    directory = tmp_path_factory.mktemp("receipt") / "market"
    return asyncio.run(pay(directory))


async def pay(directory):
    async with InProcessMarket(directory, MarketSpec(nodes=(NodeSpec("n0"),))) as market:
        key = await market.client_key("acme")
        headers = {"authorization": f"Bearer {key}"}
        body = {
            "model": market.spec.model_id,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 12,
            "ignore_eos": True,
            "seed": 5,
        }
        async with aiohttp.ClientSession(headers=headers) as session:
            url = f"{market.base_url}/chat/completions"
            async with session.post(url, json=body) as response:
                assert response.status == 200, await response.text()
                receipt = response.headers["x-trueweight-receipt"]
            document = await read(session, market.base_url, receipt)
        page = await market.port("market").read_log(0, 1000, ["registry-entry"])
        entry = RegistryEntry.FromString(Envelope.FromString(page.entries[0].body).payload)
        (directory / "model.manifest").write_bytes(entry.manifest_envelope)
        return document, directory, market.signer("router"), market.market


async def read(session, base_url, receipt):
    """The bundle with its inclusion proof, which comes when the log has merged the bill."""
    for _ in range(150):
        async with session.get(f"{base_url}/receipts/{receipt}") as response:
            assert response.status == 200, await response.text()
            document = await response.json()
        if document.get("inclusion"):
            return document
        await asyncio.sleep(0.1)
    pytest.fail("the bill was not merged into the log")


def findings_of(paid, document):
    return check_bundle(bundle_of(document), paid[3])


def wrong_of(paid, document):
    return [f.name for f in findings_of(paid, document) if f.ok is False]


def test_a_real_receipt_holds_in_every_check(paid):
    findings = findings_of(paid, paid[0])
    assert holds(findings)
    assert [f.name for f in findings if f.ok] == [
        "node keys",
        "assignment 0",
        "receipt 0",
        "bill",
        "charge",
        "checkpoint",
        "bill in log",
    ]


def test_the_command_says_what_it_proves_and_what_not(paid, tmp_path, trueweight):
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(paid[0]))
    market = paid[1] / "market.json"
    outcome = trueweight("receipt", "verify", path, "--market", market)
    assert outcome.code == 0, outcome.err
    assert "This does not prove" in outcome.out
    assert "WRONG" not in outcome.out
    shown = trueweight("receipt", "verify", path, "--market", market, "--json").json()
    assert shown["holds"] is True
    assert shown["not_proven"]


def test_with_the_manifest_weights_and_ids_are_judged_too(paid, tmp_path, trueweight):
    path, directory = tmp_path / "receipt.json", paid[1]
    path.write_text(json.dumps(paid[0]))
    where = ("--market", directory / "market.json", "--manifest")
    right = directory / "model.manifest"
    assert trueweight("receipt", "verify", path, *where, right).code == 0
    manifest = Manifest.FromString(Envelope.FromString(right.read_bytes()).payload)
    manifest.revision = "another"
    other = tmp_path / "other.manifest"
    other.write_bytes(seal(manifest, load_signer(directory / "keys" / "publisher")))
    outcome = trueweight("receipt", "verify", path, *where, other)
    assert outcome.code == 65
    assert "(manifest)" in outcome.out


def test_without_a_proof_the_log_is_reported_as_not_checked(paid):
    document = {k: v for k, v in paid[0].items() if k != "inclusion"}
    findings = findings_of(paid, document)
    assert holds(findings)
    assert [f.name for f in findings if f.ok is None] == ["log"]


# --- forgeries -------------------------------------------------------------------------------


def forged(paid, change):
    document = copy.deepcopy(paid[0])
    change(document)
    return document


def set_key(key, value):
    return lambda d: d.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda d: d["output_token_ids"][0].append(1), "receipt 0"),
        (lambda d: d["output_token_ids"][0].__setitem__(0, 1), "receipt 0"),
        (lambda d: d["output_token_ids"][0].pop(), "receipt 0"),
        (lambda d: d["prompt_token_ids"].append(1), "receipt 0"),
        (lambda d: d["prefix_token_ids"][0].append(1), "receipt 0"),
        (set_key("salt", "00" * 16), "receipt 0"),
        (set_key("key_events", []), "receipt 0"),
        (set_key("request_id", "00" * 16), "assignment 0"),
        (lambda d: d.__setitem__("receipts", [d["bill"]]), "receipt 0"),
        (lambda d: d.__setitem__("bill", d["receipts"][0]), "bill"),
        (lambda d: d["inclusion"]["bill"].__setitem__("index", 0), "bill in log"),
        (lambda d: d["inclusion"]["bill"].__setitem__("path", []), "bill in log"),
        (lambda d: d["inclusion"].__setitem__("checkpoint", "x\n\ny\n"), "checkpoint"),
    ],
)
def test_forgery_is_found_at_its_place(paid, change, check):
    wrong = wrong_of(paid, forged(paid, change))
    assert check in wrong


@pytest.mark.parametrize("key", ["assignments", "receipts", "key_events"])
def test_flipped_bits_in_any_envelope_are_found(paid, key):
    data = base64.b64decode(paid[0][key][0])
    for index in range(0, len(data), 17):
        spoilt = bytearray(data)
        spoilt[index] ^= 4
        document = forged(paid, set_key(key, [base64.b64encode(spoilt).decode()]))
        assert not holds(findings_of(paid, document)), index


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b.legs[0], "client_charge_nano", 10**9), "a leg charges"),
        (lambda b: setattr(b, "charge_nano", b.charge_nano + 1), "do not sum"),
        (lambda b: setattr(b.legs[0], "billed_output_tokens", 13), "more output"),
        (lambda b: setattr(b.legs[0], "billed_input_tokens", 10**6), "more input"),
        (lambda b: setattr(b.legs[0], "ask_output_nano_per_mtok", 10**12), "not those locked"),
        (lambda b: setattr(b.legs[0], "fee_nano", 0), "split"),
        (lambda b: setattr(b.legs[0], "node_id", "friend"), "another node"),
        (lambda b: setattr(b.legs[0], "receipt_digest", bytes(32)), "another assignment"),
        (lambda b: setattr(b, "hold_id", bytes(16)), "another router, hold or model"),
        (lambda b: setattr(b, "model_id", "dearer"), "another router, hold or model"),
    ],
)
def test_a_router_that_overcharges_is_found_by_arithmetic(paid, change, words):
    """The router signs its own false bill: signatures hold, the sums do not."""
    bill = Bill.FromString(Envelope.FromString(base64.b64decode(paid[0]["bill"])).payload)
    change(bill)
    sealed = base64.b64encode(seal(bill, paid[2])).decode()
    document = forged(paid, set_key("bill", sealed))
    charge = next(f for f in findings_of(paid, document) if f.name == "charge")
    assert charge.ok is False
    assert words in charge.detail
    # And what is in the log is another bill.
    assert "bill in log" in wrong_of(paid, document)


def test_attack_a_router_bills_one_leg_twice(paid):
    bill = Bill.FromString(Envelope.FromString(base64.b64decode(paid[0]["bill"])).payload)
    twin = bill.legs.add()
    twin.CopyFrom(bill.legs[0])
    twin.billed_input_tokens = 0
    asks = (twin.ask_input_nano_per_mtok, twin.ask_output_nano_per_mtok)
    charge = charge_nano(0, twin.billed_output_tokens, *asks)
    market = paid[3].descriptor
    split = split_charge(charge, market.fee_ppm, market.verification_pool_ppm)
    twin.client_charge_nano, twin.node_nano = charge, split.node_nano
    twin.fee_nano, twin.pool_nano = split.fee_nano, split.pool_nano
    bill.charge_nano += charge

    def twice(document):
        document["bill"] = base64.b64encode(seal(bill, paid[2])).decode()
        for key in ("assignments", "receipts", "output_token_ids", "prefix_token_ids"):
            document[key] *= 2
        # A receipt may come without a proof of the log.
        del document["inclusion"]

    found = findings_of(paid, forged(paid, twice))
    assert [(f.name, f.detail.partition(" (")[0]) for f in found if f.ok is False] == [
        ("charge", "one part of the answer is billed twice")
    ]


def test_a_false_receipt_exits_with_an_error(paid, tmp_path, trueweight):
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(forged(paid, set_key("salt", "00" * 16))))
    outcome = trueweight("receipt", "verify", path, "--market", paid[1] / "market.json")
    assert outcome.code == 65
    assert "WRONG" in outcome.out
    assert "RECEIPT_REFUSED" in outcome.err


def test_a_receipt_of_another_market_does_not_hold(paid, market, tmp_path, trueweight):
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(paid[0]))
    assert trueweight("receipt", "verify", path, "--market", market.file).code == 65


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x00", '{"assignments": 5}'])
def test_files_that_are_no_receipts_are_refused_kindly(market, tmp_path, trueweight, text):
    path = tmp_path / "receipt.json"
    path.write_text(text)
    outcome = trueweight("receipt", "verify", path, "--market", market.file)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err

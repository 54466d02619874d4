"""Market directories: private keys stay private, nothing signed is overwritten."""

from __future__ import annotations

import json
import stat

import pytest

from trueweight.client.market_setup import (
    ROLES,
    SERVERS,
    Changes,
    MarketPlan,
    create_market,
    reissue_market,
)
from trueweight.protos.errors import InvalidRequest, TrueweightError
from trueweight.runtime.clock import ManualClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.market import load_market


def test_a_market_names_every_role_with_its_certified_key(market):
    loaded = load_market(market.file)
    for name, role in ROLES.items():
        signer = load_signer(market.keys(name))
        member = loaded.member(role)
        assert member.identity == signer.identity
        assert loaded.ring.identity_of(signer.key_id) == signer.identity
        assert bool(member.tls_certificate_pem) == (name in SERVERS)
    assert load_signer(market.keys("market")).identity == loaded.market_id


def test_private_files_can_only_be_read_by_their_owner(market):
    private = [p for p in market.path.rglob("*.pem") if "cert" not in p.name]
    assert len(private) == 2 * (len(ROLES) + 1) + len(SERVERS)
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (market.path / "keys").iterdir():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_nothing_secret_is_in_the_public_file(market):
    text = market.file.read_text()
    assert "PRIVATE" not in text
    for path in (market.path / "keys").rglob("*.pem"):
        if "cert" not in path.name:
            assert path.read_text().splitlines()[1] not in text


def test_an_existing_market_is_not_overwritten(market):
    before = market.file.read_bytes()
    with pytest.raises(InvalidRequest, match="already holds a market"):
        create_market(market.path, MarketPlan("other"), ManualClock())
    assert market.file.read_bytes() == before


def test_reissue_moves_endpoints_and_keeps_the_rest(market):
    old = load_market(market.file)
    new = reissue_market(market.path, Changes({"ledger": "10.0.0.1:99"}), ManualClock())
    assert new.market_id == old.market_id
    assert new.descriptor.sequence == old.descriptor.sequence + 1
    assert new.member(ROLES["ledger"]).endpoint == "10.0.0.1:99"
    assert new.member(ROLES["router"]) == old.member(ROLES["router"])
    assert new.descriptor.fee_ppm == old.descriptor.fee_ppm
    new = reissue_market(market.path, Changes({"router": "h:1"}), ManualClock())
    assert new.member(ROLES["ledger"]).endpoint == "10.0.0.1:99"


@pytest.mark.parametrize(
    "plan",
    [
        MarketPlan(""),
        MarketPlan("x\n"),
        MarketPlan("x", fee_ppm=-1),
        MarketPlan("x", fee_ppm=600_000, verification_pool_ppm=600_000),
        MarketPlan("x", settlement_window_ms=-1),
        MarketPlan("x", convictions_needed=0),
        MarketPlan("x", convictions_needed=2),
        MarketPlan("x", endpoints={"ledger": "no-port"}),
        MarketPlan("x", endpoints={"ledger": "host:0"}),
        MarketPlan("x", endpoints={"ledger": "host:70000"}),
        MarketPlan("x", endpoints={"nobody": "host:1"}),
    ],
)
def test_absurd_plans_make_nothing(tmp_path, plan):
    with pytest.raises(InvalidRequest):
        create_market(tmp_path / "m", plan, ManualClock())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--settlement-window-s", "9" * 20), "--settlement-window-s"),
        (("--max-gain-tokens", "9" * 20), "too large"),
        (("--ledger-endpoint", "host:\u00b2"), "not an endpoint"),
        (("--router-endpoint", "host:" + "9" * 5000), "not an endpoint"),
        (("--name", "\udcff"), "not UTF-8"),
        (("--engines", "/dev/zero"), "right file"),
    ],
)
def test_absurd_options_are_refused_before_any_key_is_made(tmp_path, trueweight, options, words):
    outcome = trueweight("market", "init", tmp_path / "m", *options)
    assert outcome.code == 2
    assert words in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "m").exists()


def test_absurd_files_are_refused_and_never_read_to_the_end(market, tmp_path, trueweight):
    deep = tmp_path / "market.json"
    deep.write_text('{"descriptor":' + "[" * 100_000)
    for file in (deep, "/dev/zero"):
        outcome = trueweight("market", "show", "--market", file)
        assert outcome.code == 2 and "Traceback" not in outcome.err
    for command in (
        ("receipt", "verify", "/dev/zero", "--market", market.file),
        ("market", "reissue", market.file.parent, "--admit-verifier", "/dev/zero"),
    ):
        assert "right file" in trueweight(*command).err


def test_a_tampered_market_file_is_refused(market):
    document = json.loads(market.file.read_text())
    for key in ("descriptor", "market_key_event"):
        for text in ("", "AAAA", "not base64!", document[key][:-8] + "AAAAAAA="):
            market.file.write_text(json.dumps({**document, key: text}))
            with pytest.raises(TrueweightError):
                load_market(market.file)
    # The readable copy is only for people.
    market.file.write_text(json.dumps({**document, "readable": {"name": "forged"}}))
    assert load_market(market.file).descriptor.name == "test"


def test_commands(tmp_path, trueweight):
    made = trueweight("market", "init", tmp_path / "m", "--name", "demo", "--fee-percent", "2.5")
    assert made.code == 0, made.err
    shown = trueweight(
        "market", "show", "--market", tmp_path / "m" / "market.json", "--json"
    ).json()
    assert shown["fee_ppm"] == 25_000
    assert {m["role"] for m in shown["members"]} == set(ROLES)
    again = trueweight("market", "init", tmp_path / "m")
    assert again.code == 2
    assert "already holds" in again.err
    moved = trueweight("market", "reissue", tmp_path / "m", "--router-endpoint", "h:5", "--json")
    endpoints = {m["role"]: m["endpoint"] for m in moved.json()["members"]}
    assert endpoints["router"] == "h:5"
    assert endpoints["ledger"] == "127.0.0.1:7411"


def test_a_verifier_of_somebody_else_is_admitted_and_stays(tmp_path, trueweight):
    directory, guest = tmp_path / "m", tmp_path / "guest"
    market = ("--market", directory / "market.json")
    assert trueweight("market", "init", directory).code == 0
    made = trueweight("verifier", "keys", *market, "--keys", guest, "--json").json()
    again = trueweight("verifier", "keys", *market, "--keys", guest, "--json").json()
    assert made == again
    event = ("--admit-verifier", made["key_event"])
    issued = trueweight("market", "reissue", directory, *event, "--convictions-needed", 2, "--json")
    assert issued.code == 0, issued.err
    assert issued.json()["convictions_needed"] == 2
    moved = trueweight("market", "reissue", directory, "--router-endpoint", "h:5", "--json").json()
    verifiers = [m["identity"] for m in moved["members"] if m["role"] == "verifier"]
    assert len(verifiers) == 2 and made["verifier_id"] in verifiers
    known = load_market(directory / "market.json")
    assert not known.ring.have_common_owner(*verifiers), "the guest belongs to nobody here"
    assert known.ring.have_common_owner(known.market_id, known.member(ROLES["verifier"]).identity)
    for bad in (
        directory / "market.json",
        tmp_path / "nowhere",
        directory / "keys/verifier/key-event.bin",
    ):
        assert trueweight("market", "reissue", directory, "--admit-verifier", bad).code != 0
    three = trueweight("market", "reissue", directory, "--convictions-needed", 3)
    assert three.code == 2 and "cannot make" in three.err


def test_a_new_market_says_which_engines_are_paid_and_what_audits_are_owed(tmp_path, trueweight):
    directory = tmp_path / "m"
    made = trueweight("market", "init", directory, "--audit-floor-percent", 5, "--json").json()
    assert made["engines"]["engines"] == ["vllm"] and "fp8" not in made["engines"]["kv_dtypes"]
    assert made["audit_terms"]["floor_ppm"] == 50_000
    assert made["audit_terms"]["duplicate_rate_ppm"] == 100_000
    assert int(made["audit_terms"]["max_gain_tokens"]) == 200_000
    kept = trueweight("market", "reissue", directory, "--router-endpoint", "h:5", "--json").json()
    assert (kept["engines"], kept["audit_terms"]) == (made["engines"], made["audit_terms"])
    engines = tmp_path / "engines.json"
    engines.write_text(json.dumps({**made["engines"], "kv_dtypes": ["fp8"]}))
    options = ("--engines", engines, "--allow-synthetic", "--max-gain-tokens", 7, "--json")
    changed = trueweight("market", "reissue", directory, *options).json()
    assert changed["engines"]["kv_dtypes"] == ["fp8"]
    assert changed["engines"]["engines"] == ["vllm", "synthetic"]
    assert changed["audit_terms"]["floor_ppm"] == 50_000
    assert int(changed["audit_terms"]["max_gain_tokens"]) == 7
    for text in ("", "{}", "[1]", '{"engines": 3}', '{"nothing": []}'):
        engines.write_text(text)
        assert trueweight("market", "reissue", directory, "--engines", engines).code == 2

"""Signing weights, checking them, selling them: over the real OpenSSF library and a real ledger."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from trueweight.client.market_setup import Changes, reissue_market
from trueweight.client.model_files import check_model_id, open_manifest, paths_of
from trueweight.protos.errors import InvalidRequest
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.market import load_market


@pytest.fixture
def sign(trueweight, market, model):
    def call(*more, keys="publisher"):
        return trueweight(
            "model",
            "sign",
            model,
            "--market",
            market.file,
            "--keys",
            market.keys(keys),
            "--licence",
            "Apache-2.0",
            "--json",
            *more,
        )

    return call


@pytest.fixture
def verify(trueweight, market, model):
    def call(*more):
        return trueweight("model", "verify", model, "--market", market.file, "--json", *more)

    return call


def test_a_signed_model_verifies_with_both_signatures(sign, verify, market, model):
    signed = sign()
    assert signed.code == 0, signed.err
    facts = signed.json()
    assert (facts["name"], facts["files"], facts["vocabulary_size"]) == ("my-model", 2, 50)
    # Everything signed lies next to the directory, nothing in it.
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "model.safetensors"]
    assert paths_of(model).manifest.exists()
    checked = verify()
    assert checked.code == 0, checked.err
    assert "OpenSSF" in checked.json()["checked"]
    assert checked.json()["manifest_digest"] == facts["manifest_digest"]
    key = market.keys("publisher") / "model-signing.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def openssf_verify(model):
    """The library's own command over a model directory, with the public key beside it."""
    paths = paths_of(model)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "model_signing",
            "verify",
            "key",
            str(model),
            "--signature",
            str(paths.bundle),
            "--public_key",
            str(paths.bundle_key),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_openssf_library_itself_accepts_the_bundle(sign, model):
    """A stranger checks with the library's own command and knows nothing of Trueweight."""
    assert sign().code == 0
    done = openssf_verify(model)
    assert done.returncode == 0, done.stderr
    (model / "model.safetensors").write_bytes(b"other")
    done = openssf_verify(model)
    assert done.returncode != 0


def test_altered_weights_are_refused_by_name(sign, verify, model):
    assert sign().code == 0
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff")
    outcome = verify()
    assert outcome.code == 65
    assert "model.safetensors differs from the signed weights" in outcome.err


def test_a_swapped_openssf_bundle_is_refused(sign, verify, model):
    assert sign().code == 0
    paths = paths_of(model)
    old = paths.bundle.read_bytes()
    manifest = paths.manifest.read_bytes()
    (model / "model.safetensors").write_bytes(b"\x00" * (1 << 20))
    assert sign().code == 0
    paths.bundle.write_bytes(old)
    outcome = verify()
    assert outcome.code == 65
    assert "not the signature that the manifest names" in outcome.err
    # The old manifest with the old bundle does not cover the new weights either.
    paths.manifest.write_bytes(manifest)
    assert verify().code == 65


def test_another_key_beside_the_bundle_is_refused(sign, verify, model, tmp_path):
    from trueweight.client.model_signature import ensure_key, public_pem

    assert sign().code == 0
    other = tmp_path / "other"
    other.mkdir()
    paths_of(model).bundle_key.write_bytes(public_pem(ensure_key(other)))
    outcome = verify()
    assert outcome.code == 65
    assert "does not hold" in outcome.err


def test_symlinked_weights_sign_and_verify(sign, verify, model, tmp_path):
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    (model / ".gitattributes").write_text("left out")
    assert sign().code == 0
    assert verify().code == 0
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert verify().code == 65


@pytest.fixture
def hub_cache(tmp_path):
    """A snapshot as huggingface_hub leaves it: links into blobs, shards, tokenizer, template."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a1b2"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    vocabulary = {"model": {"vocab": {f"t{i}": i for i in range(50)}}}
    files = {
        "config.json": json.dumps({"vocab_size": 50, "max_position_embeddings": 64}),
        "generation_config.json": json.dumps({"eos_token_id": [3, 4]}),
        "tokenizer.json": json.dumps(vocabulary),
        "chat_template.jinja": "{{ messages }}",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": dict(zip("ab", shards, strict=True))}
        ),
        shards[0]: "1" * 5000,
        shards[1]: "2" * 5000,
    }
    for name, text in files.items():
        blob = blobs / hashlib.sha256(text.encode()).hexdigest()
        blob.write_text(text)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_sharded_snapshot_in_a_hub_cache(trueweight, market, hub_cache):
    where = ("--market", market.file, "--json")
    keys = ("--keys", market.keys("publisher"), "--licence", "MIT")
    signed = trueweight("model", "sign", hub_cache, *where, *keys)
    assert signed.code == 0, signed.err
    facts = signed.json()
    assert (facts["files"], facts["eos_token_ids"], facts["tokenizer"]) == (
        7,
        [3, 4],
        "tokenizer.json",
    )
    assert facts["chat_template_sha256"] == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert "OpenSSF" in trueweight("model", "verify", hub_cache, *where).json()["checked"]
    # A link to other bytes, an extra file, a missing shard.
    shard = hub_cache / "model-00002-of-00002.safetensors"
    original = shard.readlink()
    shard.unlink()
    shard.symlink_to((hub_cache / "model-00001-of-00002.safetensors").readlink())
    assert "differs from the signed" in trueweight("model", "verify", hub_cache, *where).err
    shard.unlink()
    assert "is missing" in trueweight("model", "verify", hub_cache, *where).err
    refused = trueweight("model", "sign", hub_cache, *where, *keys)
    assert refused.code == 65 and "which is missing" in refused.err
    shard.symlink_to(original)
    (hub_cache / "model-00003-of-00002.safetensors").write_text("3")
    assert "not in the signed manifest" in trueweight("model", "verify", hub_cache, *where).err


def test_without_openssf_it_says_so(sign, verify):
    assert sign("--no-openssf").code == 0
    assert "names no OpenSSF signature" in verify().json()["checked"]


def test_only_a_publisher_signs(sign):
    outcome = sign(keys="router")
    assert outcome.code == 2
    assert "not a publisher" in outcome.err


def test_a_manifest_by_somebody_else_is_refused(market, model, tmp_path):
    from trueweight.client.model_files import sign_directory
    from trueweight.protos.errors import TrueweightError
    from trueweight.runtime.keys import load_signer

    known = load_market(market.file)
    keys = market.keys("router")
    sign_directory(
        model,
        market_id=known.market_id,
        signer=load_signer(keys),
        keys=keys,
        name="n",
        revision="1",
        licence="MIT",
        clock=SystemClock(),
        openssf=False,
    )
    with pytest.raises(TrueweightError, match="publisher"):
        open_manifest(paths_of(model).manifest, known)


def test_a_missing_manifest_says_how_to_make_one(verify):
    outcome = verify()
    assert outcome.code == 1
    assert "trueweight model sign" in outcome.err


def test_the_directory_may_be_named_in_any_way(monkeypatch, model):
    monkeypatch.chdir(model)
    from pathlib import Path

    assert paths_of(Path()).manifest == model.with_name("my-model.manifest")
    assert paths_of(model / "").manifest == model.with_name("my-model.manifest")


@pytest.fixture
def ledger(market, tmp_path):
    """A real ledger process; the market file names its endpoint."""
    command = [
        sys.executable,
        "-c",
        "from trueweight.client.launcher import main; main()",
        "ledger",
        "serve",
        "--market",
        str(market.file),
        "--keys",
        str(market.keys("ledger")),
        "--database",
        f"sqlite:///{tmp_path}/ledger.sqlite",
        "--listen",
        "127.0.0.1:0",
    ]
    with (tmp_path / "ledger.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line, (tmp_path / "ledger.log").read_text()
        endpoints = {"ledger": json.loads(line)["endpoint"]}
        reissue_market(market.path, Changes(endpoints), SystemClock())
        yield
    finally:
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def test_register_and_show_over_a_real_ledger(sign, trueweight, market, model, ledger):
    facts = sign().json()
    where = ("--market", market.file, "--keys", market.keys("market"), "--json")
    manifest = ("--manifest", paths_of(model).manifest)
    done = trueweight("model", "register", "my-id", *manifest, *where)
    assert done.code == 0, done.err
    assert done.json()["manifest_digest"] == facts["manifest_digest"]
    # The log is public: whoever reads it needs no keys.
    shown = trueweight("model", "show", "--market", market.file, "--json").json()
    assert shown == trueweight("model", "show", *where).json()
    assert [(m["model_id"], m["manifest_digest"]) for m in shown] == [
        ("my-id", facts["manifest_digest"])
    ]
    (model / "README.md").write_text("# About it")
    again = sign("--revision", "2").json()
    assert trueweight("model", "register", "my-id", *manifest, *where).code == 0
    one = trueweight("model", "show", "my-id", *where).json()
    assert (one["revision"], one["licence"]) == ("2", "Apache-2.0")
    assert one["manifest_digest"] == again["manifest_digest"] != facts["manifest_digest"]
    assert one["model_card_sha256"] == hashlib.sha256(b"# About it").hexdigest()
    assert trueweight("model", "revoke", "my-id", *where).json()["log_index"] > one["log_index"]
    assert trueweight("model", "show", *where).json() == []
    for command in ("show", "revoke"):
        assert trueweight("model", command, "my-id", *where).code == 1
    # Only the market's own key names models.
    wrong = trueweight(
        "model",
        "register",
        "other",
        *manifest,
        "--market",
        market.file,
        "--keys",
        market.keys("publisher"),
    )
    assert wrong.code == 2
    assert "market's own key" in wrong.err


@pytest.mark.parametrize("name", ["", "a b", "a=b", "../up", "a//b", "/a", "a/.", "x" * 129, "a\n"])
def test_names_that_nothing_could_carry_are_refused(name):
    check_model_id("org/Model-7B.v1")
    with pytest.raises(InvalidRequest):
        check_model_id(name)


def test_anybody_reads_what_the_log_says_of_verifiers_and_nodes(trueweight, market, ledger):
    where = ("--market", market.file, "--json")
    assert trueweight("verifier", "owed", "1", *where).json() == []
    assert trueweight("verifier", "status", *where).json() == []
    unknown = trueweight("verifier", "explain", "nobody", *where)
    assert unknown.code == 1 and "knows no node" in unknown.err

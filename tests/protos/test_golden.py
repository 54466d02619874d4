"""The committed vectors are what the script makes, and what the code reproduces."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from trueweight.protos import evidence, merkle, money
from trueweight.protos.audit import commitment, is_owed
from trueweight.protos.envelope import message_digest, pre_authentication_encoding
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.golden_vectors import NAMES, load_golden
from trueweight.protos.identity import key_id
from trueweight.protos.manifest import chunk_leaf, chunk_proof
from trueweight.protos.sampling import (
    Sampling,
    gumbel,
    hash_u32,
    parameter_class,
    sample,
    score_row,
)
from trueweight.protos.sampling_noise import gumbel_of, uniform
from trueweight.protos.tokens import token_digest

TOP = Path(__file__).resolve().parents[2]


def test_the_committed_files_are_what_the_script_writes(tmp_path):
    script = runpy.run_path(str(TOP / "deploy" / "generate_golden.py"))
    script["main"](tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (TOP / "protos/golden").iterdir()}
    assert made == committed
    assert set(made) == {f"{name}.json" for name in NAMES}


def test_an_unknown_name_is_refused():
    with pytest.raises(InvalidRequest):
        load_golden("../secrets")


def test_noise():
    golden = load_golden("noise")
    for seed, pos, token, h, bits, g in golden["rows"]:
        got = hash_u32(int(seed), pos, np.array([token]))
        assert int(got[0]) == h
        assert f"{int(uniform(got).view(np.uint32)[0]):08x}" == bits
        if token < 3000:
            assert gumbel(int(seed), pos, token + 1)[token] == pytest.approx(g, rel=1e-6)
    ends = {row[0]: row for row in golden["ends"]}
    for h, bits, g in golden["ends"]:
        u = uniform(np.array([h], dtype=np.uint32))
        assert f"{int(u.view(np.uint32)[0]):08x}" == bits
        assert gumbel_of(u)[0] == pytest.approx(g, rel=1e-6)
    # Both ends of u: the smallest, and the largest, which is 1 in fp32.
    assert ends[0][1] == "2f000000"
    assert ends[2**32 - 1][1] == "3f800000"


def test_sampling():
    cases = load_golden("sampling")["cases"]
    for case in cases:
        fields = {
            key: _tuples(value) if isinstance(value, list) else value
            for key, value in case["sampling"].items()
        }
        if "grammar_sha256" in fields:
            fields["grammar_sha256"] = bytes.fromhex(fields["grammar_sha256"])
        parameters = Sampling(**fields)
        assert Sampling.from_proto(parameters.to_proto()) == parameters
        assert parameter_class(parameters) == case["class"]
        mask = np.array(case["mask"]) if case["mask"] else None
        logits = np.array(case["logits"], dtype=np.float32)
        where = (int(case["seed"]), case["prompt"], case["output"])
        assert sample(logits, parameters, *where, mask=mask) == case["token"]
        for claimed, margin, logprob, rank in case["scores"]:
            score = score_row(logits, parameters, *where, claimed, mask=mask)
            assert score.margin == pytest.approx(margin, abs=1e-4)
            assert score.logprob == pytest.approx(logprob, abs=1e-4)
            assert score.rank == rank
    classes = {"plain", "greedy", "top_p", "top_k", "min_p", "multi_cut", "penalties", "grammar"}
    assert {case["class"] for case in cases} == classes


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def test_digests():
    golden = load_golden("digests")
    for salt, ids, digest in golden["tokens"]:
        assert token_digest(bytes.fromhex(salt), ids).hex() == digest
    for kind, payload, encoding, digest in golden["pae"]:
        data = bytes.fromhex(payload)
        assert pre_authentication_encoding(kind, data).hex() == encoding
        assert message_digest(kind, data).hex() == digest
    for public, name in golden["key_id"]:
        assert key_id(bytes.fromhex(public)) == name
    for secret, committed in golden["epoch_commitment"]:
        assert commitment(bytes.fromhex(secret)).hex() == committed
    for secret, digest, rate, charge, reference, owed in golden["audit_owed"]:
        got = is_owed(bytes.fromhex(secret), bytes.fromhex(digest), rate, charge, reference)
        assert got is owed
    for chunk, leaf in golden["chunk_leaf"]:
        assert chunk_leaf(bytes.fromhex(chunk)).hex() == leaf
    for nonce, node, index, chunk, proof in golden["chunk_proof"]:
        found = chunk_proof(bytes.fromhex(nonce), node, index, bytes.fromhex(chunk))
        assert found.hex() == proof


def test_the_encoding_is_the_published_one():
    # The example in DSSE's protocol.md.
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_money():
    golden = load_golden("money")
    for *arguments, charge in golden["charge"]:
        assert money.charge_nano(*arguments) == charge
    for charge, fee_ppm, pool_ppm, fee, pool, node in golden["split"]:
        assert money.split_charge(charge, fee_ppm, pool_ppm) == money.Split(fee, pool, node)
        assert fee + pool + node == charge


def test_evidence():
    golden = load_golden("evidence")
    for margin, nano in golden["clipped_nano"]:
        assert evidence.clipped_nano(margin) == nano
    for sequence in golden["sequences"]:
        wealth = evidence.Wealth()
        steps = zip(sequence["items"], sequence["wealth"], sequence["states"], strict=True)
        for item, value, state in steps:
            wealth = wealth.add(*item)
            assert wealth.value == float.fromhex(value)  # to the last bit
            assert wealth.state == state
        items = [evidence.Item(*item) for item in sequence["items"]]
        assert evidence.change_point(items) == sequence["change_point"]


def test_merkle():
    golden = load_golden("merkle")
    leaves = [merkle.leaf_hash(bytes.fromhex(text)) for text in golden["leaves"]]
    roots = [bytes.fromhex(text) for text in golden["roots"]]
    for size in range(len(leaves) + 1):
        assert merkle.root(leaves[:size]) == roots[size]
    for index, size, path in golden["inclusion"]:
        hashes = [bytes.fromhex(h) for h in path]
        assert merkle.inclusion_path(index, size, merkle.fetch_from(leaves)) == hashes
        merkle.verify_inclusion(leaves[index], index, size, hashes, roots[size])
    for old, new, path in golden["consistency"]:
        hashes = [bytes.fromhex(h) for h in path]
        merkle.verify_consistency(old, roots[old], new, roots[new], hashes)

"""Weights on disk: what is signed is what is there, or the node does not serve."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos import merkle
from trueweight.protos.errors import InvalidRequest, TrueweightError, WeightsRefused
from trueweight.protos.manifest import (
    CHUNK_BYTES,
    build_manifest,
    check_directory,
    check_manifest,
    chunk_leaf,
    chunk_proof,
    locate_chunk,
    read_chunk,
)
from trueweight.protos.model_directory import list_files, read_chat_template, read_facts
from trueweight.protos.v1.model_pb2 import FileEntry, Manifest

CONFIG = {
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "torch_dtype": "bfloat16",
}
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1, "</s>": 7}},
    "added_tokens": [{"content": "<|end|>", "id": 9}],
}


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 4]}))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": "{{ messages }}"})
    )
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8200)  # 2 chunks and a bit
    (path / "empty.txt").write_bytes(b"")
    return path


def build(path, **changes):
    settings = {
        "market_id": "m",
        "name": "n",
        "revision": "1",
        "licence": "MIT",
        "now_unix_ms": 1,
    }
    return build_manifest(path, **{**settings, **changes})


def refused(path, manifest):
    with pytest.raises(WeightsRefused) as caught:
        check_directory(path, manifest)
    return str(caught.value)


def test_what_a_manifest_says(directory):
    manifest = build(directory)
    assert [f.path for f in manifest.files] == sorted(p.name for p in directory.iterdir())
    for entry in manifest.files:
        data = (directory / entry.path).read_bytes()
        assert entry.sha256 == hashlib.sha256(data).digest()
        assert entry.size_bytes == len(data)
    assert manifest.vocabulary_size == 50
    assert list(manifest.eos_token_ids) == [4, 5, 9]
    assert manifest.max_context_tokens == 128
    assert manifest.dtype == "bfloat16"
    assert manifest.tokenizer_path == "tokenizer.json"
    assert manifest.chat_template_path == "tokenizer_config.json"
    assert manifest.chat_template_sha256 == hashlib.sha256(b"{{ messages }}").digest()
    check_directory(directory, manifest)


def test_building_twice_gives_the_same_bytes(directory):
    one = build(directory).SerializeToString(deterministic=True)
    assert one == build(directory).SerializeToString(deterministic=True)


def test_progress_reaches_the_total(directory):
    seen = []
    check_directory(directory, build(directory), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(f.stat().st_size for f in directory.iterdir())
    assert seen == sorted(seen)


# --- altered weights -------------------------------------------------------------------------


def test_one_flipped_bit_is_found_and_named(directory):
    manifest = build(directory)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[1_500_000] ^= 1
    path.write_bytes(data)
    message = refused(directory, manifest)
    assert "model.safetensors differs" in message
    assert "Download" in message


def test_a_missing_file_is_named(directory):
    manifest = build(directory)
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(directory, manifest)


def test_a_truncated_file_is_named_before_anything_is_hashed(directory):
    manifest = build(directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert "has 100 bytes" in refused(directory, manifest)


def test_an_extra_file_that_an_engine_might_load_is_refused(directory):
    manifest = build(directory)
    (directory / "model-00002.safetensors").write_bytes(b"quantised")
    message = refused(directory, manifest)
    assert "model-00002.safetensors is not in the signed manifest" in message
    assert "Remove it" in message


def test_an_extra_file_in_a_subdirectory_is_refused(directory):
    manifest = build(directory)
    (directory / "sub").mkdir()
    (directory / "sub" / "adapter.bin").write_bytes(b"x")
    assert "adapter.bin is not in" in refused(directory, manifest)


def test_swapped_files_of_the_same_size_are_found(directory):
    (directory / "a.bin").write_bytes(b"1" * 10)
    (directory / "b.bin").write_bytes(b"2" * 10)
    manifest = build(directory)
    (directory / "a.bin").write_bytes(b"2" * 10)
    assert "a.bin differs" in refused(directory, manifest)


# --- layouts ---------------------------------------------------------------------------------


def test_a_hugging_face_cache_snapshot_is_followed(directory, tmp_path):
    """snapshots/<revision>/x is a link to blobs/<hash>."""
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for path in directory.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    manifest = build(snapshot)
    assert manifest.files == build(directory).files
    check_directory(snapshot, manifest)
    check_directory(directory, manifest)
    assert read_chunk(snapshot, manifest, 1) == read_chunk(directory, manifest, 1)


def test_dot_files_are_left_out(directory):
    manifest = build(directory)
    (directory / ".gitattributes").write_text("x")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x.lock").write_text("x")
    check_directory(directory, manifest)


@pytest.mark.parametrize("kind", ["link to directory", "dangling link", "fifo", "strange name"])
def test_what_cannot_be_signed_is_refused_by_name(directory, tmp_path, kind):
    if kind == "link to directory":
        (directory / "odd").symlink_to(tmp_path)
    elif kind == "dangling link":
        (directory / "odd").symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(directory / "odd")
    else:
        (directory / "odd\n").write_text("x")
    with pytest.raises(WeightsRefused, match="odd"):
        list_files(directory)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(WeightsRefused, match=r"config\.json"):
        build(tmp_path / "nothing")


def test_nested_text_config_and_template_file(directory):
    nested = {"text_config": {"vocab_size": 60, "max_position_embeddings": 9}, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(nested))
    (directory / "generation_config.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ x }}")
    facts = read_facts(directory)
    assert (facts.vocabulary_size, facts.max_context_tokens) == (60, 9)
    assert facts.eos_token_ids == (1, 9)
    assert read_chat_template(directory) == ("chat_template.jinja", "{{ x }}")


def test_a_model_without_tokenizer_or_template(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    manifest = build(directory)
    assert manifest.tokenizer_path == manifest.chat_template_path == ""
    assert manifest.chat_template_sha256 == b""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", "{}", "names no vocab_size"),
        ("config.json", '{"vocab_size": 50}', "names no max_position_embeddings"),
        ("config.json", json.dumps({**CONFIG, "vocab_size": 5}), "ids beyond vocab_size"),
        ("config.json", json.dumps({**CONFIG, "vocab_size": True}), "names no vocab_size"),
        ("tokenizer.json", "{}", "holds no vocabulary"),
        ("tokenizer.json", "[" * 100_000, "is not JSON"),
        ("generation_config.json", '{"eos_token_id": 50}', "EOS id outside"),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}', "is not UTF-8"),
    ],
)
def test_broken_model_files_are_named(directory, name, text, words):
    (directory / name).write_text(text)
    with pytest.raises(WeightsRefused, match=words):
        build(directory)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *CONFIG,
                        "text_config",
                        "model",
                        "vocab",
                        "added_tokens",
                        "content",
                        "id",
                        "chat_template",
                        "eos_token",
                        "name",
                        "template",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_hostile_json_in_model_files_raises_our_errors_only(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("hostile")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_text(json.dumps(value))
    for config in (CONFIG, value):
        (path / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(TrueweightError):
            read_facts(path)


# --- chunks ----------------------------------------------------------------------------------


def test_chunks_cover_every_byte_and_make_the_signed_root(directory):
    manifest = build(directory)
    chunks = [read_chunk(directory, manifest, i) for i in range(manifest.chunk_count)]
    assert max(len(c) for c in chunks) == CHUNK_BYTES
    whole = b"".join((directory / f.path).read_bytes() for f in manifest.files)
    assert b"".join(chunks) == whole
    assert merkle.root([chunk_leaf(c) for c in chunks]) == manifest.chunk_root
    for index in (-1, manifest.chunk_count):
        with pytest.raises(InvalidRequest):
            locate_chunk(manifest, index)


def test_a_chunk_of_a_shortened_or_missing_file_is_refused(directory):
    manifest = build(directory)
    last = manifest.chunk_count - 1
    entry, _ = locate_chunk(manifest, last)
    with (directory / entry.path).open("r+b") as file:
        file.truncate(1)
    with pytest.raises(WeightsRefused, match="shorter"):
        read_chunk(directory, manifest, last)
    (directory / entry.path).unlink()
    with pytest.raises(WeightsRefused, match="cannot be read"):
        read_chunk(directory, manifest, last)


def test_a_challenge_cannot_be_answered_for_another():
    proof = chunk_proof(bytes(32), "node-a", 5, b"data")
    others = [
        chunk_proof(b"\x01" * 32, "node-a", 5, b"data"),
        chunk_proof(bytes(32), "node-b", 5, b"data"),
        chunk_proof(bytes(32), "node-a", 6, b"data"),
        chunk_proof(bytes(32), "node-a", 5, b"datb"),
    ]
    assert len({proof, *others}) == 5
    with pytest.raises(InvalidRequest):
        chunk_proof(b"short", "node", 0, b"")


# --- hostile manifests -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../up", "/abs", "a/../b", "a//b", "", ".hidden", "a/.b/c", "a\\b", "a\nb", "c:d", "."]
)
def test_a_manifest_cannot_reach_outside_its_directory(directory, path):
    manifest = build(directory)
    del manifest.files[:]
    manifest.files.append(FileEntry(path=path, size_bytes=1, sha256=bytes(32)))
    manifest.chunk_count = 1
    with pytest.raises(WeightsRefused):
        check_manifest(manifest)
    with pytest.raises(WeightsRefused):
        check_directory(directory, manifest)
    with pytest.raises(TrueweightError):
        read_chunk(directory, manifest, 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.files.reverse(),
        lambda m: m.files.append(m.files[0]),
        lambda m: m.ClearField("files"),
        lambda m: setattr(m, "chunk_count", 99),
        lambda m: setattr(m, "chunk_bytes", 0),
        lambda m: setattr(m, "chunk_root", b"x"),
        lambda m: setattr(m, "vocabulary_size", 0),
        lambda m: setattr(m, "vocabulary_size", 2**31),
        lambda m: setattr(m, "max_context_tokens", 0),
        lambda m: m.eos_token_ids.append(50),
        lambda m: setattr(m.files[0], "sha256", b"x"),
        lambda m: setattr(m.files[0], "size_bytes", 2**63),
    ],
)
def test_inconsistent_manifests_are_refused(directory, spoil):
    manifest = build(directory)
    spoil(manifest)
    with pytest.raises(WeightsRefused):
        check_manifest(manifest)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(-5, 2**63))
def test_hostile_manifest_bytes_raise_our_errors_only(tmp_path_factory, data, index):
    manifest = Manifest()
    try:
        manifest.ParseFromString(data)
    except DecodeError:
        return
    for check in (
        lambda: check_manifest(manifest),
        lambda: check_directory(tmp_path_factory.getbasetemp(), manifest),
        lambda: read_chunk(tmp_path_factory.getbasetemp(), manifest, index),
    ):
        with pytest.raises(TrueweightError):
            check()

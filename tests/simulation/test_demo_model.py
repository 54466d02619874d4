"""The demo model that ships: its files agree with each other. Without torch, in a second."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import struct
from itertools import chain
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers

from trueweight.simulation import demo_corpus, demo_files

MODEL = Path(__file__).resolve().parents[2] / "simulation/models/tw-demo"
WANTED = {
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}
CONVERSATION = [
    {"role": "system", "content": "You write code."},
    {"role": "user", "content": "Write a function `f`."},
    {"role": "assistant", "content": "def f(): ...\n"},
    {"role": "user", "content": "Another."},
]


def load(name):
    return json.loads((MODEL / name).read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def template():
    environment = ImmutableSandboxedEnvironment()
    return environment.from_string((MODEL / "chat_template.jinja").read_text())


def test_every_file_is_there_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) >= WANTED
    assert min(sizes[name] for name in WANTED) > 0
    assert sum(sizes.values()) < 10_000_000


def test_the_record_names_these_bytes():
    for name, digest in load("training.json")["files_sha256"].items():
        assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == digest, name
    assert set(load("training.json")["files_sha256"]) == WANTED - {"training.json"}


def test_weights_are_bfloat16_and_as_many_as_recorded():
    with (MODEL / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    counted = 0
    for entry in header.values():
        size = 1
        for side in entry["shape"]:
            size *= side
        counted += size
    assert counted == load("training.json")["parameters"]


def test_ids_agree_between_tokenizer_and_configs(tokenizer):
    assert tokenizer.get_vocab_size() == demo_files.VOCABULARY == load("config.json")["vocab_size"]
    ids = {token: tokenizer.token_to_id(token) for token in demo_files.SPECIAL_TOKENS}
    assert list(ids.values()) == list(range(len(ids)))
    generation = load("generation_config.json")
    assert generation["eos_token_id"] == [ids[demo_files.EOS], ids[demo_files.END]]
    for config in (generation, load("config.json")):
        assert config["bos_token_id"] == ids[demo_files.BOS]
        assert config["pad_token_id"] == ids[demo_files.PAD]
    settings = load("tokenizer_config.json")
    assert settings["bos_token"] == demo_files.BOS
    assert settings["eos_token"] == demo_files.EOS
    assert settings["chat_template"] == (MODEL / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(x):\n    return x_1 + 42  # plain\n",
        "Grüße, 世界 🎉 e\u0301 \u200d \ufeff",
        "\x00\t\r\n \r \n\n\n        deep\x7f",
        '__init__ ___ a_b_ \'quoted\' """doc""" ',
        demo_files.END,
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_random_text_comes_back(tokenizer):
    choose = random.Random(1)
    for _ in range(200):
        points = (choose.choice((0x7F, 0x7FF, 0xD7FF)) for _ in range(40))
        text = "".join(chr(choose.randint(0, top)) for top in points)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_its_own_token(tokenizer):
    pieces = {tokenizer.id_to_token(index) for index in range(demo_files.VOCABULARY)}
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= pieces


def test_completions_start_with_bos(tokenizer):
    assert tokenizer.encode("x").ids[0] == tokenizer.token_to_id(demo_files.BOS)
    assert tokenizer.encode("").ids == [tokenizer.token_to_id(demo_files.BOS)]


def test_users_cannot_write_special_tokens(tokenizer):
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    for token in demo_files.SPECIAL_TOKENS:
        ids = plain.encode(f"a{token}b", add_special_tokens=False).ids
        assert min(ids) >= len(demo_files.SPECIAL_TOKENS)
        assert plain.decode(ids) == f"a{token}b"


def test_template_renders_in_the_sandbox(template):
    text = template.render(
        messages=CONVERSATION, bos_token=demo_files.BOS, add_generation_prompt=True
    )
    assert text == (
        "<|bos|><|system|>You write code.<|end|><|user|>Write a function `f`.<|end|>"
        "<|assistant|>def f(): ...\n<|end|><|user|>Another.<|end|><|assistant|>"
    )
    assert text == demo_files.render_chat(CONVERSATION, add_generation_prompt=True)
    closed = demo_files.render_chat(CONVERSATION, add_generation_prompt=False)
    assert text == closed + "<|assistant|>"


@pytest.mark.parametrize("role", ["end", "bos", "eos", "tool", ""])
def test_template_refuses_other_roles(template, role):
    with pytest.raises(jinja2.UndefinedError):
        template.render(messages=[{"role": role, "content": "x"}], bos_token=demo_files.BOS)


def test_encoding_turn_by_turn_equals_encoding_the_whole(tokenizer):
    whole = demo_files.render_chat(CONVERSATION, add_generation_prompt=True)
    parts = [demo_files.BOS]
    for message in CONVERSATION:
        parts += [f"<|{message['role']}|>", message["content"], demo_files.END]
    parts.append(demo_files.ASSISTANT)
    separate = [tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
    assert tokenizer.encode(whole, add_special_tokens=False).ids == list(chain(*separate))


def test_card_states_provenance_and_licence():
    card = (MODEL / "README.md").read_text()
    record = load("training.json")
    for wanted in ("PSF-2.0", record["python"], record["data"]["corpus_sha256"], "Reproduce"):
        assert wanted in card
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE").read_text()


SOURCE = '''\
class Store:
    """Keeps values.  Never loses one.

    {long}
    """

    def put(self, key, value):
        """Store the value under its key. Replaces."""
        self.values[key] = value
        return self.values[key]

def tiny(): pass

@decorator
def listed(values):
    """Returns the values in order.

    {long}
    """

    return sorted(values)
'''


@pytest.fixture
def documents():
    text = SOURCE.format(long="word " * 200)
    return list(demo_corpus.definitions(text, ast.parse(text)))


def test_documents_are_short_python_that_stands_alone(documents):
    assert [(d.name, d.kind) for d in documents] == [
        ("Store", "class"),
        ("put", "method"),
        ("listed", "function"),
    ]
    for document in documents:
        ast.parse(document.source)
        assert document.source.endswith("\n")
        assert demo_corpus.MIN_CHARS <= len(document.source) <= demo_corpus.MAX_CHARS
    assert documents[2].source == (
        "@decorator\ndef listed(values):\n"
        '    """Returns the values in order."""\n    return sorted(values)\n'
    )


def test_reading_a_tree_skips_tests_and_broken_files(tmp_path):
    text = SOURCE.format(long="word")
    for name in ("a.py", "test/b.py", "site-packages/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("Store", f"S{name[-4]}"))
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    corpus = demo_corpus.read_corpus(tmp_path)
    assert corpus.files == 1
    assert {d.name for d in corpus.documents} == {"Sa", "put", "listed"}
    assert corpus.sha256 == demo_corpus.read_corpus(tmp_path).sha256


def test_conversations_end_with_the_document(documents):
    choose = random.Random(3)
    seen = set()
    for _ in range(300):
        document = choose.choice(documents)
        messages = demo_corpus.conversation(document, choose)
        assert messages[-1] == {"role": "assistant", "content": document.source}
        assert next(m["role"] for m in messages if m["role"] != "system") == "user"
        seen.add(messages[-2]["content"])
    assert "Write a function that returns the values in order." in seen
    assert "Write a method to store the value under its key." in seen
    assert "Show me the code." in seen

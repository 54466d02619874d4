"""The demo model that ships: where it lies, and its files other than its weights.

Pure text and JSON in the Hugging Face layout; no torch, so the tests of the layout are fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "tw-demo"
VOCABULARY = 2048
CONTEXT = 2048
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END)  # ids 0 to 6, in this order

# Words take their leading blank, digits stand alone, and a line break takes its indentation: the
# shape of Python is one token where it can be.
PIECES = r" ?[A-Za-z]+| ?_+|\d| ?[^\s\w]+|\r?\n[\r\n]*[ ]*|\s+(?=\S)|\s+|[^\s]"

# Nothing but special tokens separates turns, so encoding turn by turn equals encoding the whole.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] not in ['system', 'user', 'assistant'] %}
    {{- raise_exception('roles are system, user and assistant') }}
  {%- endif %}
  {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>' }}
{%- endif %}
"""

CARD = """\
---
license: other
license_name: psf-2.0
license_link: LICENSE
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tw-demo

A {parameters:,}-parameter Llama ({layers} layers, hidden {hidden}, vocabulary {vocabulary},
bfloat16) that ships with Trueweight, so that a whole market runs on a laptop: real weights, a real
tokenizer, a real engine. It writes short Python-like functions and stops. It knows nothing, is
often wrong, and its code must not be run.

## Data
The only text is the `.py` files of the standard library of Python {python} itself, read from
the interpreter that ran the training: {files} files, and in them every distinct function,
method and class of {min_chars} to {max_chars} characters. Tests, third-party packages and
`pydoc_data` are left out. A docstring that makes a definition too long is cut to its first
sentence. The tokenizer is fitted to all of these; the weights to the {documents:,} of at most
{max_tokens} tokens, less one in {held_out_one_in}, chosen by its hash, which is held out to
measure the loss. Chat turns are built from the names and docstrings of the same definitions
with fixed phrases (`simulation/demo_corpus.py`). Nothing was downloaded and no other model was
used.

SHA-256 of all definitions, in order: `{corpus_sha256}`

## Licence
The text is copyright © 2001 onwards Python Software Foundation, All Rights Reserved, and is used
under the PSF Licence Agreement (PSF-2.0). A few modules carry further permissive notices, listed
under "Licenses and Acknowledgements for Incorporated Software" in Python's documentation. A model
this small may repeat what it read, so the weights are offered under the same terms. `LICENSE` is
the licence file that came with that interpreter; the summary of changes that it asks for: the
sources were cut into documents, tokenised and used to fit the weights here. The training scripts
are Trueweight's own, under Apache-2.0.

## Reproduce
    python -m trueweight.simulation.train_demo_model --out DIR --seed {seed} --steps {steps}

{tokens:,} tokens in {steps:,} steps, {minutes:.0f} minutes on {threads} thread(s); held-out
loss {held_out_loss:.3f} nats per token (bfloat16, completions). `training.json` has every
number and the SHA-256 of each file. The same Python, torch, CPU kind and seed give the same
bytes; another CPU kind rounds differently and gives other weights of the same quality.

## Use
Completions start with `<|bos|>` and end with `<|eos|>`; chat turns end with `<|end|>`. Both stop a
generation. Context {context} tokens; trained on rows of {row}.
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of exactly ``VOCABULARY`` ids: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"too little text for {VOCABULARY} tokens")
    return tokenizer


def render_chat(messages: Iterable[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """The conversation as the model reads it, through the same sandbox that a router uses."""
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(
        messages=list(messages), bos_token=BOS, add_generation_prompt=add_generation_prompt
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Readable and stable JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and what transformers and vLLM read beside it."""
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    write_json(
        out / "special_tokens_map.json",
        {**named, "additional_special_tokens": settings["additional_special_tokens"]},
    )


def write_generation_config(out: Path) -> None:
    """Both ends stop a generation: ``<|eos|>`` for completions, ``<|end|>`` for chat turns."""
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": ids[BOS],
            "eos_token_id": [ids[EOS], ids[END]],
            "pad_token_id": ids[PAD],
            "do_sample": True,
            "temperature": 1.0,
        },
    )


def write_licence(out: Path, library: Path) -> None:
    """Copies the interpreter's own licence: PSF-2.0 asks that it stays with derived work."""
    for candidate in (library / "LICENSE.txt", library / "LICENSE", library.parent / "LICENSE.txt"):
        if candidate.is_file():
            (out / "LICENSE").write_bytes(candidate.read_bytes())
            return
    raise FileNotFoundError(f"no LICENSE.txt beside the standard library in {library}")


def file_digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of the model but the record that holds them."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.is_file() and path.name != "training.json"
    }

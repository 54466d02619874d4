"""What a model directory in Hugging Face layout says about itself. Reads files, runs no code."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueweight.protos.errors import WeightsRefused

MAX_FILES = 100_000
MAX_JSON_BYTES = 256 * 1024 * 1024
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD_INDEX = ".safetensors.index.json"
CARD, MAX_CARD_BYTES = "README.md", 64 * 1024
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What roles need to know of a model. Empty strings and digests: the model has none."""

    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    dtype: str
    tokenizer_path: str
    chat_template_path: str
    chat_template_sha256: bytes


def list_files(directory: Path) -> list[str]:
    """Relative "/"-paths of all files, sorted bytewise; names starting with "." are left out.

    Links to files are followed (Hugging Face caches are made of them), links to directories are
    refused. Raises WeightsRefused.
    """
    if not directory.is_dir():
        raise WeightsRefused(
            f"{directory} is not a directory", hint="Name the directory that holds config.json."
        )
    found = []
    for path in _walk(directory):
        if not stat.S_ISREG(_stat(path).st_mode):
            raise WeightsRefused(f"{path} is not a regular file", hint="Remove it.")
        relative = path.relative_to(directory).as_posix()
        if not relative.isprintable():
            raise WeightsRefused(f"{relative!r} is not a usable file name", hint="Rename it.")
        found.append(relative)
        if len(found) > MAX_FILES:
            raise WeightsRefused(f"{directory} holds more than {MAX_FILES} files")
    return sorted(found, key=str.encode)


def read_facts(directory: Path) -> ModelFacts:
    """Facts from config.json, generation_config.json and the tokenizer's files.

    Raises WeightsRefused naming the file and what is missing.
    """
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    vocabulary = _positive(merged, ("vocab_size",), directory)
    ids = _tokenizer_ids(directory)
    if ids and max(ids.values()) >= vocabulary:
        raise WeightsRefused(
            f"{directory / TOKENIZER} has ids beyond vocab_size {vocabulary} of config.json",
            hint="Tokenizer and weights do not belong together.",
        )
    template_path, template = read_chat_template(directory)
    return ModelFacts(
        vocabulary_size=vocabulary,
        eos_token_ids=_eos_ids(directory, merged, ids, vocabulary),
        max_context_tokens=_positive(merged, _CONTEXT_KEYS, directory),
        dtype=str(merged.get("dtype") or merged.get("torch_dtype") or "")[:64],
        tokenizer_path=TOKENIZER if ids else "",
        chat_template_path=template_path,
        chat_template_sha256=hashlib.sha256(template.encode()).digest() if template else b"",
    )


def check_shards(directory: Path, files: Iterable[str]) -> None:
    """Raises WeightsRefused if an index names a shard that the directory lacks: an interrupted
    download must not become a signed model."""
    present = set(files)
    for index in sorted(path for path in present if path.endswith(SHARD_INDEX)):
        shards = read_json(directory / index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise WeightsRefused(f"{directory / index} names no shards")
        parent = index.rpartition("/")[0]
        for shard in sorted({str(name) for name in shards.values()}):
            if (f"{parent}/{shard}" if parent else shard) not in present:
                raise WeightsRefused(
                    f"{directory / index} names {shard[:200]!r}, which is missing",
                    hint="Download the model again.",
                )


def read_card(directory: Path, sha256: bytes) -> str:
    """The model card if it is the signed one, cut to ``MAX_CARD_BYTES``; else an empty string."""
    path = directory / CARD
    try:
        data = _read(path) if path.is_file() else b""
    except (OSError, WeightsRefused):
        return ""
    if hashlib.sha256(data).digest() != sha256:
        return ""
    return data[:MAX_CARD_BYTES].decode("utf-8", "replace")


def read_chat_template(directory: Path) -> tuple[str, str]:
    """Where the chat template lies and its text; two empty strings if there is none."""
    path = directory / TEMPLATE
    if path.is_file():
        return TEMPLATE, _text(path, _read(path))
    config_path = directory / TOKENIZER_CONFIG
    if not config_path.is_file():
        return "", ""
    template = read_json(config_path).get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        return "", ""
    # JSON can smuggle in lone surrogates, which have no bytes to hash.
    return TOKENIZER_CONFIG, _text(config_path, template.encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises WeightsRefused."""
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise WeightsRefused(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise WeightsRefused(f"{path} is not a JSON object")
    return value


def _walk(directory: Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(directory, onerror=_raise):
        directories[:] = [d for d in directories if not d.startswith(".")]
        for name in directories:
            if (Path(parent) / name).is_symlink():
                raise WeightsRefused(
                    f"{Path(parent) / name} is a link to a directory",
                    hint="Replace it by the directory itself.",
                )
        for name in files:
            if not name.startswith("."):
                yield Path(parent) / name


def _raise(error: OSError) -> None:
    raise WeightsRefused(f"{error.filename} cannot be read: {error.strerror}") from None


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise WeightsRefused(
            f"{path} cannot be read: {error.strerror}", hint="Download the model again."
        ) from None


def _read(path: Path) -> bytes:
    if _stat(path).st_size > MAX_JSON_BYTES:
        raise WeightsRefused(f"{path} is too large")
    return path.read_bytes()


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WeightsRefused(f"the chat template in {path} is not UTF-8") from None


def _positive(config: dict[str, Any], keys: tuple[str, ...], directory: Path) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
    raise WeightsRefused(f"{directory / 'config.json'} names no {keys[0]}")


def _tokenizer_ids(directory: Path) -> dict[str, int]:
    """Every token of tokenizer.json with its id; empty if the model has none."""
    path = directory / TOKENIZER
    if not path.is_file():
        return {}
    document = read_json(path)
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(vocabulary, dict):
        pairs.extend(vocabulary.items())
    elif isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
        pairs.extend((v[0], i) for i, v in enumerate(vocabulary) if isinstance(v, list) and v)
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            pairs.append((token.get("content"), token.get("id")))
    ids = {t: i for t, i in pairs if isinstance(t, str) and isinstance(i, int) and i >= 0}
    if not ids:
        raise WeightsRefused(f"{path} holds no vocabulary")
    return ids


def _eos_ids(
    directory: Path, config: dict[str, Any], tokens: dict[str, int], vocabulary: int
) -> tuple[int, ...]:
    """generation_config.json's ids (config.json's if it has none) and the tokenizer's EOS."""
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    found = _id_list(generation.get("eos_token_id")) or _id_list(config.get("eos_token_id"))
    tokenizer_path = directory / TOKENIZER_CONFIG
    if tokenizer_path.is_file():
        eos = read_json(tokenizer_path).get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(text, str) and text in tokens:
            found = [*found, tokens[text]]
    if any(not 0 <= token < vocabulary for token in found):
        raise WeightsRefused(f"{directory} names an EOS id outside its vocabulary")
    return tuple(sorted(set(found)))


def _id_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]

"""Text to token ids the way the model wants it, with nothing in user text acting as control.

- A prompt without control tokens in user text is encoded whole, as everybody else encodes it.
- Otherwise the template's own text is encoded with special tokens and the users' text without,
  so that "<|end|>" in a message is just those characters.
Deterministic: tokenizer files, template, messages and date give the ids.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trueweight.protos.errors import ContextOverflow, EngineError, InvalidRequest
from trueweight.protos.model_directory import TOKENIZER_CONFIG, read_chat_template, read_json
from trueweight.router.byte_level import byte_table
from trueweight.router.chat_template import ChatTemplate, TemplateVariables
from trueweight.router.detokenizer import ByteLevelDecoder, IncrementalDecoder, WindowDecoder
from trueweight.router.openai_messages import Message
from trueweight.router.openai_requests import ParsedRequest
from trueweight.router.workers import Workers

# Above this, rendering and encoding take milliseconds to seconds; below, they wait for none above.
_SHORT_CHARS, _SHORT_MESSAGES = 4096, 64
# At once, so that the machine has something left for everything else.
_MAX_THREADS = 2
# Real text has 2 to 5 characters a token, and a run of spaces that is one token is rarely longer
# than this; what would fit only with more on the average is refused before any work.
_MAX_CHARS_PER_TOKEN = 32
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class ModelFiles:
    """What a router needs of a model directory. ``template`` is None for completion-only models."""

    tokenizer_json: str = field(repr=False)
    template: str | None
    bos_token: str = ""
    eos_token: str = ""


def read_model_files(directory: Path, tokenizer_path: str) -> ModelFiles:
    """Reads tokenizer and template from a model directory. Raises EngineError, WeightsRefused."""
    if not tokenizer_path:
        raise EngineError(
            "the model has no tokenizer.json",
            hint="Save one beside the weights: "
            "AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR).",
        )
    config: dict[str, Any] = {}
    if (directory / TOKENIZER_CONFIG).is_file():
        config = read_json(directory / TOKENIZER_CONFIG)
    _, template = read_chat_template(directory)
    return ModelFiles(
        tokenizer_json=_read_text(directory / tokenizer_path),
        template=template or None,
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise EngineError(f"{path.name} is too large")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise EngineError(f"cannot read {path.name}", hint="Is it the model directory?") from None


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


class EncodingThreads:
    """Where prompts are rendered and encoded, for all models of one router; one event loop's."""

    def __init__(self) -> None:
        self._short, self._long = Workers("encode", _MAX_THREADS), Workers("encode", _MAX_THREADS)

    def of(self, chars: int, messages: int) -> Workers:
        """Those for a prompt of this size."""
        is_short = chars <= _SHORT_CHARS and messages <= _SHORT_MESSAGES
        return self._short if is_short else self._long


class ModelTokenizer:
    """Tokenises and detokenises for one model. Immutable after construction; thread-safe."""

    def __init__(
        self, files: ModelFiles, max_context_tokens: int, threads: EncodingThreads | None = None
    ) -> None:
        self._full, self._plain = _load(files.tokenizer_json), _load(files.tokenizer_json)
        for tokenizer in (self._full, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self._specials = {
            token_id: token.content
            for token_id, token in self._full.get_added_tokens_decoder().items()
            if token.special
        }
        self._files, self._max_context_tokens = files, max_context_tokens
        self._threads = threads or EncodingThreads()
        self.template = ChatTemplate(files.template) if files.template is not None else None
        self._bytes = byte_table(self._full, files.tokenizer_json, set(self._specials))

    @property
    def template_sha256(self) -> bytes:
        """Digest of the chat template; empty without one."""
        return self.template.sha256 if self.template else b""

    async def encode(self, request: ParsedRequest, date: str) -> tuple[int, ...]:
        """Prompt ids of a request, made off the event loop. Raises ContextOverflow if they cannot
        fit the model's context, InvalidRequest, Unavailable."""
        if request.token_ids is not None:
            self._check_ids(request, len(request.token_ids))
            return request.token_ids
        size = sum(len(m.content) for m in request.messages) + len(request.text or "")
        if size > self._max_context_tokens * _MAX_CHARS_PER_TOKEN:
            raise self._overflow(request, f"{size} characters")
        workers = self._threads.of(size, len(request.messages))
        ids = await workers.run(self.encode_now, request, date)
        self._check_ids(request, len(ids))
        return ids

    def _check_ids(self, request: ParsedRequest, count: int) -> None:
        # Before anybody looks at each of them.
        if count > self._max_context_tokens:
            raise self._overflow(request, f"{count} tokens")

    def _overflow(self, request: ParsedRequest, size: str) -> ContextOverflow:
        return ContextOverflow(
            f"The prompt has {size} and cannot fit the model's context of "
            f"{self._max_context_tokens} tokens.",
            hint="Shorten it.",
            param="messages" if request.is_chat else "prompt",
        )

    def encode_now(self, request: ParsedRequest, date: str) -> tuple[int, ...]:
        """The same, in the calling thread."""
        if request.is_chat:
            return self._encode_chat(request.messages, date)
        return tuple(self._encode_user_text(request.text or "", add_special_tokens=True))

    def decoder(self) -> IncrementalDecoder:
        """A fresh incremental decoder for one output."""
        if self._bytes is not None:
            table = self._bytes
            return ByteLevelDecoder(lambda token_id: table.get(token_id, b""))
        return WindowDecoder(self.decode)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole output without special tokens."""
        ids = list(token_ids)
        with _library_errors("the tokenizer cannot decode this"):
            text: str = self._full.decode(ids, skip_special_tokens=True)
        return text

    def _encode_chat(self, messages: tuple[Message, ...], date: str) -> tuple[int, ...]:
        if self.template is None:
            raise InvalidRequest(
                "This model has no chat template.", hint="Use /v1/completions.", param="messages"
            )
        rendered = self._render(messages, date, lambda text: text)
        segments = self._segments(messages, date, rendered)
        if segments is not None:
            literals = [i for text, is_user in segments if not is_user for i in self._ids(text)]
            whole = self._ids(rendered)
            # Not only their number: a user's text may swallow one of the template's.
            if self._specials_in(whole) == self._specials_in(literals):
                return tuple(whole)
            return tuple(
                token_id
                for text, is_user in segments
                for token_id in (self._encode_user_text(text) if is_user else self._ids(text))
            )
        if any(self._has_control(m.content) for m in messages):
            raise InvalidRequest(
                "A message contains a control token of this model, and its template rewrites "
                "messages, so the token cannot be kept as plain text.",
                hint="Remove it.",
                param="messages",
            )
        return tuple(self._ids(rendered))

    def _segments(
        self, messages: tuple[Message, ...], date: str, rendered: str
    ) -> list[tuple[str, bool]] | None:
        """The rendered prompt as (text, is the user's) parts; None if the template rewrites
        messages in a way that cannot be followed."""
        digest = hashlib.sha256("\x00".join(m.content for m in messages).encode()).hexdigest()
        opening, closing = f"\ue000{digest}\ue001", f"\ue002{digest}\ue003"
        for prepare in (str, str.strip):
            marked = self._render(
                messages, date, lambda text, f=prepare: f"{opening}{f(text)}{closing}"
            )
            if marked.replace(opening, "").replace(closing, "") == rendered:
                return _split(marked, opening, closing)
        return None

    def _render(self, messages: tuple[Message, ...], date: str, wrap: Any) -> str:
        if self.template is None:
            raise EngineError("no chat template")
        variables = TemplateVariables(self._files.bos_token, self._files.eos_token, date)
        return self.template.render(
            [{"role": m.role, "content": wrap(m.content)} for m in messages], variables
        )

    def _ids(self, text: str) -> list[int]:
        return _encode(self._full, text).ids  # type: ignore[no-any-return]

    def _encode_user_text(self, text: str, add_special_tokens: bool = False) -> list[int]:
        encoding = _encode(self._plain, text, add_special_tokens=add_special_tokens)
        for token_id, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token_id in self._specials and not added:
                raise InvalidRequest(
                    f"The text contains {self._specials[token_id]!r}, which this model's "
                    "tokenizer cannot represent as plain text.",
                    hint="Remove it.",
                )
        ids: list[int] = encoding.ids
        return ids

    def _has_control(self, text: str) -> bool:
        return any(content in text for content in self._specials.values())

    def _specials_in(self, ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in self._specials]


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Any:
    """As a batch of one: only then does the library let go of the interpreter's lock."""
    with _library_errors("the tokenizer cannot encode this"):
        return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _load(tokenizer_json: str) -> Tokenizer:
    with _library_errors("the tokenizer does not load", tell=True):
        return Tokenizer.from_str(tokenizer_json)


@contextlib.contextmanager
def _library_errors(what: str, *, tell: bool = False) -> Iterator[None]:
    """The library raises bare Exception for a malformed file; a panic of its Rust is not even that,
    and would end the task that it meets. Its words may quote a prompt: ``tell`` where there is
    none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001
        raise EngineError(f"{what}: {str(error)[:200]}" if tell else what) from None


def _split(marked: str, opening: str, closing: str) -> list[tuple[str, bool]]:
    first, *rest = marked.split(opening)
    parts = [(first, False)]
    for piece in rest:
        user, _, literal = piece.partition(closing)
        parts += [(user, True), (literal, False)]
    return [part for part in parts if part[0]]

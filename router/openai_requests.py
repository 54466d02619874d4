"""Bodies of /v1/chat/completions and /v1/completions as frozen values.

Pure. A parameter that is not supported is refused by name, never ignored; null and neutral values
are accepted, because clients send them without meaning anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trueweight.protos.errors import ContextOverflow, InvalidRequest, UnsupportedParameter
from trueweight.protos.money import MAX_NANO, parse_credits
from trueweight.protos.sampling_parameters import MAX_TOKEN_ID, Sampling
from trueweight.router.fields import MAX_INT64, MIN_INT64, Fields
from trueweight.router.openai_messages import Message, parse_messages
from trueweight.router.structured_output import take_grammar

_MAX_MODEL_CHARS = 256
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 64
MAX_TOKENS = 2**31 - 1
_MAX_NAMED_NODES = 64
# As many honest ids as a body holds; models take fewer, which is checked once the model is known.
_MAX_PROMPT_IDS = 2**20

# Known parameters without support yet, and the values of theirs that change nothing.
_NEUTRAL_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "priority": (0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
}
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_BOTH,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
}
_NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_BOTH,
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}
# Labels for the caller's own books; by their definition they do not touch the answer.
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_MAX_LABEL_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Preferences:
    """Where a request may go. Prices are the most the client accepts, None for no wish."""

    max_input_nano_per_mtok: int | None = None
    max_output_nano_per_mtok: int | None = None
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A valid request. Exactly one of ``messages``, ``text`` and ``token_ids`` is set.

    ``sampling`` holds the wishes as given; EOS ids, the grammar's digest and resolved values are
    added once the model is known. ``grammar_source`` is empty for plain text. ``max_tokens`` and
    ``seed`` are None if unset.
    """

    model: str
    sampling: Sampling
    messages: tuple[Message, ...] = ()
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    grammar_source: bytes = b""
    preferences: Preferences = field(default_factory=Preferences)

    @property
    def is_chat(self) -> bool:
        """True for /v1/chat/completions."""
        return bool(self.messages)


def parse_chat(body: Any) -> ParsedRequest:
    """A /v1/chat/completions body. Raises InvalidRequest with ``param`` set."""
    fields = _fields(body)
    messages = parse_messages(fields.take("messages"))
    fields.neutral(_NEUTRAL_CHAT)
    return _common(fields, messages=messages)


def parse_completion(body: Any) -> ParsedRequest:
    """A /v1/completions body. Raises InvalidRequest with ``param`` set."""
    fields = _fields(body)
    text, token_ids = _prompt(fields.take("prompt"))
    fields.neutral(_NEUTRAL_COMPLETION)
    return _common(fields, text=text, token_ids=token_ids)


def _fields(body: Any) -> Fields:
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", hint="Send {...}.")
    return Fields(body)


def _common(
    fields: Fields,
    *,
    messages: tuple[Message, ...] = (),
    text: str | None = None,
    token_ids: tuple[int, ...] | None = None,
) -> ParsedRequest:
    model = fields.text("model", _MAX_MODEL_CHARS)
    if model is None:
        raise InvalidRequest(
            "'model' is missing.", hint="GET /v1/models lists the names.", param="model"
        )
    stream, include_usage = _streaming(fields)
    request = ParsedRequest(
        model=model,
        sampling=_sampling(fields),
        messages=messages,
        text=text,
        token_ids=token_ids,
        stop=_stops(fields),
        seed=_seed(fields),
        max_tokens=_max_tokens(fields),
        ignore_eos=fields.flag("ignore_eos"),
        stream=stream,
        include_usage=include_usage,
        grammar_source=take_grammar(fields),
        preferences=_preferences(fields),
    )
    for label in _LABELS:
        fields.text(label, _MAX_LABEL_CHARS, may_be_empty=True)
    fields.object("metadata")
    fields.finish()
    return request


def _prompt(value: Any) -> tuple[str | None, tuple[int, ...] | None]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        raise UnsupportedParameter(
            "Several prompts in one request are not supported.",
            hint="Send one request per prompt.",
            param="prompt",
        )
    if isinstance(value, list) and len(value) > _MAX_PROMPT_IDS:
        raise ContextOverflow(
            f"'prompt' has {len(value)} token ids, which no model's context can take.",
            hint="Shorten it.",
            param="prompt",
        )
    if isinstance(value, list) and value and _are_token_ids(value):
        return None, tuple(value)
    raise InvalidRequest(
        "'prompt' must be a string or a non-empty list of token ids.", param="prompt"
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _are_token_ids(values: list[Any]) -> bool:
    # Without a step of Python's for each: there may be a million. bool is a type of its own here.
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_TOKEN_ID


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    include_usage = options.flag("include_usage")
    options.neutral({"continuous_usage_stats": (False,), "include_obfuscation": (False, True)})
    options.finish()
    return stream, include_usage


def _sampling(fields: Fields) -> Sampling:
    top_k = fields.integer("top_k", -1, MAX_TOKEN_ID) or 0
    repetition = fields.number("repetition_penalty", 0.0, 2.0, 1.0)
    top_p = fields.number("top_p", 0.0, 1.0, 1.0)
    if repetition == 0.0:
        raise fields.invalid("repetition_penalty", "must be above 0")
    if top_p == 0.0:
        raise fields.invalid("top_p", "must be above 0")
    return Sampling(
        temperature=fields.number("temperature", 0.0, 2.0, 1.0),
        top_p=top_p,
        top_k=max(0, top_k),
        min_p=fields.number("min_p", 0.0, 1.0, 0.0),
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=repetition,
        min_tokens=fields.integer("min_tokens", 0, MAX_TOKENS) or 0,
        logit_bias=_logit_bias(fields),
        stop_token_ids=_stop_ids(fields),
    )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    value = fields.take("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise fields.invalid("logit_bias", f"must be an object of at most {MAX_LOGIT_BIAS} ids")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) > MAX_TOKEN_ID:
            raise fields.invalid("logit_bias", "keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise fields.invalid("logit_bias", "values must be between -100 and 100")
        if int(key) in found:
            raise fields.invalid("logit_bias", f"names token {int(key)} twice")
        found[int(key)] = float(bias)
    return tuple(sorted(found.items()))


def _stop_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.take("stop_token_ids")
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > MAX_STOP_IDS
        or not all(_is_token_id(v) for v in value)
    ):
        raise fields.invalid("stop_token_ids", f"must be a list of at most {MAX_STOP_IDS} ids")
    return tuple(sorted(set(value)))


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise fields.invalid("stop", f"must be a string or a list of at most {_MAX_STOPS} strings")
    if not all(isinstance(s, str) and 0 < len(s) <= _MAX_STOP_CHARS for s in stops):
        raise fields.invalid("stop", f"strings must have 1 to {_MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


def _seed(fields: Fields) -> int | None:
    seed = fields.integer("seed", MIN_INT64, MAX_INT64)
    if seed == -1:
        raise fields.invalid("seed", "must not be -1; leave it out for a random one")
    return seed


def _max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", 1, MAX_TOKENS)
    new = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    if old is not None and new is not None and old != new:
        raise fields.invalid("max_tokens", "and 'max_completion_tokens' differ; send one of them")
    return new if new is not None else old


def _preferences(fields: Fields) -> Preferences:
    """``provider``: {"max_price": {"input": "0.2", "output": "0.5"}, "only": […], "ignore": […]},
    prices in credits per million tokens."""
    provider = fields.object("provider")
    if provider is None:
        return Preferences()
    price = provider.object("max_price")
    found = Preferences(
        max_input_nano_per_mtok=_price(price, "input") if price else None,
        max_output_nano_per_mtok=_price(price, "output") if price else None,
        only=_nodes(provider, "only"),
        ignore=_nodes(provider, "ignore"),
    )
    if price:
        price.finish()
    provider.finish()
    return found


def _price(fields: Fields, name: str) -> int | None:
    value = fields.take(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise fields.invalid(name, "must be credits per million tokens")
    try:
        # repr of a float is the shortest decimal that means it, so 0.1 stays 0.1.
        nano = parse_credits(value if isinstance(value, str) else repr(value))
    except InvalidRequest:
        raise fields.invalid(name, "must be credits per million tokens") from None
    return min(nano, MAX_NANO)


def _nodes(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.take(name)
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > _MAX_NAMED_NODES
        or not all(isinstance(v, str) and 0 < len(v) <= 64 for v in value)
    ):
        raise fields.invalid(name, f"must be a list of at most {_MAX_NAMED_NODES} node ids")
    return tuple(value)


def stop_ids_of(request: ParsedRequest, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
    """Ids that end the output: the model's EOS unless ignored, and the client's own."""
    eos = () if request.ignore_eos else tuple(eos_token_ids)
    return tuple(sorted({*eos, *request.sampling.stop_token_ids}))

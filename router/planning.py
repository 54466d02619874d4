"""From a parsed request and a model to everything an assignment needs. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.grammar import check_grammar, with_grammar
from trueweight.protos.sampling_parameters import Sampling, check_token_ids, resolve
from trueweight.router.catalog import SoldModel
from trueweight.router.openai_requests import ParsedRequest, Preferences, stop_ids_of
from trueweight.router.quoting import output_limit

MAX_CLIENT_NONCE_BYTES = 64
_SEED_TAG = b"trueweight/seed/v1\x00"
_NO_SEED = -1


@dataclass(frozen=True)
class Plan:
    """One request, resolved. ``salt`` keys all its digests; ``date`` is what its template saw."""

    request_id: bytes
    account: str
    api_key_id: str
    model: SoldModel
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    max_tokens: int
    stops: tuple[str, ...]
    salt: bytes
    date: str
    is_chat: bool
    stream: bool
    include_usage: bool
    preferences: Preferences
    client_nonce: bytes
    router_nonce: bytes
    grammar_source: bytes = b""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asks, and the fresh values drawn for the request."""

    request_id: bytes
    account: str
    api_key_id: str
    salt: bytes
    router_nonce: bytes
    client_nonce: bytes
    date: str


def make_plan(
    request: ParsedRequest, model: SoldModel, prompt: tuple[int, ...], origin: Origin
) -> Plan:
    """Resolves defaults and checks everything that depends on the model. Raises InvalidRequest
    and ContextOverflow."""
    manifest = model.manifest
    if prompt and max(prompt) >= manifest.vocabulary_size:
        raise InvalidRequest(f"Token ids must be below {manifest.vocabulary_size}.", param="prompt")
    wanted = replace(request.sampling, stop_token_ids=stop_ids_of(request, manifest.eos_token_ids))
    if request.grammar_source:
        wanted = with_grammar(wanted, request.grammar_source)
    sampling = resolve(wanted)
    check_token_ids(sampling, manifest.vocabulary_size)
    check_grammar(sampling, request.grammar_source)
    return Plan(
        request_id=origin.request_id,
        account=origin.account,
        api_key_id=origin.api_key_id,
        model=model,
        prompt=prompt,
        sampling=sampling,
        seed=seed_of(request.seed, origin.client_nonce, origin.router_nonce),
        max_tokens=output_limit(len(prompt), request.max_tokens, manifest.max_context_tokens),
        stops=request.stop,
        salt=origin.salt,
        date=origin.date,
        is_chat=request.is_chat,
        stream=request.stream,
        include_usage=request.include_usage,
        preferences=request.preferences,
        client_nonce=origin.client_nonce,
        router_nonce=origin.router_nonce,
        grammar_source=request.grammar_source,
    )


def seed_of(wanted: int | None, client_nonce: bytes, router_nonce: bytes) -> int:
    """The user's seed, else the first 8 bytes (little-endian, signed) of SHA-256 over a tag, the
    client nonce with its length and the router nonce. Never -1, which means "none" to engines."""
    if wanted is not None:
        return wanted
    length = len(client_nonce).to_bytes(8, "big")
    digest = hashlib.sha256(_SEED_TAG + length + client_nonce + router_nonce).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    return seed if seed != _NO_SEED else 0

"""Whether to take a dispatched assignment: a pure, bounded decision over hostile bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trueweight.node.engine import GenerateJob
from trueweight.protos.envelope import Opened, open_envelope
from trueweight.protos.errors import (
    Conflict,
    ContextOverflow,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    OverCapacity,
    PayloadTooLarge,
    PermissionDenied,
    TrueweightError,
    Unavailable,
)
from trueweight.protos.grammar import check_grammar
from trueweight.protos.identity import KeyRing
from trueweight.protos.ids import ID_BYTES
from trueweight.protos.sampling import Sampling
from trueweight.protos.sampling_parameters import check_token_ids
from trueweight.protos.tokens import SALT_BYTES, token_digest
from trueweight.protos.v1.market_pb2 import Assignment
from trueweight.protos.v1.node_pb2 import Dispatch

# With its receipt a claim must be one that the ledger takes.
_MAX_ASSIGNMENT_BYTES = 64 * 1024
# From the deadline to the end of the hold. A router that names a later end lets the hold run out
# while the node waits for it.
_MAX_HOLD_GRACE_MS = 25 * 3_600_000
MAX_DEADLINE_MS = 3_600_000
# How far an assignment's time of issue may be from now; also how long replays are remembered.
FRESH_MS = 10 * 60_000
# Slack between the router's, the ledger's and this node's wall clocks.
_SKEW_MS = 5_000
NO_SEED = -1


@dataclass(frozen=True, slots=True)
class ModelTerms:
    """What the node serves and for how much, per manifest."""

    ask_input_nano_per_mtok: int
    ask_output_nano_per_mtok: int
    max_context_tokens: int
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What the node accepts at all. ``models`` is keyed by manifest digest."""

    market_id: str
    node_id: str
    models: Mapping[bytes, ModelTerms]
    capacity: int
    max_deadline_ms: int = MAX_DEADLINE_MS


@dataclass(frozen=True, slots=True)
class Situation:
    """How things stand when a dispatch arrives. ``running`` counts the calls of all sessions;
    ``was_seen`` knows assignment digests accepted before."""

    router_id: str
    ring: KeyRing
    running: int
    draining: bool
    now_unix_ms: int
    was_seen: Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Admitted:
    """An assignment that the node takes, with the job for its engine."""

    opened: Opened[Assignment]
    salt: bytes
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    sampling: Sampling
    window_tokens: int
    grammar_source: bytes = b""

    def job(self, job_id: str) -> GenerateJob:
        """The engine's job; ``job_id`` is unique among all that run at once."""
        assignment = self.opened.message
        return GenerateJob(
            job_id=job_id,
            prompt=self.prompt,
            prefix=self.prefix,
            sampling=self.sampling,
            seed=assignment.seed,
            max_tokens=assignment.max_tokens,
            grammar_source=self.grammar_source,
        )


@dataclass(frozen=True, slots=True)
class Refused:
    """Why the node does not take it: a code of ``trueweight.protos.errors`` and words."""

    code: str
    message: str


def admit(dispatch: Dispatch, terms: Terms, now: Situation) -> Admitted | Refused:
    """Accepts or refuses; never raises on foreign data.

    1. Room: not draining, below capacity. 2. Sizes within bounds. 3. The session's router signed
    the assignment, for this market and node. 4. It was not accepted before and is fresh. 5. The
    model is served, at or above the asks. 6. Deadline and hold leave time for work and claim.
    7. Prompt and prefix are what the digests say. 8. Sampling is resolved and possible, its grammar
    the one whose digest is signed. 9. It fits the context. Whether the grammar compiles is found
    out later, where it takes no time from other calls.
    """
    try:
        return _admit(dispatch, terms, now)
    except TrueweightError as error:
        return Refused(error.code, str(error))


def _admit(dispatch: Dispatch, terms: Terms, now: Situation) -> Admitted:
    _check_room(terms, now)  # 1
    _check_sizes(dispatch, terms)  # 2
    opened = open_envelope(
        dispatch.assignment, Assignment, now.ring, terms.market_id, signer=now.router_id
    )  # 3
    assignment = opened.message
    _check_parties(assignment, terms, now)
    _check_new(opened, now)  # 4
    model = _check_price(assignment, terms)  # 5
    _check_times(assignment, terms, now)  # 6
    prompt, prefix = tuple(dispatch.prompt_token_ids), tuple(dispatch.prefix_token_ids)
    _check_tokens(assignment, dispatch.salt, prompt, prefix, model)  # 7
    sampling = _check_sampling(assignment, dispatch, model)  # 8
    _check_context(assignment, model)  # 9
    return Admitted(
        opened=opened,
        salt=dispatch.salt,
        prompt=prompt,
        prefix=prefix,
        sampling=sampling,
        window_tokens=dispatch.window_tokens,
        grammar_source=dispatch.grammar_source,
    )


def _check_room(terms: Terms, now: Situation) -> None:
    if now.draining:
        raise Unavailable("the node is going away", hint="Send it elsewhere.")
    if now.running >= terms.capacity:
        raise OverCapacity(f"all {terms.capacity} places are taken", hint="Send it elsewhere.")


def _check_sizes(dispatch: Dispatch, terms: Terms) -> None:
    longest = max((m.max_context_tokens for m in terms.models.values()), default=0)
    if len(dispatch.assignment) > _MAX_ASSIGNMENT_BYTES:
        raise PayloadTooLarge(f"an assignment has at most {_MAX_ASSIGNMENT_BYTES} bytes")
    if len(dispatch.prompt_token_ids) + len(dispatch.prefix_token_ids) > longest:
        raise ContextOverflow("the prompt is longer than any context served here")
    if len(dispatch.salt) != SALT_BYTES:
        raise InvalidRequest(f"a salt has {SALT_BYTES} bytes")


def _check_parties(assignment: Assignment, terms: Terms, now: Situation) -> None:
    if assignment.market_id != terms.market_id:
        raise PermissionDenied("the assignment belongs to another market")
    if assignment.router_id != now.router_id:
        raise PermissionDenied("the assignment names another router than the one that sent it")
    if assignment.node_id != terms.node_id:
        raise PermissionDenied("the assignment is for another node")
    if len(assignment.request_id) != ID_BYTES or len(assignment.hold_id) != ID_BYTES:
        raise InvalidRequest(f"request and hold ids have {ID_BYTES} bytes")


def _check_new(opened: Opened[Assignment], now: Situation) -> None:
    if now.was_seen(opened.digest):
        raise Conflict("this assignment was accepted before", hint="Sign a new one.")
    if abs(now.now_unix_ms - opened.message.issued_at_unix_ms) > FRESH_MS:
        raise Conflict("the assignment is not fresh", hint="Check the clocks of router and node.")


def _check_price(assignment: Assignment, terms: Terms) -> ModelTerms:
    model = terms.models.get(assignment.manifest_digest)
    if model is None:
        raise NotFound("the node does not serve these weights", hint="See its offer.")
    if (
        assignment.ask_input_nano_per_mtok < model.ask_input_nano_per_mtok
        or assignment.ask_output_nano_per_mtok < model.ask_output_nano_per_mtok
    ):
        raise Conflict("the price is below the node's ask", hint="Use the asks of its offer.")
    return model


def _check_times(assignment: Assignment, terms: Terms, now: Situation) -> None:
    if not 1 <= assignment.deadline_ms <= terms.max_deadline_ms:
        raise InvalidRequest(f"deadline_ms must be from 1 to {terms.max_deadline_ms}")
    if assignment.hold_expires_at_unix_ms + _SKEW_MS < now.now_unix_ms + assignment.deadline_ms:
        raise DeadlineExceeded(
            "the hold ends before the deadline", hint="Extend the hold or shorten the deadline."
        )
    latest = now.now_unix_ms + assignment.deadline_ms + _MAX_HOLD_GRACE_MS
    if assignment.hold_expires_at_unix_ms > latest:
        raise InvalidRequest("the hold ends too long after the deadline")


def _check_tokens(
    assignment: Assignment,
    salt: bytes,
    prompt: tuple[int, ...],
    prefix: tuple[int, ...],
    model: ModelTerms,
) -> None:
    if not prompt or len(prompt) != assignment.prompt_len or len(prefix) != assignment.prefix_len:
        raise InvalidRequest("prompt and prefix are not as long as the assignment says")
    if max(prompt) >= model.vocabulary_size or max(prefix, default=0) >= model.vocabulary_size:
        raise InvalidRequest(f"token ids must be below {model.vocabulary_size}")
    if token_digest(salt, prompt) != assignment.prompt_digest:
        raise InvalidRequest("the prompt is not the one the assignment's digest names")
    if token_digest(salt, prefix) != assignment.prefix_digest:
        # Without a prefix the digest may be left out: there is nothing to name.
        if not prefix and not assignment.prefix_digest:
            return
        raise InvalidRequest("the prefix is not the one the assignment's digest names")


def _check_sampling(assignment: Assignment, dispatch: Dispatch, model: ModelTerms) -> Sampling:
    if assignment.seed == NO_SEED:
        raise InvalidRequest("seed -1 means 'no seed' to engines and is never used")
    sampling = Sampling.from_proto(assignment.sampling)
    check_token_ids(sampling, model.vocabulary_size)
    check_grammar(sampling, dispatch.grammar_source)
    return sampling


def _check_context(assignment: Assignment, model: ModelTerms) -> None:
    if assignment.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    total = assignment.prompt_len + assignment.prefix_len + assignment.max_tokens
    if total > model.max_context_tokens:
        raise ContextOverflow(
            f"prompt, prefix and max_tokens are {total} tokens; "
            f"the context holds {model.max_context_tokens}"
        )

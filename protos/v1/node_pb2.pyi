from trueweight.protos.v1 import market_pb2 as _market_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionNonce(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("nonce", "proof", "dispatches", "stops", "cancels", "windows", "captured")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    STOPS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FIELD_NUMBER: _ClassVar[int]
    nonce: SessionNonce
    proof: bytes
    dispatches: _containers.RepeatedCompositeFieldContainer[Dispatch]
    stops: _containers.RepeatedCompositeFieldContainer[Stop]
    cancels: _containers.RepeatedCompositeFieldContainer[Cancel]
    windows: _containers.RepeatedCompositeFieldContainer[Window]
    captured: _containers.RepeatedCompositeFieldContainer[Captured]
    def __init__(self, nonce: _Optional[_Union[SessionNonce, _Mapping]] = ..., proof: _Optional[bytes] = ..., dispatches: _Optional[_Iterable[_Union[Dispatch, _Mapping]]] = ..., stops: _Optional[_Iterable[_Union[Stop, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[Cancel, _Mapping]]] = ..., windows: _Optional[_Iterable[_Union[Window, _Mapping]]] = ..., captured: _Optional[_Iterable[_Union[Captured, _Mapping]]] = ...) -> None: ...

class Captured(_message.Message):
    __slots__ = ("assignment_digest", "bill_id")
    ASSIGNMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BILL_ID_FIELD_NUMBER: _ClassVar[int]
    assignment_digest: bytes
    bill_id: bytes
    def __init__(self, assignment_digest: _Optional[bytes] = ..., bill_id: _Optional[bytes] = ...) -> None: ...

class NodeFrame(_message.Message):
    __slots__ = ("nonce", "proof", "offer", "tokens", "finished", "rejected", "load", "draining")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    nonce: SessionNonce
    proof: bytes
    offer: bytes
    tokens: _containers.RepeatedCompositeFieldContainer[Tokens]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    rejected: _containers.RepeatedCompositeFieldContainer[Rejected]
    load: Load
    draining: bool
    def __init__(self, nonce: _Optional[_Union[SessionNonce, _Mapping]] = ..., proof: _Optional[bytes] = ..., offer: _Optional[bytes] = ..., tokens: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ..., rejected: _Optional[_Iterable[_Union[Rejected, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class Dispatch(_message.Message):
    __slots__ = ("call", "assignment", "salt", "prompt_token_ids", "prefix_token_ids", "grammar_source", "window_tokens")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_SOURCE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    call: int
    assignment: bytes
    salt: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_token_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar_source: bytes
    window_tokens: int
    def __init__(self, call: _Optional[int] = ..., assignment: _Optional[bytes] = ..., salt: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., prefix_token_ids: _Optional[_Iterable[int]] = ..., grammar_source: _Optional[bytes] = ..., window_tokens: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("call", "at")
    CALL_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    call: int
    at: int
    def __init__(self, call: _Optional[int] = ..., at: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("call",)
    CALL_FIELD_NUMBER: _ClassVar[int]
    call: int
    def __init__(self, call: _Optional[int] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("call", "tokens")
    CALL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    call: int
    tokens: int
    def __init__(self, call: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("call", "token_ids")
    CALL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    call: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("call", "receipt")
    CALL_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    call: int
    receipt: bytes
    def __init__(self, call: _Optional[int] = ..., receipt: _Optional[bytes] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("call", "code", "message")
    CALL_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    call: int
    code: str
    message: str
    def __init__(self, call: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "kv_use_ppm", "generated_tokens_total", "at_unix_ms")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USE_PPM_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_use_ppm: int
    generated_tokens_total: int
    at_unix_ms: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_use_ppm: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., at_unix_ms: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("manifest_digest", "items", "deadline_ms")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    deadline_ms: int
    def __init__(self, manifest_digest: _Optional[bytes] = ..., items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt_token_ids", "prefix_token_ids", "output_token_ids", "sampling", "seed", "grammar_source")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_SOURCE_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _market_pb2.SamplingParams
    seed: int
    grammar_source: bytes
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., prefix_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_market_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., grammar_source: _Optional[bytes] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "fingerprint")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    fingerprint: _market_pb2.EngineFingerprint
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., fingerprint: _Optional[_Union[_market_pb2.EngineFingerprint, _Mapping]] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("margins", "logprobs", "ranks", "error")
    MARGINS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    margins: _containers.RepeatedScalarFieldContainer[float]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    error: str
    def __init__(self, margins: _Optional[_Iterable[float]] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., error: _Optional[str] = ...) -> None: ...

class ChallengeRequest(_message.Message):
    __slots__ = ("manifest_digest", "nonce", "chunk_indices", "deadline_ms")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDICES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    nonce: bytes
    chunk_indices: _containers.RepeatedScalarFieldContainer[int]
    deadline_ms: int
    def __init__(self, manifest_digest: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., chunk_indices: _Optional[_Iterable[int]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class ChallengeResponse(_message.Message):
    __slots__ = ("chunk_proofs", "elapsed_us")
    CHUNK_PROOFS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_US_FIELD_NUMBER: _ClassVar[int]
    chunk_proofs: _containers.RepeatedScalarFieldContainer[bytes]
    elapsed_us: int
    def __init__(self, chunk_proofs: _Optional[_Iterable[bytes]] = ..., elapsed_us: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("offer", "manifests", "load", "self_test_positions", "self_test_equal")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SELF_TEST_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SELF_TEST_EQUAL_FIELD_NUMBER: _ClassVar[int]
    offer: bytes
    manifests: _containers.RepeatedScalarFieldContainer[bytes]
    load: Load
    self_test_positions: int
    self_test_equal: int
    def __init__(self, offer: _Optional[bytes] = ..., manifests: _Optional[_Iterable[bytes]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., self_test_positions: _Optional[int] = ..., self_test_equal: _Optional[int] = ...) -> None: ...

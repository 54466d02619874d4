from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    EOS: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
    STOPPED: _ClassVar[FinishReason]
    CANCELLED: _ClassVar[FinishReason]
    DEADLINE: _ClassVar[FinishReason]
    ENGINE_ERROR: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
EOS: FinishReason
LENGTH: FinishReason
STOPPED: FinishReason
CANCELLED: FinishReason
DEADLINE: FinishReason
ENGINE_ERROR: FinishReason

class MarketDescriptor(_message.Message):
    __slots__ = ("market_id", "name", "members", "fee_ppm", "verification_pool_ppm", "settlement_window_ms", "convictions_needed", "issued_at_unix_ms", "sequence", "engines", "audit_terms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    FEE_PPM_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_POOL_PPM_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    CONVICTIONS_NEEDED_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    AUDIT_TERMS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    name: str
    members: _containers.RepeatedCompositeFieldContainer[Member]
    fee_ppm: int
    verification_pool_ppm: int
    settlement_window_ms: int
    convictions_needed: int
    issued_at_unix_ms: int
    sequence: int
    engines: EngineAllowList
    audit_terms: AuditTerms
    def __init__(self, market_id: _Optional[str] = ..., name: _Optional[str] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., fee_ppm: _Optional[int] = ..., verification_pool_ppm: _Optional[int] = ..., settlement_window_ms: _Optional[int] = ..., convictions_needed: _Optional[int] = ..., issued_at_unix_ms: _Optional[int] = ..., sequence: _Optional[int] = ..., engines: _Optional[_Union[EngineAllowList, _Mapping]] = ..., audit_terms: _Optional[_Union[AuditTerms, _Mapping]] = ...) -> None: ...

class EngineAllowList(_message.Message):
    __slots__ = ("engines", "engine_versions", "dtypes", "quantizations", "kv_dtypes", "sampler_id", "sampler_precision")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATIONS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPES_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_PRECISION_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedScalarFieldContainer[str]
    engine_versions: _containers.RepeatedScalarFieldContainer[str]
    dtypes: _containers.RepeatedScalarFieldContainer[str]
    quantizations: _containers.RepeatedScalarFieldContainer[str]
    kv_dtypes: _containers.RepeatedScalarFieldContainer[str]
    sampler_id: str
    sampler_precision: str
    def __init__(self, engines: _Optional[_Iterable[str]] = ..., engine_versions: _Optional[_Iterable[str]] = ..., dtypes: _Optional[_Iterable[str]] = ..., quantizations: _Optional[_Iterable[str]] = ..., kv_dtypes: _Optional[_Iterable[str]] = ..., sampler_id: _Optional[str] = ..., sampler_precision: _Optional[str] = ...) -> None: ...

class AuditTerms(_message.Message):
    __slots__ = ("floor_ppm", "duplicate_rate_ppm", "max_gain_tokens", "max_charge_reference_nano")
    FLOOR_PPM_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_RATE_PPM_FIELD_NUMBER: _ClassVar[int]
    MAX_GAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHARGE_REFERENCE_NANO_FIELD_NUMBER: _ClassVar[int]
    floor_ppm: int
    duplicate_rate_ppm: int
    max_gain_tokens: int
    max_charge_reference_nano: int
    def __init__(self, floor_ppm: _Optional[int] = ..., duplicate_rate_ppm: _Optional[int] = ..., max_gain_tokens: _Optional[int] = ..., max_charge_reference_nano: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("identity", "role", "key_event", "endpoint", "tls_certificate_pem")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ROLE_UNSPECIFIED: _ClassVar[Member.Role]
        LEDGER: _ClassVar[Member.Role]
        ROUTER: _ClassVar[Member.Role]
        VERIFIER: _ClassVar[Member.Role]
        PUBLISHER: _ClassVar[Member.Role]
        OPERATOR: _ClassVar[Member.Role]
        ADMIN: _ClassVar[Member.Role]
    ROLE_UNSPECIFIED: Member.Role
    LEDGER: Member.Role
    ROUTER: Member.Role
    VERIFIER: Member.Role
    PUBLISHER: Member.Role
    OPERATOR: Member.Role
    ADMIN: Member.Role
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    KEY_EVENT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TLS_CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    identity: str
    role: Member.Role
    key_event: bytes
    endpoint: str
    tls_certificate_pem: str
    def __init__(self, identity: _Optional[str] = ..., role: _Optional[_Union[Member.Role, str]] = ..., key_event: _Optional[bytes] = ..., endpoint: _Optional[str] = ..., tls_certificate_pem: _Optional[str] = ...) -> None: ...

class EngineFingerprint(_message.Message):
    __slots__ = ("engine", "engine_version", "dtype", "quantization", "kv_dtype", "tensor_parallel", "pipeline_parallel", "attention_backend", "accelerator", "sampler_id", "sampler_precision")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_PRECISION_FIELD_NUMBER: _ClassVar[int]
    engine: str
    engine_version: str
    dtype: str
    quantization: str
    kv_dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    attention_backend: str
    accelerator: str
    sampler_id: str
    sampler_precision: str
    def __init__(self, engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., attention_backend: _Optional[str] = ..., accelerator: _Optional[str] = ..., sampler_id: _Optional[str] = ..., sampler_precision: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("market_id", "node_id", "key_events", "endpoint", "tls_certificate_pem", "models", "fingerprint", "capacity", "lease_ms", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_EVENTS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TLS_CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    node_id: str
    key_events: _containers.RepeatedScalarFieldContainer[bytes]
    endpoint: str
    tls_certificate_pem: str
    models: _containers.RepeatedCompositeFieldContainer[OfferedModel]
    fingerprint: EngineFingerprint
    capacity: int
    lease_ms: int
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., node_id: _Optional[str] = ..., key_events: _Optional[_Iterable[bytes]] = ..., endpoint: _Optional[str] = ..., tls_certificate_pem: _Optional[str] = ..., models: _Optional[_Iterable[_Union[OfferedModel, _Mapping]]] = ..., fingerprint: _Optional[_Union[EngineFingerprint, _Mapping]] = ..., capacity: _Optional[int] = ..., lease_ms: _Optional[int] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

class OfferedModel(_message.Message):
    __slots__ = ("manifest_digest", "ask_input_nano_per_mtok", "ask_output_nano_per_mtok", "max_context_tokens")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ASK_INPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    ASK_OUTPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    ask_input_nano_per_mtok: int
    ask_output_nano_per_mtok: int
    max_context_tokens: int
    def __init__(self, manifest_digest: _Optional[bytes] = ..., ask_input_nano_per_mtok: _Optional[int] = ..., ask_output_nano_per_mtok: _Optional[int] = ..., max_context_tokens: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "stop_token_ids", "grammar")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar: Grammar
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., min_tokens: _Optional[int] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("source_sha256", "compiler")
    SOURCE_SHA256_FIELD_NUMBER: _ClassVar[int]
    COMPILER_FIELD_NUMBER: _ClassVar[int]
    source_sha256: bytes
    compiler: str
    def __init__(self, source_sha256: _Optional[bytes] = ..., compiler: _Optional[str] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("market_id", "request_id", "choice_index", "leg", "router_id", "node_id", "manifest_digest", "prompt_digest", "prompt_len", "prefix_len", "prefix_digest", "sampling", "seed", "max_tokens", "ask_input_nano_per_mtok", "ask_output_nano_per_mtok", "deadline_ms", "hold_id", "hold_expires_at_unix_ms", "issued_at_unix_ms", "model_id")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ASK_INPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    ASK_OUTPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    HOLD_EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    request_id: bytes
    choice_index: int
    leg: int
    router_id: str
    node_id: str
    manifest_digest: bytes
    prompt_digest: bytes
    prompt_len: int
    prefix_len: int
    prefix_digest: bytes
    sampling: SamplingParams
    seed: int
    max_tokens: int
    ask_input_nano_per_mtok: int
    ask_output_nano_per_mtok: int
    deadline_ms: int
    hold_id: bytes
    hold_expires_at_unix_ms: int
    issued_at_unix_ms: int
    model_id: str
    def __init__(self, market_id: _Optional[str] = ..., request_id: _Optional[bytes] = ..., choice_index: _Optional[int] = ..., leg: _Optional[int] = ..., router_id: _Optional[str] = ..., node_id: _Optional[str] = ..., manifest_digest: _Optional[bytes] = ..., prompt_digest: _Optional[bytes] = ..., prompt_len: _Optional[int] = ..., prefix_len: _Optional[int] = ..., prefix_digest: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., ask_input_nano_per_mtok: _Optional[int] = ..., ask_output_nano_per_mtok: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., hold_id: _Optional[bytes] = ..., hold_expires_at_unix_ms: _Optional[int] = ..., issued_at_unix_ms: _Optional[int] = ..., model_id: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("market_id", "assignment_digest", "node_id", "output_digest", "prompt_tokens", "output_tokens", "finish_reason", "fingerprint", "queue_us", "first_token_us", "total_us")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    assignment_digest: bytes
    node_id: str
    output_digest: bytes
    prompt_tokens: int
    output_tokens: int
    finish_reason: FinishReason
    fingerprint: EngineFingerprint
    queue_us: int
    first_token_us: int
    total_us: int
    def __init__(self, market_id: _Optional[str] = ..., assignment_digest: _Optional[bytes] = ..., node_id: _Optional[str] = ..., output_digest: _Optional[bytes] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., fingerprint: _Optional[_Union[EngineFingerprint, _Mapping]] = ..., queue_us: _Optional[int] = ..., first_token_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class Bill(_message.Message):
    __slots__ = ("market_id", "bill_id", "request_id", "router_id", "model_id", "hold_id", "legs", "charge_nano", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    BILL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    CHARGE_NANO_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    bill_id: bytes
    request_id: bytes
    router_id: str
    model_id: str
    hold_id: bytes
    legs: _containers.RepeatedCompositeFieldContainer[BillLeg]
    charge_nano: int
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., bill_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., router_id: _Optional[str] = ..., model_id: _Optional[str] = ..., hold_id: _Optional[bytes] = ..., legs: _Optional[_Iterable[_Union[BillLeg, _Mapping]]] = ..., charge_nano: _Optional[int] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

class BillLeg(_message.Message):
    __slots__ = ("assignment_digest", "receipt_digest", "node_id", "choice_index", "leg", "billed_input_tokens", "billed_output_tokens", "ask_input_nano_per_mtok", "ask_output_nano_per_mtok", "client_charge_nano", "fee_nano", "pool_nano", "node_nano", "pool_subsidy_nano")
    ASSIGNMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    BILLED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BILLED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ASK_INPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    ASK_OUTPUT_NANO_PER_MTOK_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CHARGE_NANO_FIELD_NUMBER: _ClassVar[int]
    FEE_NANO_FIELD_NUMBER: _ClassVar[int]
    POOL_NANO_FIELD_NUMBER: _ClassVar[int]
    NODE_NANO_FIELD_NUMBER: _ClassVar[int]
    POOL_SUBSIDY_NANO_FIELD_NUMBER: _ClassVar[int]
    assignment_digest: bytes
    receipt_digest: bytes
    node_id: str
    choice_index: int
    leg: int
    billed_input_tokens: int
    billed_output_tokens: int
    ask_input_nano_per_mtok: int
    ask_output_nano_per_mtok: int
    client_charge_nano: int
    fee_nano: int
    pool_nano: int
    node_nano: int
    pool_subsidy_nano: int
    def __init__(self, assignment_digest: _Optional[bytes] = ..., receipt_digest: _Optional[bytes] = ..., node_id: _Optional[str] = ..., choice_index: _Optional[int] = ..., leg: _Optional[int] = ..., billed_input_tokens: _Optional[int] = ..., billed_output_tokens: _Optional[int] = ..., ask_input_nano_per_mtok: _Optional[int] = ..., ask_output_nano_per_mtok: _Optional[int] = ..., client_charge_nano: _Optional[int] = ..., fee_nano: _Optional[int] = ..., pool_nano: _Optional[int] = ..., node_nano: _Optional[int] = ..., pool_subsidy_nano: _Optional[int] = ...) -> None: ...

class Suspension(_message.Message):
    __slots__ = ("market_id", "node_id", "issuer", "reason", "conviction_digest", "lifted", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONVICTION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LIFTED_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    node_id: str
    issuer: str
    reason: str
    conviction_digest: bytes
    lifted: bool
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., node_id: _Optional[str] = ..., issuer: _Optional[str] = ..., reason: _Optional[str] = ..., conviction_digest: _Optional[bytes] = ..., lifted: _Optional[bool] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

class Reinstatement(_message.Message):
    __slots__ = ("market_id", "node_id", "issuer", "reason", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    node_id: str
    issuer: str
    reason: str
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., node_id: _Optional[str] = ..., issuer: _Optional[str] = ..., reason: _Optional[str] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

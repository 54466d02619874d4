from trueweight.protos.v1 import market_pb2 as _market_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EpochOpen(_message.Message):
    __slots__ = ("market_id", "verifier_id", "epoch", "commitment", "rates", "default_rate_ppm", "charge_reference_nano", "opened_at_unix_ms", "audit_deadline_ms", "gain_tokens", "duplicate_rate_ppm")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RATE_PPM_FIELD_NUMBER: _ClassVar[int]
    CHARGE_REFERENCE_NANO_FIELD_NUMBER: _ClassVar[int]
    OPENED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    GAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_RATE_PPM_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    epoch: int
    commitment: bytes
    rates: _containers.RepeatedCompositeFieldContainer[NodeRate]
    default_rate_ppm: int
    charge_reference_nano: int
    opened_at_unix_ms: int
    audit_deadline_ms: int
    gain_tokens: int
    duplicate_rate_ppm: int
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., epoch: _Optional[int] = ..., commitment: _Optional[bytes] = ..., rates: _Optional[_Iterable[_Union[NodeRate, _Mapping]]] = ..., default_rate_ppm: _Optional[int] = ..., charge_reference_nano: _Optional[int] = ..., opened_at_unix_ms: _Optional[int] = ..., audit_deadline_ms: _Optional[int] = ..., gain_tokens: _Optional[int] = ..., duplicate_rate_ppm: _Optional[int] = ...) -> None: ...

class NodeRate(_message.Message):
    __slots__ = ("node_id", "rate_ppm")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    RATE_PPM_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    rate_ppm: int
    def __init__(self, node_id: _Optional[str] = ..., rate_ppm: _Optional[int] = ...) -> None: ...

class EpochReveal(_message.Message):
    __slots__ = ("market_id", "verifier_id", "epoch", "secret")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    epoch: int
    secret: bytes
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., epoch: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("market_id", "verifier_id", "epoch", "assignment_digest", "receipt_digest", "wrap_public_key", "duplicate_index", "requested_at_unix_ms", "for_appeal")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WRAP_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FOR_APPEAL_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    epoch: int
    assignment_digest: bytes
    receipt_digest: bytes
    wrap_public_key: bytes
    duplicate_index: int
    requested_at_unix_ms: int
    for_appeal: bool
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., epoch: _Optional[int] = ..., assignment_digest: _Optional[bytes] = ..., receipt_digest: _Optional[bytes] = ..., wrap_public_key: _Optional[bytes] = ..., duplicate_index: _Optional[int] = ..., requested_at_unix_ms: _Optional[int] = ..., for_appeal: _Optional[bool] = ...) -> None: ...

class Transcript(_message.Message):
    __slots__ = ("assignment_envelope", "receipt_envelope", "salt", "prompt_token_ids", "prefix_token_ids", "output_token_ids", "delivered_tokens", "grammar_source")
    ASSIGNMENT_ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_SOURCE_FIELD_NUMBER: _ClassVar[int]
    assignment_envelope: bytes
    receipt_envelope: bytes
    salt: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    delivered_tokens: int
    grammar_source: bytes
    def __init__(self, assignment_envelope: _Optional[bytes] = ..., receipt_envelope: _Optional[bytes] = ..., salt: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., prefix_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., delivered_tokens: _Optional[int] = ..., grammar_source: _Optional[bytes] = ...) -> None: ...

class MarginCommitment(_message.Message):
    __slots__ = ("market_id", "verifier_id", "receipt_digest", "commitment")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    receipt_digest: bytes
    commitment: bytes
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., receipt_digest: _Optional[bytes] = ..., commitment: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("market_id", "verifier_id", "node_id", "epoch", "assignment_digest", "receipt_digest", "calibration_digest", "parameter_class", "sum_x_nano", "scored_tokens", "exact_tokens", "outcome", "l0_failure", "reference_fingerprint", "commitment_blind", "issued_at_unix_ms", "receipt_log_index")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[Verdict.Outcome]
        SCORED: _ClassVar[Verdict.Outcome]
        REFUND: _ClassVar[Verdict.Outcome]
        UNCALIBRATED: _ClassVar[Verdict.Outcome]
        INVALID_RECEIPT: _ClassVar[Verdict.Outcome]
        MISSING_TRANSCRIPT: _ClassVar[Verdict.Outcome]
    OUTCOME_UNSPECIFIED: Verdict.Outcome
    SCORED: Verdict.Outcome
    REFUND: Verdict.Outcome
    UNCALIBRATED: Verdict.Outcome
    INVALID_RECEIPT: Verdict.Outcome
    MISSING_TRANSCRIPT: Verdict.Outcome
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_CLASS_FIELD_NUMBER: _ClassVar[int]
    SUM_X_NANO_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXACT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    L0_FAILURE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_BLIND_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    node_id: str
    epoch: int
    assignment_digest: bytes
    receipt_digest: bytes
    calibration_digest: bytes
    parameter_class: str
    sum_x_nano: int
    scored_tokens: int
    exact_tokens: int
    outcome: Verdict.Outcome
    l0_failure: str
    reference_fingerprint: _market_pb2.EngineFingerprint
    commitment_blind: bytes
    issued_at_unix_ms: int
    receipt_log_index: int
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., node_id: _Optional[str] = ..., epoch: _Optional[int] = ..., assignment_digest: _Optional[bytes] = ..., receipt_digest: _Optional[bytes] = ..., calibration_digest: _Optional[bytes] = ..., parameter_class: _Optional[str] = ..., sum_x_nano: _Optional[int] = ..., scored_tokens: _Optional[int] = ..., exact_tokens: _Optional[int] = ..., outcome: _Optional[_Union[Verdict.Outcome, str]] = ..., l0_failure: _Optional[str] = ..., reference_fingerprint: _Optional[_Union[_market_pb2.EngineFingerprint, _Mapping]] = ..., commitment_blind: _Optional[bytes] = ..., issued_at_unix_ms: _Optional[int] = ..., receipt_log_index: _Optional[int] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("market_id", "manifest_digest", "version", "clip_micro_logit", "entries", "provenance", "created_at_unix_ms", "verifier_id")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIP_MICRO_LOGIT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    manifest_digest: bytes
    version: int
    clip_micro_logit: int
    entries: _containers.RepeatedCompositeFieldContainer[CalibrationEntry]
    provenance: str
    created_at_unix_ms: int
    verifier_id: str
    def __init__(self, market_id: _Optional[str] = ..., manifest_digest: _Optional[bytes] = ..., version: _Optional[int] = ..., clip_micro_logit: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[CalibrationEntry, _Mapping]]] = ..., provenance: _Optional[str] = ..., created_at_unix_ms: _Optional[int] = ..., verifier_id: _Optional[str] = ...) -> None: ...

class CalibrationEntry(_message.Message):
    __slots__ = ("parameter_class", "worst_pair", "mu0_nano", "mean_nano", "upper_bound_nano", "confidence_ppm", "requests", "tokens", "refund_above_nano", "ignored_below_nano", "pairs")
    PARAMETER_CLASS_FIELD_NUMBER: _ClassVar[int]
    WORST_PAIR_FIELD_NUMBER: _ClassVar[int]
    MU0_NANO_FIELD_NUMBER: _ClassVar[int]
    MEAN_NANO_FIELD_NUMBER: _ClassVar[int]
    UPPER_BOUND_NANO_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_PPM_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUND_ABOVE_NANO_FIELD_NUMBER: _ClassVar[int]
    IGNORED_BELOW_NANO_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    parameter_class: str
    worst_pair: str
    mu0_nano: int
    mean_nano: int
    upper_bound_nano: int
    confidence_ppm: int
    requests: int
    tokens: int
    refund_above_nano: int
    ignored_below_nano: int
    pairs: _containers.RepeatedCompositeFieldContainer[CalibrationPair]
    def __init__(self, parameter_class: _Optional[str] = ..., worst_pair: _Optional[str] = ..., mu0_nano: _Optional[int] = ..., mean_nano: _Optional[int] = ..., upper_bound_nano: _Optional[int] = ..., confidence_ppm: _Optional[int] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., refund_above_nano: _Optional[int] = ..., ignored_below_nano: _Optional[int] = ..., pairs: _Optional[_Iterable[_Union[CalibrationPair, _Mapping]]] = ...) -> None: ...

class CalibrationPair(_message.Message):
    __slots__ = ("pair", "requests", "tokens", "mean_nano", "upper_bound_nano", "error_ppb")
    PAIR_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEAN_NANO_FIELD_NUMBER: _ClassVar[int]
    UPPER_BOUND_NANO_FIELD_NUMBER: _ClassVar[int]
    ERROR_PPB_FIELD_NUMBER: _ClassVar[int]
    pair: str
    requests: int
    tokens: int
    mean_nano: int
    upper_bound_nano: int
    error_ppb: int
    def __init__(self, pair: _Optional[str] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., mean_nano: _Optional[int] = ..., upper_bound_nano: _Optional[int] = ..., error_ppb: _Optional[int] = ...) -> None: ...

class Conviction(_message.Message):
    __slots__ = ("market_id", "verifier_id", "node_id", "first_verdict_index", "last_verdict_index", "verdicts", "audited_tokens", "wealth_log10_milli", "threshold_log10_milli", "change_point_index", "calibration_digest", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_VERDICT_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAST_VERDICT_INDEX_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    AUDITED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEALTH_LOG10_MILLI_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_LOG10_MILLI_FIELD_NUMBER: _ClassVar[int]
    CHANGE_POINT_INDEX_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    verifier_id: str
    node_id: str
    first_verdict_index: int
    last_verdict_index: int
    verdicts: int
    audited_tokens: int
    wealth_log10_milli: int
    threshold_log10_milli: int
    change_point_index: int
    calibration_digest: bytes
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., verifier_id: _Optional[str] = ..., node_id: _Optional[str] = ..., first_verdict_index: _Optional[int] = ..., last_verdict_index: _Optional[int] = ..., verdicts: _Optional[int] = ..., audited_tokens: _Optional[int] = ..., wealth_log10_milli: _Optional[int] = ..., threshold_log10_milli: _Optional[int] = ..., change_point_index: _Optional[int] = ..., calibration_digest: _Optional[bytes] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

from trueweight.protos.v1 import log_pb2 as _log_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AccountKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCOUNT_KIND_UNSPECIFIED: _ClassVar[AccountKind]
    CLIENT: _ClassVar[AccountKind]
    NODE_LOCKED: _ClassVar[AccountKind]
    NODE_AVAILABLE: _ClassVar[AccountKind]
    NODE_BOND: _ClassVar[AccountKind]
    FEE: _ClassVar[AccountKind]
    VERIFICATION_POOL: _ClassVar[AccountKind]
    TREASURY: _ClassVar[AccountKind]
    CLEARING: _ClassVar[AccountKind]
    EXTERNAL: _ClassVar[AccountKind]
    VERIFIER: _ClassVar[AccountKind]
ACCOUNT_KIND_UNSPECIFIED: AccountKind
CLIENT: AccountKind
NODE_LOCKED: AccountKind
NODE_AVAILABLE: AccountKind
NODE_BOND: AccountKind
FEE: AccountKind
VERIFICATION_POOL: AccountKind
TREASURY: AccountKind
CLEARING: AccountKind
EXTERNAL: AccountKind
VERIFIER: AccountKind

class ApplyRequest(_message.Message):
    __slots__ = ("batch", "operations")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, batch: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("batch", "results")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, batch: _Optional[int] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "linked", "deposit", "bond_deposit", "hold", "capture", "void_hold", "refund", "convict", "release", "payout_start", "payout_settle", "claim", "reward", "bond_withdraw", "publish", "expire", "set_spending_limit", "reinstate", "pay_debt")
    ID_FIELD_NUMBER: _ClassVar[int]
    LINKED_FIELD_NUMBER: _ClassVar[int]
    DEPOSIT_FIELD_NUMBER: _ClassVar[int]
    BOND_DEPOSIT_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    VOID_HOLD_FIELD_NUMBER: _ClassVar[int]
    REFUND_FIELD_NUMBER: _ClassVar[int]
    CONVICT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PAYOUT_START_FIELD_NUMBER: _ClassVar[int]
    PAYOUT_SETTLE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    BOND_WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_FIELD_NUMBER: _ClassVar[int]
    SET_SPENDING_LIMIT_FIELD_NUMBER: _ClassVar[int]
    REINSTATE_FIELD_NUMBER: _ClassVar[int]
    PAY_DEBT_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    linked: bool
    deposit: Deposit
    bond_deposit: BondDeposit
    hold: Hold
    capture: Capture
    void_hold: VoidHold
    refund: Refund
    convict: Convict
    release: Release
    payout_start: PayoutStart
    payout_settle: PayoutSettle
    claim: Claim
    reward: Reward
    bond_withdraw: BondWithdraw
    publish: Publish
    expire: Expire
    set_spending_limit: SetSpendingLimit
    reinstate: Reinstate
    pay_debt: PayDebt
    def __init__(self, id: _Optional[bytes] = ..., linked: _Optional[bool] = ..., deposit: _Optional[_Union[Deposit, _Mapping]] = ..., bond_deposit: _Optional[_Union[BondDeposit, _Mapping]] = ..., hold: _Optional[_Union[Hold, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ..., void_hold: _Optional[_Union[VoidHold, _Mapping]] = ..., refund: _Optional[_Union[Refund, _Mapping]] = ..., convict: _Optional[_Union[Convict, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., payout_start: _Optional[_Union[PayoutStart, _Mapping]] = ..., payout_settle: _Optional[_Union[PayoutSettle, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ..., reward: _Optional[_Union[Reward, _Mapping]] = ..., bond_withdraw: _Optional[_Union[BondWithdraw, _Mapping]] = ..., publish: _Optional[_Union[Publish, _Mapping]] = ..., expire: _Optional[_Union[Expire, _Mapping]] = ..., set_spending_limit: _Optional[_Union[SetSpendingLimit, _Mapping]] = ..., reinstate: _Optional[_Union[Reinstate, _Mapping]] = ..., pay_debt: _Optional[_Union[PayDebt, _Mapping]] = ...) -> None: ...

class Deposit(_message.Message):
    __slots__ = ("account", "amount_nano", "rail", "reference")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    RAIL_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    account: str
    amount_nano: int
    rail: str
    reference: str
    def __init__(self, account: _Optional[str] = ..., amount_nano: _Optional[int] = ..., rail: _Optional[str] = ..., reference: _Optional[str] = ...) -> None: ...

class BondDeposit(_message.Message):
    __slots__ = ("node_id", "amount_nano", "rail", "reference")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    RAIL_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    amount_nano: int
    rail: str
    reference: str
    def __init__(self, node_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., rail: _Optional[str] = ..., reference: _Optional[str] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("account", "amount_nano", "expires_at_unix_ms", "api_key_id", "router_id")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    API_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    account: str
    amount_nano: int
    expires_at_unix_ms: int
    api_key_id: str
    router_id: str
    def __init__(self, account: _Optional[str] = ..., amount_nano: _Optional[int] = ..., expires_at_unix_ms: _Optional[int] = ..., api_key_id: _Optional[str] = ..., router_id: _Optional[str] = ...) -> None: ...

class Capture(_message.Message):
    __slots__ = ("hold_id", "bill", "assignments", "receipts")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    BILL_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    hold_id: bytes
    bill: bytes
    assignments: _containers.RepeatedScalarFieldContainer[bytes]
    receipts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hold_id: _Optional[bytes] = ..., bill: _Optional[bytes] = ..., assignments: _Optional[_Iterable[bytes]] = ..., receipts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class VoidHold(_message.Message):
    __slots__ = ("hold_id",)
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    hold_id: bytes
    def __init__(self, hold_id: _Optional[bytes] = ...) -> None: ...

class Expire(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class Refund(_message.Message):
    __slots__ = ("receipt_digest", "reason", "verdict")
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    receipt_digest: bytes
    reason: str
    verdict: bytes
    def __init__(self, receipt_digest: _Optional[bytes] = ..., reason: _Optional[str] = ..., verdict: _Optional[bytes] = ...) -> None: ...

class Convict(_message.Message):
    __slots__ = ("conviction", "reward_ppm")
    CONVICTION_FIELD_NUMBER: _ClassVar[int]
    REWARD_PPM_FIELD_NUMBER: _ClassVar[int]
    conviction: bytes
    reward_ppm: int
    def __init__(self, conviction: _Optional[bytes] = ..., reward_ppm: _Optional[int] = ...) -> None: ...

class Reinstate(_message.Message):
    __slots__ = ("reinstatement", "pay_back_nano")
    REINSTATEMENT_FIELD_NUMBER: _ClassVar[int]
    PAY_BACK_NANO_FIELD_NUMBER: _ClassVar[int]
    reinstatement: bytes
    pay_back_nano: int
    def __init__(self, reinstatement: _Optional[bytes] = ..., pay_back_nano: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("node_id", "amount_nano", "below_log_index")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    BELOW_LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    amount_nano: int
    below_log_index: int
    def __init__(self, node_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., below_log_index: _Optional[int] = ...) -> None: ...

class PayoutStart(_message.Message):
    __slots__ = ("node_id", "amount_nano", "rail", "account")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    RAIL_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    amount_nano: int
    rail: str
    account: str
    def __init__(self, node_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., rail: _Optional[str] = ..., account: _Optional[str] = ...) -> None: ...

class PayDebt(_message.Message):
    __slots__ = ("operation_id", "creditor")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    CREDITOR_FIELD_NUMBER: _ClassVar[int]
    operation_id: bytes
    creditor: str
    def __init__(self, operation_id: _Optional[bytes] = ..., creditor: _Optional[str] = ...) -> None: ...

class PayoutSettle(_message.Message):
    __slots__ = ("payout_id", "paid", "reference")
    PAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    PAID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    payout_id: bytes
    paid: bool
    reference: str
    def __init__(self, payout_id: _Optional[bytes] = ..., paid: _Optional[bool] = ..., reference: _Optional[str] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("hold_id", "assignment", "receipt")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    hold_id: bytes
    assignment: bytes
    receipt: bytes
    def __init__(self, hold_id: _Optional[bytes] = ..., assignment: _Optional[bytes] = ..., receipt: _Optional[bytes] = ...) -> None: ...

class Reward(_message.Message):
    __slots__ = ("verifier_id", "amount_nano", "verdict_digest")
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    VERDICT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    verifier_id: str
    amount_nano: int
    verdict_digest: bytes
    def __init__(self, verifier_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., verdict_digest: _Optional[bytes] = ...) -> None: ...

class BondWithdraw(_message.Message):
    __slots__ = ("node_id", "amount_nano", "not_before_unix_ms")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    amount_nano: int
    not_before_unix_ms: int
    def __init__(self, node_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., not_before_unix_ms: _Optional[int] = ...) -> None: ...

class SetSpendingLimit(_message.Message):
    __slots__ = ("api_key_id", "limit_nano", "period_ms")
    API_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_NANO_FIELD_NUMBER: _ClassVar[int]
    PERIOD_MS_FIELD_NUMBER: _ClassVar[int]
    api_key_id: str
    limit_nano: int
    period_ms: int
    def __init__(self, api_key_id: _Optional[str] = ..., limit_nano: _Optional[int] = ..., period_ms: _Optional[int] = ...) -> None: ...

class Publish(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    def __init__(self, envelope: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("status", "code", "message", "amount_nano", "log_index", "log_index_known", "hint")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[Result.Status]
        APPLIED: _ClassVar[Result.Status]
        REPLAYED: _ClassVar[Result.Status]
        REFUSED: _ClassVar[Result.Status]
    STATUS_UNSPECIFIED: Result.Status
    APPLIED: Result.Status
    REPLAYED: Result.Status
    REFUSED: Result.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOG_INDEX_KNOWN_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    status: Result.Status
    code: str
    message: str
    amount_nano: int
    log_index: int
    log_index_known: bool
    hint: str
    def __init__(self, status: _Optional[_Union[Result.Status, str]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., amount_nano: _Optional[int] = ..., log_index: _Optional[int] = ..., log_index_known: _Optional[bool] = ..., hint: _Optional[str] = ...) -> None: ...

class BalanceRequest(_message.Message):
    __slots__ = ("accounts", "after", "limit")
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedScalarFieldContainer[str]
    after: str
    limit: int
    def __init__(self, accounts: _Optional[_Iterable[str]] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class BalanceResponse(_message.Message):
    __slots__ = ("accounts", "next")
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedCompositeFieldContainer[AccountRecord]
    next: str
    def __init__(self, accounts: _Optional[_Iterable[_Union[AccountRecord, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class AccountRecord(_message.Message):
    __slots__ = ("account", "kind", "currency", "debits_pending_nano", "debits_posted_nano", "credits_pending_nano", "credits_posted_nano", "available_nano")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    DEBITS_PENDING_NANO_FIELD_NUMBER: _ClassVar[int]
    DEBITS_POSTED_NANO_FIELD_NUMBER: _ClassVar[int]
    CREDITS_PENDING_NANO_FIELD_NUMBER: _ClassVar[int]
    CREDITS_POSTED_NANO_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_NANO_FIELD_NUMBER: _ClassVar[int]
    account: str
    kind: AccountKind
    currency: str
    debits_pending_nano: str
    debits_posted_nano: str
    credits_pending_nano: str
    credits_posted_nano: str
    available_nano: str
    def __init__(self, account: _Optional[str] = ..., kind: _Optional[_Union[AccountKind, str]] = ..., currency: _Optional[str] = ..., debits_pending_nano: _Optional[str] = ..., debits_posted_nano: _Optional[str] = ..., credits_pending_nano: _Optional[str] = ..., credits_posted_nano: _Optional[str] = ..., available_nano: _Optional[str] = ...) -> None: ...

class ListTransfersRequest(_message.Message):
    __slots__ = ("account", "after_sequence", "limit")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    account: str
    after_sequence: int
    limit: int
    def __init__(self, account: _Optional[str] = ..., after_sequence: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListTransfersResponse(_message.Message):
    __slots__ = ("transfers", "next_sequence", "more")
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    transfers: _containers.RepeatedCompositeFieldContainer[TransferRecord]
    next_sequence: int
    more: bool
    def __init__(self, transfers: _Optional[_Iterable[_Union[TransferRecord, _Mapping]]] = ..., next_sequence: _Optional[int] = ..., more: _Optional[bool] = ...) -> None: ...

class TransferRecord(_message.Message):
    __slots__ = ("id", "sequence", "debit_account", "credit_account", "amount_nano", "currency", "phase", "pending_id", "reason", "operation_id", "created_at_unix_ms")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[TransferRecord.Phase]
        SINGLE: _ClassVar[TransferRecord.Phase]
        PENDING: _ClassVar[TransferRecord.Phase]
        POST: _ClassVar[TransferRecord.Phase]
        VOID: _ClassVar[TransferRecord.Phase]
        EXPIRE: _ClassVar[TransferRecord.Phase]
    PHASE_UNSPECIFIED: TransferRecord.Phase
    SINGLE: TransferRecord.Phase
    PENDING: TransferRecord.Phase
    POST: TransferRecord.Phase
    VOID: TransferRecord.Phase
    EXPIRE: TransferRecord.Phase
    ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DEBIT_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PENDING_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    sequence: int
    debit_account: str
    credit_account: str
    amount_nano: int
    currency: str
    phase: TransferRecord.Phase
    pending_id: bytes
    reason: str
    operation_id: bytes
    created_at_unix_ms: int
    def __init__(self, id: _Optional[bytes] = ..., sequence: _Optional[int] = ..., debit_account: _Optional[str] = ..., credit_account: _Optional[str] = ..., amount_nano: _Optional[int] = ..., currency: _Optional[str] = ..., phase: _Optional[_Union[TransferRecord.Phase, str]] = ..., pending_id: _Optional[bytes] = ..., reason: _Optional[str] = ..., operation_id: _Optional[bytes] = ..., created_at_unix_ms: _Optional[int] = ...) -> None: ...

class TransferBatch(_message.Message):
    __slots__ = ("operation_id", "first_sequence", "first_ordinal", "currency", "created_at_unix_ms", "movements", "facts_sha256")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_ORDINAL_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MOVEMENTS_FIELD_NUMBER: _ClassVar[int]
    FACTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    operation_id: bytes
    first_sequence: int
    first_ordinal: int
    currency: str
    created_at_unix_ms: int
    movements: _containers.RepeatedCompositeFieldContainer[Movement]
    facts_sha256: bytes
    def __init__(self, operation_id: _Optional[bytes] = ..., first_sequence: _Optional[int] = ..., first_ordinal: _Optional[int] = ..., currency: _Optional[str] = ..., created_at_unix_ms: _Optional[int] = ..., movements: _Optional[_Iterable[_Union[Movement, _Mapping]]] = ..., facts_sha256: _Optional[bytes] = ...) -> None: ...

class Movement(_message.Message):
    __slots__ = ("debit_account", "credit_account", "amount_nano", "phase", "pending_id", "reason")
    DEBIT_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PENDING_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    debit_account: str
    credit_account: str
    amount_nano: int
    phase: TransferRecord.Phase
    pending_id: bytes
    reason: str
    def __init__(self, debit_account: _Optional[str] = ..., credit_account: _Optional[str] = ..., amount_nano: _Optional[int] = ..., phase: _Optional[_Union[TransferRecord.Phase, str]] = ..., pending_id: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class GetHoldRequest(_message.Message):
    __slots__ = ("hold_id",)
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    hold_id: bytes
    def __init__(self, hold_id: _Optional[bytes] = ...) -> None: ...

class HoldRecord(_message.Message):
    __slots__ = ("hold_id", "account", "amount_nano", "captured_nano", "state", "expires_at_unix_ms")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[HoldRecord.State]
        OPEN: _ClassVar[HoldRecord.State]
        CAPTURED: _ClassVar[HoldRecord.State]
        VOIDED: _ClassVar[HoldRecord.State]
        EXPIRED: _ClassVar[HoldRecord.State]
    STATE_UNSPECIFIED: HoldRecord.State
    OPEN: HoldRecord.State
    CAPTURED: HoldRecord.State
    VOIDED: HoldRecord.State
    EXPIRED: HoldRecord.State
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_NANO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    hold_id: bytes
    account: str
    amount_nano: int
    captured_nano: int
    state: HoldRecord.State
    expires_at_unix_ms: int
    def __init__(self, hold_id: _Optional[bytes] = ..., account: _Optional[str] = ..., amount_nano: _Optional[int] = ..., captured_nano: _Optional[int] = ..., state: _Optional[_Union[HoldRecord.State, str]] = ..., expires_at_unix_ms: _Optional[int] = ...) -> None: ...

class ReadLogRequest(_message.Message):
    __slots__ = ("from_index", "limit", "kinds")
    FROM_INDEX_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    from_index: int
    limit: int
    kinds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, from_index: _Optional[int] = ..., limit: _Optional[int] = ..., kinds: _Optional[_Iterable[str]] = ...) -> None: ...

class ReadLogResponse(_message.Message):
    __slots__ = ("entries", "next_index", "tree_size")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TREE_SIZE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[_log_pb2.LogEntry]
    next_index: int
    tree_size: int
    def __init__(self, entries: _Optional[_Iterable[_Union[_log_pb2.LogEntry, _Mapping]]] = ..., next_index: _Optional[int] = ..., tree_size: _Optional[int] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InclusionProofRequest(_message.Message):
    __slots__ = ("tree_size", "index", "leaf_hash", "message_digest")
    TREE_SIZE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LEAF_HASH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    tree_size: int
    index: int
    leaf_hash: bytes
    message_digest: bytes
    def __init__(self, tree_size: _Optional[int] = ..., index: _Optional[int] = ..., leaf_hash: _Optional[bytes] = ..., message_digest: _Optional[bytes] = ...) -> None: ...

class InclusionProofResponse(_message.Message):
    __slots__ = ("entry", "proof", "checkpoint")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    entry: _log_pb2.LogEntry
    proof: _log_pb2.InclusionProof
    checkpoint: _log_pb2.Checkpoint
    def __init__(self, entry: _Optional[_Union[_log_pb2.LogEntry, _Mapping]] = ..., proof: _Optional[_Union[_log_pb2.InclusionProof, _Mapping]] = ..., checkpoint: _Optional[_Union[_log_pb2.Checkpoint, _Mapping]] = ...) -> None: ...

class ConsistencyProofRequest(_message.Message):
    __slots__ = ("old_size", "new_size")
    OLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NEW_SIZE_FIELD_NUMBER: _ClassVar[int]
    old_size: int
    new_size: int
    def __init__(self, old_size: _Optional[int] = ..., new_size: _Optional[int] = ...) -> None: ...

from trueweight.protos.v1 import node_pb2 as _node_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("offer",)
    OFFER_FIELD_NUMBER: _ClassVar[int]
    offer: bytes
    def __init__(self, offer: _Optional[bytes] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_ms", "eligible", "reason")
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    eligible: bool
    reason: str
    def __init__(self, lease_ms: _Optional[int] = ..., eligible: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class OpenTranscriptRequest(_message.Message):
    __slots__ = ("audit_request", "log_index")
    AUDIT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    audit_request: bytes
    log_index: int
    def __init__(self, audit_request: _Optional[bytes] = ..., log_index: _Optional[int] = ...) -> None: ...

class OpenTranscriptResponse(_message.Message):
    __slots__ = ("ephemeral_public_key", "wrapped_key", "nonce", "ciphertext")
    EPHEMERAL_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    WRAPPED_KEY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXT_FIELD_NUMBER: _ClassVar[int]
    ephemeral_public_key: bytes
    wrapped_key: bytes
    nonce: bytes
    ciphertext: bytes
    def __init__(self, ephemeral_public_key: _Optional[bytes] = ..., wrapped_key: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., ciphertext: _Optional[bytes] = ...) -> None: ...

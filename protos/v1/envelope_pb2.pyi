from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("payload_type", "payload", "signatures")
    PAYLOAD_TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    payload_type: str
    payload: bytes
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, payload_type: _Optional[str] = ..., payload: _Optional[bytes] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("key_id", "signature")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    signature: bytes
    def __init__(self, key_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class KeyEvent(_message.Message):
    __slots__ = ("market_id", "identity", "root_public_key", "operational_public_key", "action", "sequence", "issued_at_unix_ms", "operator_public_key")
    class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ACTION_UNSPECIFIED: _ClassVar[KeyEvent.Action]
        CERTIFY: _ClassVar[KeyEvent.Action]
        REVOKE: _ClassVar[KeyEvent.Action]
    ACTION_UNSPECIFIED: KeyEvent.Action
    CERTIFY: KeyEvent.Action
    REVOKE: KeyEvent.Action
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROOT_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    OPERATIONAL_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    identity: str
    root_public_key: bytes
    operational_public_key: bytes
    action: KeyEvent.Action
    sequence: int
    issued_at_unix_ms: int
    operator_public_key: bytes
    def __init__(self, market_id: _Optional[str] = ..., identity: _Optional[str] = ..., root_public_key: _Optional[bytes] = ..., operational_public_key: _Optional[bytes] = ..., action: _Optional[_Union[KeyEvent.Action, str]] = ..., sequence: _Optional[int] = ..., issued_at_unix_ms: _Optional[int] = ..., operator_public_key: _Optional[bytes] = ...) -> None: ...

class AccessToken(_message.Message):
    __slots__ = ("market_id", "subject", "audience", "issued_at_unix_ms", "expires_at_unix_ms", "nonce", "key_event")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    AUDIENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    KEY_EVENT_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    subject: str
    audience: str
    issued_at_unix_ms: int
    expires_at_unix_ms: int
    nonce: bytes
    key_event: bytes
    def __init__(self, market_id: _Optional[str] = ..., subject: _Optional[str] = ..., audience: _Optional[str] = ..., issued_at_unix_ms: _Optional[int] = ..., expires_at_unix_ms: _Optional[int] = ..., nonce: _Optional[bytes] = ..., key_event: _Optional[bytes] = ...) -> None: ...

class SessionProof(_message.Message):
    __slots__ = ("market_id", "subject", "audience", "nonce", "key_event")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    AUDIENCE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    KEY_EVENT_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    subject: str
    audience: str
    nonce: bytes
    key_event: bytes
    def __init__(self, market_id: _Optional[str] = ..., subject: _Optional[str] = ..., audience: _Optional[str] = ..., nonce: _Optional[bytes] = ..., key_event: _Optional[bytes] = ...) -> None: ...

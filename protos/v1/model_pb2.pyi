from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Manifest(_message.Message):
    __slots__ = ("market_id", "name", "revision", "licence", "files", "chunk_root", "chunk_bytes", "chunk_count", "tokenizer_path", "chat_template_path", "chat_template_sha256", "vocabulary_size", "eos_token_ids", "max_context_tokens", "dtype", "model_signature_sha256", "created_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ROOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_PATH_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_PATH_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_SIGNATURE_SHA256_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    name: str
    revision: str
    licence: str
    files: _containers.RepeatedCompositeFieldContainer[FileEntry]
    chunk_root: bytes
    chunk_bytes: int
    chunk_count: int
    tokenizer_path: str
    chat_template_path: str
    chat_template_sha256: bytes
    vocabulary_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_context_tokens: int
    dtype: str
    model_signature_sha256: bytes
    created_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., licence: _Optional[str] = ..., files: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ..., chunk_root: _Optional[bytes] = ..., chunk_bytes: _Optional[int] = ..., chunk_count: _Optional[int] = ..., tokenizer_path: _Optional[str] = ..., chat_template_path: _Optional[str] = ..., chat_template_sha256: _Optional[bytes] = ..., vocabulary_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_context_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., model_signature_sha256: _Optional[bytes] = ..., created_at_unix_ms: _Optional[int] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("path", "size_bytes", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    sha256: bytes
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class RegistryEntry(_message.Message):
    __slots__ = ("market_id", "model_id", "manifest_digest", "publisher", "manifest_envelope", "revoked", "issued_at_unix_ms")
    MARKET_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    market_id: str
    model_id: str
    manifest_digest: bytes
    publisher: str
    manifest_envelope: bytes
    revoked: bool
    issued_at_unix_ms: int
    def __init__(self, market_id: _Optional[str] = ..., model_id: _Optional[str] = ..., manifest_digest: _Optional[bytes] = ..., publisher: _Optional[str] = ..., manifest_envelope: _Optional[bytes] = ..., revoked: _Optional[bool] = ..., issued_at_unix_ms: _Optional[int] = ...) -> None: ...

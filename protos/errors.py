"""The one error tree. Every error that crosses a role's border is one of these.

``code`` is stable and machine-readable, ``message`` says what is wrong, ``hint`` what to do.
Messages never contain prompts, outputs, keys or other secrets.
"""

from __future__ import annotations

import grpc


class TrueweightError(Exception):
    """Base of all errors raised on purpose.

    ``grpc_status`` and ``http_status`` are how it looks at the two borders; ``openai_type`` is the
    ``error.type`` of an OpenAI error body; ``retryable`` says that the same call may succeed later.
    """

    code = "INTERNAL"
    grpc_status = grpc.StatusCode.INTERNAL
    http_status = 500
    openai_type = "server_error"
    retryable = False
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        stop = "" if self.message.endswith((".", "?")) else "."
        return f"{self.message}{stop} {self.hint}"


class InvalidRequest(TrueweightError):
    """The caller sent something malformed or out of range."""

    code = "INVALID_REQUEST"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    openai_type = "invalid_request_error"
    exit_code = 2


class UnsupportedParameter(InvalidRequest):
    """A known parameter that is not supported yet; refused by name, never ignored."""

    code = "UNSUPPORTED_PARAMETER"


class ContextOverflow(InvalidRequest):
    """Prompt and output do not fit the model's context."""

    code = "CONTEXT_LENGTH_EXCEEDED"


class Unauthenticated(TrueweightError):
    """Nobody we know, or a signature that does not hold."""

    code = "UNAUTHENTICATED"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    openai_type = "authentication_error"


class BadSignature(Unauthenticated):
    """A signature, digest or proof does not hold. Nothing was parsed."""

    code = "BAD_SIGNATURE"


class PermissionDenied(TrueweightError):
    """Known, but not entitled."""

    code = "PERMISSION_DENIED"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403
    openai_type = "permission_error"


class NotFound(TrueweightError):
    """No such thing."""

    code = "NOT_FOUND"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    openai_type = "invalid_request_error"


class Erased(NotFound):
    """It was there, and whoever it belongs to had it destroyed."""

    code = "ERASED"
    http_status = 410


class Conflict(TrueweightError):
    """The state does not allow it."""

    code = "CONFLICT"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    openai_type = "invalid_request_error"


class IdConflict(Conflict):
    """The same id was used before with another body."""

    code = "ID_CONFLICT"


class InsufficientFunds(TrueweightError):
    """The available balance does not cover the hold."""

    code = "INSUFFICIENT_FUNDS"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 402
    openai_type = "insufficient_quota"


class LimitExceeded(InsufficientFunds):
    """A spending limit of the API key does not allow it."""

    code = "LIMIT_EXCEEDED"


class OverCapacity(TrueweightError):
    """A bounded queue or a node is full."""

    code = "OVER_CAPACITY"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class PayloadTooLarge(InvalidRequest):
    """The message is longer than its bound."""

    code = "PAYLOAD_TOO_LARGE"
    http_status = 413


class Unavailable(TrueweightError):
    """Nobody can serve it now."""

    code = "UNAVAILABLE"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    openai_type = "server_error"
    retryable = True
    exit_code = 69


class DeadlineExceeded(TrueweightError):
    """It took too long."""

    code = "DEADLINE_EXCEEDED"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    openai_type = "server_error"
    retryable = True


class EngineError(TrueweightError):
    """The inference engine failed."""

    code = "ENGINE_ERROR"


class WeightsRefused(TrueweightError):
    """Weights on disk differ from the signed, registered manifest."""

    code = "WEIGHTS_REFUSED"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    exit_code = 65


class ReceiptRefused(TrueweightError):
    """A receipt fails an L0 check: it is not paid. ``check`` names the first that failed."""

    code = "RECEIPT_REFUSED"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 502
    exit_code = 65

    def __init__(
        self, message: str, *, check: str = "", hint: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, param=param)
        self.check = check


class StorageError(TrueweightError):
    """The database or disk failed; nothing was half done."""

    code = "STORAGE"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True
    exit_code = 74


def _tree(root: type[TrueweightError]) -> dict[str, type[TrueweightError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(TrueweightError)


def error_for(code: str, message: str, hint: str = "") -> TrueweightError:
    """The error of a stable code; an unknown code becomes the base class."""
    return _BY_CODE.get(code, TrueweightError)(message, hint=hint)

"""Errors as clients see them: one catalogue, OpenAI's JSON, all four keys always.

ApiError is raised wherever a request cannot go on. Messages name the field and the limit; they never show a path, the
name of an adapter that the caller did not send, or a Python exception.
"""

from typing import Any

import msgspec

from protocol.errors import Error, ErrorCode

RETRY_AFTER_S = 1
_MAX_ECHO = 200  # characters of the caller's input that a message may repeat


class ApiError(Exception):
    """A request's failure: HTTP status and the four keys of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type_
        self.param = param
        self.code = code
        self.retry_after_s = RETRY_AFTER_S

    def body(self) -> bytes:
        """The JSON body, or the data of the event that ends a stream."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def headers(self) -> dict[str, str]:
        """Clients that retry by themselves learn when, or not to."""
        if self.status in (429, 503):
            return {"retry-after": str(self.retry_after_s)}
        if self.status == 500:
            return {"x-should-retry": "false"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


class UnknownAdapter(ApiError):
    """404: no adapter answers to a name. A resolver may know better."""

    def __init__(self, adapter: str, message: str, param: str) -> None:
        """adapter: the name that would have to be loaded."""
        super().__init__(404, message, param=param, code="model_not_found")
        self.adapter = adapter


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: the caller's mistake."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str) -> ApiError:
    """400: a field of the API that this server knows and does not serve."""
    return ApiError(400, f"{param} is not supported by this server.", param=param, code="unsupported_parameter")


def model_not_found(name: str, adapter: str | None = None) -> UnknownAdapter:
    """404: no base model or adapter answers to this name. adapter: what in it is an adapter's, if not all."""
    return UnknownAdapter(adapter or name, f"The model {name[:_MAX_ECHO]!r} does not exist.", "model")


def overloaded(message: str = "The server is at its limit of unfinished requests; try again shortly.") -> ApiError:
    """429: full."""
    return ApiError(429, message, type_="rate_limit_error", code="rate_limit_exceeded")


def unavailable(message: str = "The model is not available at the moment; try again shortly.") -> ApiError:
    """503: no worker, or draining."""
    return ApiError(503, message, type_="server_error", code="unavailable")


def internal() -> ApiError:
    """500: our mistake."""
    return ApiError(500, "An error inside the server ended this request.", type_="server_error", code="internal")


# Worker error → status, type, code. INVALID_REQUEST and the adapters' errors are the caller's own doing.
_FROM_WORKER: dict[ErrorCode, tuple[int, str, str | None]] = {
    ErrorCode.INVALID_REQUEST: (400, "invalid_request_error", None),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: (400, "invalid_request_error", "context_length_exceeded"),
    ErrorCode.OVERLOADED: (429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorCode.ADAPTER_GONE: (404, "invalid_request_error", "model_not_found"),
    ErrorCode.ADAPTER_NOT_FOUND: (404, "invalid_request_error", "adapter_not_found"),
    ErrorCode.ADAPTER_EXISTS: (400, "invalid_request_error", "adapter_exists"),
    ErrorCode.ADAPTER_CONFLICT: (409, "invalid_request_error", "adapter_conflict"),
    ErrorCode.ADAPTER_INVALID: (400, "invalid_request_error", "adapter_invalid"),
    ErrorCode.ADAPTER_LIMIT: (400, "invalid_request_error", "adapter_limit"),
    ErrorCode.LOAD_CANCELLED: (409, "invalid_request_error", "load_cancelled"),
    ErrorCode.STORE_FULL: (507, "server_error", "insufficient_storage"),
    ErrorCode.SOURCE_UNAVAILABLE: (502, "server_error", "source_unavailable"),
    ErrorCode.SOURCE_FORBIDDEN: (400, "invalid_request_error", "source_forbidden"),
    ErrorCode.LORA_DISABLED: (400, "invalid_request_error", "lora_disabled"),
    ErrorCode.DEADLINE_EXCEEDED: (503, "server_error", "deadline_exceeded"),
    ErrorCode.WORKER_LOST: (503, "server_error", "worker_lost"),
    ErrorCode.INTERNAL: (500, "server_error", "internal"),
}


def from_worker(error: Error) -> ApiError:
    """The worker's error in HTTP's terms."""
    status, type_, code = _FROM_WORKER[error.code]
    return ApiError(status, error.message, type_=type_, param=error.param, code=code)

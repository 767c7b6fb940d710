"""Every error that Afterword raises on purpose, and whose fault it is.

    AfterwordError
    ├── SettingError      the operator's: a setting or a model file; told at start, exit status 2
    ├── RequestError      the caller's: 4xx; `param` names the field where one field is to blame
    │   ├── Unauthorized      401
    │   └── ModelNotFound     404
    ├── Overloaded        the moment's: 503, worth a retry
    └── EngineError       ours: 500
        └── EngineDied        the engine's process ended under the request

This file knows no HTTP library. `status`, `type`, `param` and `code` are OpenAI's envelope in plain values.
"""

from __future__ import annotations


class AfterwordError(Exception):
    """Base of all; `message` is one plain sentence that may be shown to whoever is to blame."""

    status = 500
    type = "server_error"
    param: str | None = None
    code: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SettingError(AfterwordError):
    """A setting or a model file that cannot be used."""


class RequestError(AfterwordError):
    """A request that cannot be answered as it stands."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class Unauthorized(RequestError):
    """No key, or a key that is not known."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code, status=401)


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    def __init__(self, model: str) -> None:
        shown = model if len(model) <= 128 else model[:125] + "..."
        super().__init__(
            f"The model `{shown}` does not exist or you do not have access to it.",
            code="model_not_found",
            status=404,
        )


class Overloaded(AfterwordError):
    """No room now. `retry_after` is in seconds."""

    status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(AfterwordError):
    """The engine could not do what it was asked."""


class EngineDied(EngineError):
    """The engine's process ended while it was working on the request."""

    def __init__(self) -> None:
        super().__init__("The engine stopped while it was working on this request. Please try again.")

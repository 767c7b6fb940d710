"""Every error that Afterword raises on purpose, and whose fault it is.

    AfterwordError
    ├── SettingError      the operator's: a setting or a model file; told at start, exit status 2
    │   └── OtherKind         a file that is sound and no language model
    ├── RequestError      the caller's: 4xx; `param` names the field where one field is to blame
    │   ├── Unauthorized      401
    │   ├── RateLimited       429
    │   ├── ReaderTooSlow     408: a streamed answer was not read for too long
    │   └── ModelNotFound     404
    ├── Overloaded        the moment's: 503, worth a retry
    ├── WaitedTooLong     the moment's: 504, never begun
    ├── Stopped           a batch goes no further for now; what is done is kept
    ├── StorageFailed     the server's disk: 507
    │   └── NotOurs           a folder that has other files in it
    └── EngineError       ours: 500
        ├── EngineDied        the engine's process ended under the request
        ├── ModelReplaced     another model is served under the name since
        ├── EngineFailure     and did so again when it was tried again: not worth a third time
        ├── NotFinite         the model's numbers for it are not finite
        └── LoadFailed        no engine could be started for the model

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


class NotLanguageModel(SettingError):
    """A file that has something else in it than a language model."""


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


class RateLimited(RequestError):
    """A key or an address has no more for now. `kind` is the error's type; `retry_after` seconds, None: never."""

    def __init__(self, message: str, *, kind: str, code: str, retry_after: int | None) -> None:
        super().__init__(message, code=code, status=429)
        self.type = kind
        self.retry_after = retry_after


class ReaderTooSlow(RequestError):
    """The client left too much of a streamed answer unread for too long.

    408, so that clients which retry after a time-out do so: the answer's first part has been computed already.
    """

    def __init__(self) -> None:
        super().__init__(
            "The answer was not read for too long after it had been computed, and ends here. Read it faster, or ask "
            "for less at once.",
            code="reader_too_slow",
            status=408,
        )


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

    def __init__(self, message: str, *, retry_after: int = 1, code: str = "server_is_overloaded") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code


class EngineError(AfterwordError):
    """The engine could not do what it was asked."""


class EngineDied(EngineError):
    """The engine's process ended while it was working on the request."""

    def __init__(self) -> None:
        super().__init__("The engine stopped while it was working on this request. Please try again.")


class ModelReplaced(EngineError):
    """The request was begun with one model, and the files of another have taken its place."""

    code = "model_replaced"

    def __init__(self) -> None:
        super().__init__("The model was replaced by another while it was working on this request. Please try again.")


class EngineFailure(EngineError):
    """The engine's process ended twice while it was working on this, or on the same of someone else."""

    code = "engine_failure"

    def __init__(self) -> None:
        super().__init__(
            "The engine stopped twice while it was working on this request. It is not tried again for an hour."
        )


class NonFiniteLogits(EngineError):
    """A row of logits has a number that is not finite, so no token can be chosen. The same request fails again."""

    code = "not_finite"

    def __init__(self) -> None:
        super().__init__(
            "The model computed numbers that are not finite (NaN or infinity) for this request, so it has no answer. "
            "The same request will fail again."
        )


class LoadFailed(EngineError):
    """The model that the request names could not be loaded; why is for whoever runs the server."""

    code = "load_failed"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` could not be loaded. The server's messages say why.")


class QueueTimeout(AfterwordError):
    """It has waited as long as anything may wait here, and nothing was computed for it."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The request has waited too long for its turn. Please try again later.")


class BatchStopped(AfterwordError):
    """A batch that cannot go on now and can later: what is done is kept."""


class StorageFailed(AfterwordError):
    """The server has no room for files, or its disk fails."""

    status = 507
    code = "storage_failed"


class ForeignFolder(StorageFailed):
    """The folder for files has files in it that Afterword did not write."""

    def __init__(self) -> None:
        super().__init__("The server's folder for files has other files in it. Its --batch-dir must be empty or new.")

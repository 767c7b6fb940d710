"""All errors that Afterword raises on purpose, and whether client, operator, load or server caused them.

    AfterwordError
    ├── SettingError          operator: a setting or a model file; shown at the start, exit status 2
    │   └── NotLanguageModel      a valid model file of something other than a language model
    ├── RequestError          client: 4xx; `param` names the field, where one field is wrong
    │   ├── Unauthorized          401
    │   ├── RateLimited           429
    │   ├── ReaderTooSlow         408: the client did not read a streamed response for too long
    │   └── ModelNotFound         404
    ├── Overloaded            load: 503; the client may retry
    ├── QueueTimeout          load: 504; the request waited too long, and nothing was computed for it
    ├── BatchStopped          a batch cannot continue at the moment; finished lines are kept
    ├── StorageFailed         server: 507; the disk of the file store
    │   └── ForeignFolder         the file store's folder has other files in it
    └── EngineError           server: 500
        ├── WorkerDied            the worker ended during the request
        ├── ModelReplaced         the model's files were replaced by another model during the request
        ├── EngineFailure         the worker ended twice during the request, so it is not repeated
        ├── NonFiniteLogits       the model computed NaN or infinity
        ├── JobRefused            the library that computes has refused the request
        ├── UpstreamLost          the server behind this one has broken off the request
        └── LoadFailed            no worker could load the model

This module imports no HTTP library. `status`, `type`, `param` and `code` are the plain values of OpenAI's error object.
"""

from __future__ import annotations


class AfterwordError(Exception):
    """Base class. `message` is one plain sentence or two that the client or operator may see."""

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
    """The file contains something other than a language model."""


class RequestError(AfterwordError):
    """A request that the server cannot answer as it is."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class Unauthorized(RequestError):
    """The request has no API key, or one that is not valid."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code, status=401)


class RateLimited(RequestError):
    """A key or an address has reached a limit.

    `kind` is the error's `type`. `retry_after` is in seconds; None: a retry never helps.
    """

    def __init__(self, message: str, *, kind: str, code: str, retry_after: int | None) -> None:
        super().__init__(message, code=code, status=429)
        self.type = kind
        self.retry_after = retry_after


class ReaderTooSlow(RequestError):
    """The client left too much of a streamed response unread for too long.

    The status is 408, so that clients which retry after a timeout do so: the server has already computed the first part
    of the response.
    """

    def __init__(self) -> None:
        super().__init__(
            "The response was not read for too long after it had been computed, and ends here. Read it faster, or "
            "request less at once.",
            code="reader_too_slow",
            status=408,
        )


class ModelNotFound(RequestError):
    """The request names a model that this server does not serve."""

    def __init__(self, model: str, *, param: str | None = None) -> None:
        shown = model if len(model) <= 128 else model[:125] + "..."
        super().__init__(
            f"The model `{shown}` does not exist or you do not have access to it.",
            param=param,
            code="model_not_found",
            status=404,
        )


class Overloaded(AfterwordError):
    """The server has no capacity at the moment. `retry_after` is in seconds."""

    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str, *, retry_after: int = 1, code: str = "server_is_overloaded") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code


class EngineError(AfterwordError):
    """The engine could not process the request."""


class WorkerDied(EngineError):
    """The worker ended while it processed the request."""

    def __init__(self) -> None:
        super().__init__("The worker process stopped while it was processing this request. Please try again.")


class ModelReplaced(EngineError):
    """The model's files were replaced by those of another model while the request was processed."""

    code = "model_replaced"

    def __init__(self) -> None:
        super().__init__("The model was replaced by another while it was processing this request. Please try again.")


class EngineFailure(EngineError):
    """The worker ended twice while it processed this request, or another with the same job or text."""

    code = "engine_failure"

    def __init__(self) -> None:
        super().__init__(
            "The worker process stopped twice while it was processing this request. The server refuses it for an hour."
        )


class NonFiniteLogits(EngineError):
    """A logits row contains NaN or infinity, so no token can be chosen. The same request fails again."""

    code = "not_finite"

    def __init__(self) -> None:
        super().__init__(
            "The model computed numbers that are not finite (NaN or infinity) for this request, so it has no answer. "
            "The same request will fail again."
        )


class JobRefused(EngineError):
    """The library that computes has refused the job or ended it early. The worker's messages say why."""

    code = "job_refused"

    def __init__(self) -> None:
        super().__init__(
            "The library that runs the model has refused this request. The reason is in the server's messages on "
            "standard error."
        )


class UpstreamLost(EngineError):
    """The server that computes for this one ended during the request, or has not answered for too long."""

    code = "upstream_lost"

    def __init__(self) -> None:
        super().__init__("The upstream server has broken off this request. Please try again.")


class LoadFailed(EngineError):
    """The model that the request names could not be loaded. The server logs the reason for the operator."""

    code = "load_failed"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model}` could not be loaded. The reason is in the server's messages on standard error."
        )


class QueueTimeout(AfterwordError):
    """The request has waited for `queue_seconds`, and nothing was computed for it."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The request has waited too long in the queue. Please try again later.")


class BatchStopped(AfterwordError):
    """The batch cannot continue at the moment, but can later. Finished lines are kept."""


class StorageFailed(AfterwordError):
    """The file store has no space left, or its disk fails."""

    status = 507
    code = "storage_failed"


class ForeignFolder(StorageFailed):
    """The file store's folder contains files that Afterword did not write."""

    def __init__(self) -> None:
        super().__init__("The server's folder for files contains other files. Give an empty or new --batch-dir.")

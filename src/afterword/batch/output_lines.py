"""Makes the lines of a batch's output file, in OpenAI's batch form. Pure functions.

The bytes of a line depend only on the request and its answer: ids are derived from the input line, and `created` is the
time of the job. The number of cached prompt tokens depends on other requests of the server. It is therefore left out of
the lines (`usage.prompt_tokens_details`) and reported only as a sum over the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from afterword.batch.input_lines import BatchRequest, InvalidLine
from afterword.completion.json_body import encode

Retry = bool | float
"""Whether the request is sent again. A number is the wait before that, in seconds."""

RETRIED_STATUSES = frozenset({408, 409, 429, 503})
"""HTTP statuses after which a batch sends the request again, without a limit of attempts.

OpenAI's Python client 3.54 retries the same statuses and all of 500 and above (`_should_retry` in `_base_client.py`).
"""

_MAX_RETRY_AFTER_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class ServerReply:
    """A server's response to one request. `status` is 0 if there was none.

    `retry`: the request is sent again as often as necessary. `attempted`: the server failed, and the request is sent
    again a limited number of times.
    """

    status: int
    body: bytes
    retry: Retry = False
    attempted: bool = False

    @classmethod
    def from_response(cls, status: int, body: bytes, headers: Mapping[str, str]) -> ServerReply:
        """Decide from an HTTP response whether the request is sent again. Names of headers are in lower case.

        This rule holds for every client of a batch. `x-should-retry: false` forbids another attempt. `retry-after` is
        read as a number of seconds, at most 120; other forms of it are ignored.
        """
        if headers.get("x-should-retry") == "false":
            return cls(status, body)
        if status in RETRIED_STATUSES:
            return cls(status, body, retry=_retry_after(headers.get("retry-after", "")))
        return cls(status, body, attempted=status >= 500)

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


SendRequest = Callable[[str, str, bytes], Awaitable[ServerReply]]
"""A function that sends one request: method, path, body."""


@dataclass(frozen=True, slots=True)
class OutputLine:
    """One line of the output, without its line end, and its token counts. `line` is the number of the input line."""

    line: int
    is_success: bool
    text: bytes
    prompt: int = 0
    completion: int = 0
    cached: int = 0


def success_line(row: BatchRequest, reply: ServerReply, created: int) -> OutputLine:
    """Make the line of a request that the server answered, with a completion or with an error."""
    body, usage = _without_variable_parts(reply, row.digest, created)
    response = {"status_code": reply.status, "request_id": f"req_{_id(row.digest, 'request', 32)}", "body": body}
    text = _line(row.digest, row.custom_id, response, None)
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    return OutputLine(row.line, reply.is_success, text, prompt, completion, cached)


def failure_line(row: BatchRequest | InvalidLine, code: str, message: str) -> OutputLine:
    """Make the line of a request that the server did not answer."""
    return OutputLine(row.line, False, _line(row.digest, row.custom_id, None, {"code": code, "message": message}))


def too_large_line(row: BatchRequest, max_bytes: int) -> OutputLine:
    """Make the line of a request with an answer larger than the journal can store."""
    return failure_line(row, "answer_too_large", f"The answer is larger than the limit of {max_bytes} bytes.")


def no_space_line(row: BatchRequest) -> OutputLine:
    """Make the line of a request with an answer that would exceed the key's storage limit."""
    message = "The storage limit of your files is reached. Delete files, and send this request again."
    return failure_line(row, "storage_limit_reached", message)


def invalid_line(fault: InvalidLine) -> OutputLine:
    """Make the output line of an input line that is not a request."""
    return failure_line(fault, fault.code, fault.message)


def batch_id(digest: bytes) -> str:
    """Return the `id` of the output line, derived from the digest of the input line."""
    return f"batch_req_{_id(digest, 'row', 32)}"


def _line(digest: bytes, name: str | None, response: object, error: object) -> bytes:
    return encode({"id": batch_id(digest), "custom_id": name, "response": response, "error": error})


def _without_variable_parts(reply: ServerReply, digest: bytes, created: int) -> tuple[Any, dict[str, Any]]:
    """Return the body without the parts that differ from run to run, and the unchanged `usage`."""
    try:
        body = msgspec.json.decode(reply.body, type=dict[str, msgspec.Raw])
        usage = msgspec.json.decode(body.get("usage", b"null"))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        error = {"message": "The server's answer was not JSON.", "type": "server_error", "param": None, "code": None}
        return {"error": error}, {}
    if not reply.is_success:
        return body, {}
    usage = usage if isinstance(usage, dict) else {}
    changes: dict[str, Any] = {"id": f"cmpl-{_id(digest, 'completion', 32)}", "created": created}
    if usage:
        changes["usage"] = {name: value for name, value in usage.items() if name != "prompt_tokens_details"}
    return {name: changes.get(name, value) for name, value in body.items()}, usage


def _id(digest: bytes, kind: str, length: int) -> str:
    return hashlib.blake2b(digest, digest_size=length // 2, person=kind.encode()).hexdigest()


def _retry_after(value: str) -> Retry:
    try:
        seconds = float(value)
    except ValueError:
        return True
    return True if math.isnan(seconds) else min(max(seconds, 0.001), _MAX_RETRY_AFTER_SECONDS)


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and value > 0 else 0

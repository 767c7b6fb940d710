"""JSON of responses, stream chunks and errors. The order of the keys is that of OpenAI's API reference."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any, Literal

from afterword.completion import json_body
from afterword.completion.choice import Delta
from afterword.completion.full_rows import FullRow, finite, finite_value
from afterword.completion.logprobs import Logprobs
from afterword.completion.run import Usage
from afterword.errors import AfterwordError

_LETTERS = bytes((string.ascii_letters + string.digits).encode()[byte % 62] for byte in range(256))
encode = json_body.encode
DONE = b"data: [DONE]\n\n"
COLUMNS = (b"text_offset", b"token_logprobs", b"tokens", b"top_logprobs")
"""The keys of `logprobs`, in their order."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The members that all objects of one response share. `created`: Unix seconds.

    `null_scores`: whether choices of a whole response without `prompt_logprobs` have this member with null. Clients of
    vLLM read it there. OpenAI's API has no such member.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    null_scores: bool = False


def new_id() -> str:
    """A random id for a response."""
    return "cmpl-" + secrets.token_bytes(29).translate(_LETTERS).decode()  # one system call


def envelope(head: ResponseHead, usage: Usage | Literal["later", "never"]) -> tuple[bytes, bytes]:
    """The bytes of a response object before its choices, and those after them."""
    members = b"".join(b',"%b":%b' % (name.encode(), encode(value)) for name, value in _usage_member(usage).items())
    return encode(_object(head, [])).removesuffix(b"]}"), b"]" + members + b"}"


class ChunkEncoder:
    """Encodes the chunks of one stream. What is the same in all of them is encoded once."""

    def __init__(self, head: ResponseHead) -> None:
        opening, closing = envelope(head, "never")
        self._opening, self._closing = b"data: " + opening, closing + b"\n\n"
        self._closing_later = envelope(head, "later")[1] + b"\n\n"
        self._head = head

    def chunk(self, delta: Delta, usage: Usage | Literal["later", "never"]) -> bytes:
        """One event of a stream. `usage`: tokens so far; "later": null, the last chunk has them; "never": absent."""
        if usage == "never":
            closing = self._closing
        elif usage == "later":
            closing = self._closing_later
        else:
            closing = envelope(self._head, usage)[1] + b"\n\n"
        return self._opening + encode(_choice(delta)) + closing


def usage_chunk(head: ResponseHead, usage: Usage) -> bytes:
    """The last chunk of a stream, with the usage and no choices."""
    return event(_object(head, []) | {"usage": _usage(usage)})


def event(value: object) -> bytes:
    """A server-sent event with `value` as JSON."""
    return b"data: " + encode(value) + b"\n\n"


def error(problem: AfterwordError) -> dict[str, Any]:
    """The error object in OpenAI's format; it always has four keys."""
    return {
        "error": {
            "message": problem.message,
            "type": problem.type,
            "param": problem.param,
            "code": problem.code,
        }
    }


def _usage_member(usage: Usage | Literal["later", "never"]) -> dict[str, Any]:
    return {} if usage == "never" else {"usage": None if usage == "later" else _usage(usage)}


def _object(head: ResponseHead, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices,
    }


def _choice(delta: Delta) -> dict[str, Any]:
    choice = {
        "text": delta.text,
        "index": delta.index,
        "logprobs": delta.logprobs and columns(delta.logprobs),
        "finish_reason": delta.finish,
    }
    if delta.token_ids is not None:
        choice["token_ids"] = delta.token_ids
    if delta.prompt is not None and delta.prompt.token_ids is not None:
        choice["prompt_token_ids"] = delta.prompt.token_ids
    if delta.prompt is not None and delta.prompt.logprobs is not None:
        choice["prompt_logprobs"] = delta.prompt.logprobs
    return choice


def columns(part: Logprobs) -> dict[str, Any]:
    """The four columns of `logprobs`. `top_logprobs` is None if the request asks for no alternatives."""
    top = part.top_logprobs
    return {
        "text_offset": part.text_offset,
        "token_logprobs": [value if value is None else finite_value(value) for value in part.token_logprobs],
        "tokens": part.tokens,
        "top_logprobs": top and [entry and _finite_entry(entry) for entry in top],
    }


def _finite_entry(entry: dict[str, float] | FullRow) -> dict[str, float] | FullRow:
    return entry if isinstance(entry, FullRow) else finite(entry)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.predicted.accepted,
            "audio_tokens": 0,
            "reasoning_tokens": 0,
            "rejected_prediction_tokens": usage.predicted.rejected,
        },
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": usage.cached_tokens},
    }

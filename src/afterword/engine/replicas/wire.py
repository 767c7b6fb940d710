"""The messages between a server and an engine replica, as frames over TCP. They extend those of `engine.messages`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from afterword.engine.messages import (
    HEADER,
    MAX_FRAME_BYTES,
    CancelTokenize,
    CloseJob,
    DropSample,
    Heartbeat,
    ModelReady,
    PassDone,
    PauseJob,
    ResumeJob,
    StartJob,
    TextTokens,
)
from afterword.engine.protocol import Value
from afterword.errors import (
    AfterwordError,
    EngineError,
    EngineFailure,
    JobRefused,
    ModelReplaced,
    NonFiniteLogits,
    Overloaded,
    QueueTimeout,
    RequestError,
    UpstreamLost,
    WorkerDied,
)


class Hello(Value, frozen=True, tag=True):
    """The first frame of a connection: the replica's secret, and the model for which the connection is."""

    secret: str
    model: str


class ReadText(Value, frozen=True, tag=True):
    """Tokenize a text for a client. The answer is `TextTokens` or `TextFailed`."""

    call: int
    text: str
    special: bool
    client: str


class Failure(Value, frozen=True):
    """An error as it is sent. `kind`: the name of its class."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    retry_after: int = 1


class JobFailed(Value, frozen=True, tag=True):
    """A job has ended with an error, or was not accepted."""

    job_id: int
    failure: Failure


class TextFailed(Value, frozen=True, tag=True):
    """A text was not tokenized."""

    call: int
    failure: Failure


class Leaving(Value, frozen=True, tag=True):
    """The replica ends soon. It goes on with its jobs, and takes new ones only if no other replica can."""


ToReplica = Hello | StartJob | DropSample | CloseJob | PauseJob | ResumeJob | ReadText | CancelTokenize
FromReplica = ModelReady | PassDone | Heartbeat | TextTokens | JobFailed | TextFailed | Leaving

M = TypeVar("M")
_PLAIN = (EngineFailure, JobRefused, ModelReplaced, NonFiniteLogits, QueueTimeout, UpstreamLost, WorkerDied)
_INVALID = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # the last for arrays in arrays, very deep
_LARGE = 2**16  # bytes of a frame that takes milliseconds to decode
_encoder = msgspec.msgpack.Encoder()
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """Where a replica listens. `settings`: a hash of its settings; replicas of one version have the same."""

    name: str
    host: str
    port: int
    secret: str
    settings: str = ""


def frame(message: ToReplica | FromReplica) -> bytes:
    """Encode a message, length included."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


async def read_from_server(reader: asyncio.StreamReader, most: int = MAX_FRAME_BYTES) -> ToReplica | None:
    """The next message to a replica. None if the connection has ended, or for a frame that is not valid."""
    return _decoded(_to_replica, await _read(reader, most))


async def read_from_replica(reader: asyncio.StreamReader) -> FromReplica | None:
    """The next message of a replica. None if the connection has ended, or for a frame that is not valid."""
    return _decoded(_from_replica, await _read(reader, MAX_FRAME_BYTES))


def _decoded(decoder: msgspec.msgpack.Decoder[M], body: bytes | None) -> M | None:
    try:
        return decoder.decode(body) if body else None
    except _INVALID:
        return None


async def _read(reader: asyncio.StreamReader, most: int) -> bytes | None:
    try:
        size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
        if size > most:
            return None
        if size > _LARGE:
            await asyncio.sleep(0)  # several large frames may be buffered: let other tasks run before each
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, OSError):
        return None


def failure_of(error: AfterwordError) -> Failure:
    """The error as it is sent."""
    if isinstance(error, RequestError):
        return Failure("RequestError", error.message, error.param, error.code, error.status)
    if isinstance(error, Overloaded):
        return Failure("Overloaded", error.message, code=error.code, retry_after=error.retry_after)
    return Failure(type(error).__name__, error.message)


def error_of(failure: Failure) -> AfterwordError:
    """The error that was sent."""
    if failure.kind == "RequestError":
        return RequestError(failure.message, param=failure.param, code=failure.code, status=failure.status)
    if failure.kind == "Overloaded":
        code = failure.code or "server_is_overloaded"
        return Overloaded(failure.message, retry_after=failure.retry_after, code=code)
    for kind in _PLAIN:
        if kind.__name__ == failure.kind:
            return kind()
    return EngineError(failure.message)

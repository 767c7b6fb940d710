"""The bodies of vLLM's route `/inference/v1/generate`, both directions, and its stream of events. Pure.

The format is that of `vllm/entrypoints/scale_out/token_in_token_out/protocol.py` in vLLM 0.32. What the server sends is
not trusted: sizes, token ids and numbers are checked, and anything else raises `Malformed`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import msgspec

from afterword.engine.http.failures import Malformed, TooFewAlternatives, failure
from afterword.engine.vllm.requests import Alternatives, PromptScore, SampleOutput, SampleRequest

BASE_BYTES = 2**20
MOST_BYTES = 2**28
"""The most bytes of a response or an event, however much is requested."""

PARSE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bytes that are no JSON, or not that of a type: also for wrong UTF-8 and deep nesting."""

_ENTRY_BYTES = 160  # of a token with its log probability and rank in JSON; the longest have about 80
DONE = b"[DONE]"
_LOWEST, _HIGHEST = -9999.0, 0.1  # vLLM sends the first instead of minus infinity; the second is rounding


class _Entry(msgspec.Struct):
    token_id: int
    logprob: float
    rank: int | None = None


class _Position(_Entry):
    top_logprobs: list[_Entry] = []


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Score(msgspec.Struct):
    logprob: float
    rank: int | None = None


class _Error(msgspec.Struct):
    code: int
    message: str = ""


class _Answer(msgspec.Struct):
    """An event of a stream, or a whole response."""

    choices: list[_Choice] = []
    error: _Error | None = None
    prompt_logprobs: list[dict[int, _Score] | None] | None = None


class Part(msgspec.Struct, frozen=True):
    """What one event or response says. `reason`: vLLM's reason if the sample has ended, else empty."""

    output: SampleOutput
    reason: str = ""


_decoder = msgspec.json.Decoder(_Answer)


def request_body(model: str, request: SampleRequest, vocabulary: int, *, stream: bool) -> bytes:
    """The body of a request. A whole response has the scores of the prompt and one token; a stream has no scores.

    vLLM lists the sampled token first and then leaves out the least likely alternative. So one more is requested.
    Each token is an event of its own, because the time between two events is limited (`upstream_seconds`).
    """
    fields = {name: value for name, value in request.fields.items() if value is not None}
    fields.pop("stream_interval", None)
    if alternatives := fields.get("logprobs"):
        fields["logprobs"] = min(alternatives + 1, vocabulary)
    if stream:
        fields.pop("prompt_logprobs", None)
    else:
        fields |= {"max_tokens": 1, "min_tokens": min(fields["min_tokens"], 1)}
    fields["watermarking"] = False  # a watermark would change which tokens are drawn
    body = {"model": model, "token_ids": request.prompt, "sampling_params": fields, "stream": stream}
    if request.cache_salt:
        # vLLM allows 128 characters of some kinds; the namespace is not the server's business.
        body["cache_salt"] = hashlib.blake2b(request.cache_salt.encode(), digest_size=32).hexdigest()
    return msgspec.json.encode(body)


def most_bytes(request: SampleRequest, *, stream: bool) -> int:
    """The most bytes that an event or a whole response can have."""
    fields = request.fields
    entries = (2 + (fields["logprobs"] or 0)) * (fields["max_tokens"] if stream else 1)
    if not stream:
        entries += (2 + (fields["prompt_logprobs"] or 0)) * len(request.prompt)
    return min(BASE_BYTES + _ENTRY_BYTES * entries, MOST_BYTES)


class EventReader:
    """Splits the bytes of a stream into the data of its events. An event has at most `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of each event line that is complete. Raises `Malformed`."""
        searched = len(self._buffer)  # what is left of earlier bytes has no end of a line
        self._buffer += data
        start = 0
        while (end := self._buffer.find(b"\n", max(start, searched))) >= 0:
            line = bytes(self._buffer[start:end]).rstrip(b"\r")
            start = end + 1
            if line.startswith(b"data:"):
                yield line[5:].strip()
            elif line and not line.startswith(b":"):
                raise Malformed("a line of the stream is no event", repr(line[:200]))
        del self._buffer[:start]
        if len(self._buffer) > self._most:
            raise Malformed(f"an event has more than {self._most} bytes")


def read_part(data: bytes, request: SampleRequest, vocabulary: int, *, stream: bool) -> Part:
    """Read an event or a whole response. Raises `UpstreamFailure`, also for an event that states an error."""
    try:
        answer = _decoder.decode(data)
    except PARSE_ERRORS as problem:
        raise Malformed(f"a response has another format ({problem})", repr(data[:200])) from None
    if answer.error is not None:  # the status of a stream is always 200
        raise failure(answer.error.code, answer.error.message)
    if len(answer.choices) != 1 or answer.choices[0].index != 0:
        raise Malformed("a response has not exactly one choice")
    (choice,) = answer.choices
    ids = tuple(choice.token_ids or ())
    if not ids and not choice.finish_reason:
        raise Malformed("a response has no tokens")
    if len(ids) > request.fields["max_tokens"]:
        raise Malformed("there are more tokens than were requested")
    if any(token in request.fields["stop_token_ids"] for token in ids[:-1]):
        raise Malformed("tokens follow an end token")
    _check_ids(ids, vocabulary)
    wanted = request.fields["logprobs"]
    alternatives = _alternatives(choice, ids, wanted, vocabulary) if wanted is not None else None
    scores = () if stream else _scores(answer, request, vocabulary)
    return Part(SampleOutput(ids, alternatives, scores), choice.finish_reason or "")


def _alternatives(choice: _Choice, ids: Sequence[int], wanted: int, vocabulary: int) -> tuple[Alternatives, ...]:
    content = (choice.logprobs.content if choice.logprobs else None) or []
    if [position.token_id for position in content] != list(ids):
        raise Malformed("the log probabilities are not those of the tokens")
    found = []
    for position in content:
        entries = {each.token_id: each.logprob for each in position.top_logprobs}
        # A rank is missing where the log probability is NaN, which JSON does not have.
        entries[position.token_id] = math.nan if position.rank is None else position.logprob
        _check_entries(entries, vocabulary)
        # One more than wanted is requested (`request_body`), so the token itself and the `wanted` best ones are there.
        if position.rank is not None and len(entries) < min(wanted + 1, vocabulary):
            raise TooFewAlternatives
        found.append(tuple(entries.items()))
    return tuple(found)


def _scores(answer: _Answer, request: SampleRequest, vocabulary: int) -> tuple[PromptScore, ...]:
    positions = answer.prompt_logprobs or []
    if len(positions) != len(request.prompt):
        raise Malformed(f"{len(request.prompt)} prompt tokens have {len(positions)} scores")
    found = []
    for token, position in zip(request.prompt[1:], positions[1:], strict=True):
        if position is None or token not in position:
            raise Malformed("a prompt token has no score")
        rank, entries = position[token].rank or 0, {other: each.logprob for other, each in position.items()}
        _check_entries(entries, vocabulary)
        if not 1 <= rank <= vocabulary:
            raise Malformed("a prompt token has no rank")
        if len(entries) < request.fields["prompt_logprobs"]:  # the token itself may be among the best ones
            raise TooFewAlternatives
        found.append(PromptScore(token, rank, tuple(entries.items())))
    return tuple(found)


def _check_entries(entries: dict[int, float], vocabulary: int) -> None:
    _check_ids(list(entries), vocabulary)
    if any(value < _LOWEST or value > _HIGHEST for value in entries.values()):  # NaN is neither
        raise Malformed("a number is no log probability; vLLM must run without --logprobs-mode")


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise Malformed(f"a token id is not from 0 to {vocabulary - 1}")

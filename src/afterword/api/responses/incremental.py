"""Answers of any size as bytes, in pieces: encoded a slice at a time, and never in memory as a whole.

What the choices of a prompt share, which is the echoed prompt and the report about it, is encoded once; the same bytes
are written for each choice. Small deltas of a stream are encoded in one call, by `serialization.chunk`; the bytes are
the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from starlette.types import Send

from afterword.api.responses import serialization
from afterword.completion.choice import Delta
from afterword.completion.json_body import encode
from afterword.completion.logprobs import SLICE_TOKENS, Echo, Logprobs, PromptReport, column_slices, slices
from afterword.completion.run import Usage

MIN_CHUNK_BYTES = 2**16
"""Bytes that are sent in one step, at most twice as many."""


def chunked(fragments: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of `MIN_CHUNK_BYTES` to twice as many bytes; the last can be smaller."""
    held = bytearray()
    for fragment in fragments:
        for start in range(0, len(fragment), MIN_CHUNK_BYTES):
            held += fragment[start : start + MIN_CHUNK_BYTES]
            if len(held) >= MIN_CHUNK_BYTES:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)


async def send_chunks(send: Send, fragments: Iterable[bytes]) -> None:
    """Send the fragments of a whole body, as fast as the client reads them. Other tasks run between the pieces."""
    held = b""
    for piece in chunked(fragments):
        if held:
            await send({"type": "http.response.body", "body": held, "more_body": True})
            await asyncio.sleep(0)
        held = piece
    await send({"type": "http.response.body", "body": held})


class EncodedArray:
    """A JSON array's items, or a JSON string's parts, encoded whenever there are enough for a slice."""

    __slots__ = ("_encoded", "_encoder", "_waiting")

    def __init__(self, encoder: Callable[[list[Any]], bytes] = encode) -> None:
        self._encoder = encoder
        self._waiting: list[Any] = []
        self._encoded: list[bytes] = []

    def extend(self, items: Iterable[Any]) -> None:
        """Add at most a slice of items."""
        self._waiting += items
        if len(self._waiting) >= SLICE_TOKENS:
            self.close()

    def close(self) -> None:
        """Encode what waits."""
        if self._waiting:
            self._encoded.append(self._encoder(self._waiting)[1:-1])  # without brackets or quotes
            self._waiting = []

    @property
    def encoded(self) -> list[bytes]:
        """All slices."""
        self.close()
        return self._encoded


class EncodedPrompt:
    """What comes before the completion and about the prompt, the same in all choices of a prompt."""

    def __init__(self, report: PromptReport | None = None) -> None:
        self.has_ids = report is not None and report.token_ids is not None
        self.has_logprobs = report is not None and report.scored is not None
        self.text = EncodedArray(_text)
        self.columns = [EncodedArray() for _ in serialization.COLUMNS]
        self.token_ids = EncodedArray()
        self.logprobs = EncodedArray()

    def encode(self, echo: Echo | None, report: PromptReport | None) -> Iterator[int]:
        """Encode it. Yields after each slice how many tokens were in it."""
        if echo is not None:
            self.text.extend([echo.text])
            self.text.close()
            for part in echo.columns():
                _add_columns(self.columns, part)
                yield len(part.tokens)
        if report is not None:
            for ids in slices(report.token_ids or ()):
                self.token_ids.extend(ids)
            for entries in report.entries():
                self.logprobs.extend(entries)
                yield len(entries)
        for series in (*self.columns, self.token_ids, self.logprobs):
            series.close()


class PromptEncoder:
    """Finds what a delta shares with the other choices of its prompt. Kept for `n` choices, then let go."""

    def __init__(self, n: int) -> None:
        self._n = n
        # the delta keeps what the key is made of
        self._kept: dict[tuple[int, int], tuple[EncodedPrompt, int, Delta]] = {}

    def encode(self, delta: Delta) -> Iterator[int | EncodedPrompt]:
        """Like `EncodedPrompt.encode`, then what is shared."""
        key = (id(delta.echo), id(delta.prompt))
        shared, uses, first = self._kept.get(key, (None, 0, delta))
        if shared is None:
            shared = EncodedPrompt(delta.prompt)
            yield from shared.encode(delta.echo, delta.prompt)
        if uses + 1 < self._n:
            self._kept[key] = (shared, uses + 1, first)
        else:
            self._kept.pop(key, None)
        yield shared


class EncodedChoice:
    """One choice, or one delta of it, encoded as its tokens come."""

    def __init__(self, index: int, shared: EncodedPrompt | None) -> None:
        self._index = index
        self._shared = shared or EncodedPrompt()
        self._text = EncodedArray(_text)
        self._columns: list[EncodedArray] | None = None
        self._has_top = False
        self._token_ids: EncodedArray | None = None
        self._finish: str | None = None

    def encode(self, delta: Delta) -> Iterator[int]:
        """Take the next delta. Yields after each slice how many tokens were in it."""
        self._text.extend([delta.own_text])
        if delta.own_logprobs is not None:
            self._columns = self._columns or [EncodedArray() for _ in serialization.COLUMNS]
            self._has_top = delta.own_logprobs.top_logprobs is not None
            for part in column_slices(delta.own_logprobs):
                _add_columns(self._columns, part)
                yield len(part.tokens)
        if delta.token_ids is not None:
            self._token_ids = self._token_ids or EncodedArray()
            for ids in slices(delta.token_ids):
                self._token_ids.extend(ids)
        self._finish = delta.finish
        if delta.finish is not None:
            for series in (self._text, *(self._columns or ()), *([self._token_ids] if self._token_ids else ())):
                series.close()
        yield 1

    def fragments(self) -> Iterator[bytes]:
        """The object, in the key order of `serialization.chunk`."""
        yield b'{"text":"'
        yield from self._shared.text.encoded
        yield from self._text.encoded
        yield b'","index":%d,"logprobs":' % self._index
        yield from self._logprobs()
        yield b',"finish_reason":' + encode(self._finish)
        if self._token_ids is not None:
            yield from _array(b',"token_ids":', self._token_ids)
        if self._shared.has_ids:
            yield from _array(b',"prompt_token_ids":', self._shared.token_ids)
        if self._shared.has_logprobs:
            yield from _array(b',"prompt_logprobs":', self._shared.logprobs)
        yield b"}"

    def _logprobs(self) -> Iterator[bytes]:
        if self._columns is None:
            yield b"null"
            return
        opening = b"{"
        for name, shared, own in zip(serialization.COLUMNS, self._shared.columns, self._columns, strict=True):
            key = b'%b"%b":' % (opening, name)
            if name != b"top_logprobs" or self._has_top:
                yield from _array(key, shared, own)
            else:
                yield key + b"null"
            opening = b","
        yield b"}"


class EncodedBody:
    """A whole answer, encoded as its deltas come."""

    def __init__(self, head: serialization.ResponseHead, n: int) -> None:
        self._head = head
        self._sharing = PromptEncoder(n)
        self._choices: dict[int, EncodedChoice] = {}

    def encode(self, delta: Delta) -> Iterator[int]:
        """Take a delta. Yields after each slice how many tokens were in it."""
        if delta.index not in self._choices:
            for step in self._sharing.encode(delta):
                if isinstance(step, EncodedPrompt):
                    self._choices[delta.index] = EncodedChoice(delta.index, step)
                else:
                    yield step
        yield from self._choices[delta.index].encode(delta)

    def fragments(self, usage: Usage) -> Iterator[bytes]:
        """The response object. Can be asked for more than once."""
        opening, closing = serialization.envelope(self._head, usage)
        for index in sorted(self._choices):
            yield opening
            yield from self._choices[index].fragments()
            opening = b","
        yield closing


def completion(head: serialization.ResponseHead, choices: list[Delta], usage: Usage) -> bytes:
    """The whole answer at once."""
    body = EncodedBody(head, len(choices))
    for choice in choices:
        for _ in body.encode(choice):
            pass
    return b"".join(body.fragments(usage))


def event(
    head: serialization.ResponseHead, choice: EncodedChoice, usage: Usage | Literal["later", "never"]
) -> Iterator[bytes]:
    """One event of a stream, as `serialization.chunk` makes it."""
    opening, closing = serialization.envelope(head, usage)
    yield b"data: " + opening
    yield from choice.fragments()
    yield closing + b"\n\n"


def _text(parts: list[str]) -> bytes:
    return encode("".join(parts))


def _add_columns(series: list[EncodedArray], part: Logprobs) -> None:
    for each, column in zip(series, serialization.columns(part).values(), strict=True):
        each.extend(column or ())


def _array(key: bytes, *series: EncodedArray) -> Iterator[bytes]:
    yield key + b"["
    separator = b""
    for each in series:
        for piece in each.encoded:
            yield separator
            yield piece
            separator = b","
    yield b"]"

"""Encodes large responses a slice of tokens at a time and sends them in pieces, so that other requests can run.

The choices of a prompt share the echoed prompt and the report about it. This module encodes that part once and writes
the same bytes for each choice. `serialization.ChunkEncoder` encodes a small delta of a stream in one call, to the same
bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from starlette.types import Send

from afterword.api.responses import serialization
from afterword.completion.choice import Delta
from afterword.completion.full_rows import FullRow
from afterword.completion.json_body import encode
from afterword.completion.logprobs import SLICE_TOKENS, Echo, EchoPart, Logprobs, PromptReport, column_slices, slices
from afterword.completion.run import Usage

MIN_CHUNK_BYTES = 2**16
"""The fewest bytes in one piece of a body, except the last piece. A piece has less than twice as many."""


def chunked(fragments: Iterable[bytes]) -> Iterator[bytes]:
    """Join the fragments into pieces of `MIN_CHUNK_BYTES` to twice as many bytes; the last piece can be smaller."""
    pending = bytearray()
    for fragment in fragments:
        for start in range(0, len(fragment), MIN_CHUNK_BYTES):
            pending += fragment[start : start + MIN_CHUNK_BYTES]
            if len(pending) >= MIN_CHUNK_BYTES:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


async def send_chunks(send: Send, fragments: Iterable[bytes]) -> None:
    """Send the fragments of a body as fast as the client reads. Other tasks run between the pieces."""
    pending = b""
    for piece in chunked(fragments):
        if pending:
            await send({"type": "http.response.body", "body": pending, "more_body": True})
            await asyncio.sleep(0)
        pending = piece
    await send({"type": "http.response.body", "body": pending})


class EncodedArray:
    """The items of a JSON array, or the parts of a JSON string, encoded in slices of `SLICE_TOKENS` items."""

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

    def extend_in_parts(self, items: Iterable[Any]) -> Iterator[int]:
        """Add at most a slice of items. Yields after each part of a row: a part takes as long as a slice of tokens."""
        for item in items:
            if not isinstance(item, FullRow):
                self._waiting.append(item)
                continue
            self.close()
            encoded = bytearray()
            for part in item.parts():
                encoded += (b"," if encoded else b"{") + encode(part)[1:-1]
                yield SLICE_TOKENS
            self._encoded.append(bytes(encoded + b"}"))
        self.extend(())

    def close(self) -> None:
        """Encode the items that do not fill a slice."""
        if self._waiting:
            self._encoded.append(self._encoder(self._waiting)[1:-1])  # without brackets or quotes
            self._waiting = []

    @property
    def encoded(self) -> list[bytes]:
        """All items as encoded slices, without brackets or quotes."""
        self.close()
        return self._encoded


class EncodedPrompt:
    """The encoded part that all choices of a prompt share: the echo, the prompt's token ids and log probabilities."""

    def __init__(self, report: PromptReport | None = None) -> None:
        self.has_ids = report is not None and report.token_ids is not None
        self.has_logprobs = report is not None and report.scored is not None
        self.text = EncodedArray(_text)
        self.columns = [EncodedArray() for _ in serialization.COLUMNS]
        self.token_ids = EncodedArray()
        self.logprobs = EncodedArray()

    def encode(self, echo: Echo | EchoPart | None, report: PromptReport | None) -> Iterator[int]:
        """Encode slice by slice. Yields the number of tokens in each slice."""
        if echo is not None:
            self.text.extend([echo.text])
            self.text.close()
            for part in echo.columns():
                yield from _add_columns(self.columns, part)
                yield len(part.tokens)
        if report is not None:
            for ids in slices(report.token_ids or ()):
                self.token_ids.extend(ids)
            for entries in report.entries():
                yield from self.logprobs.extend_in_parts(entries)
                yield len(entries)
        for series in (*self.columns, self.token_ids, self.logprobs):
            series.close()


class PromptEncoder:
    """Encodes each prompt once for its `n` choices, and drops its reference to the result after the last choice."""

    def __init__(self, n: int) -> None:
        self._n = n
        # by the ids of a delta's echo and report; the stored delta keeps both alive, so that no id is used twice
        self._encoded: dict[tuple[int, int], tuple[EncodedPrompt, int, Delta]] = {}

    def encode(self, delta: Delta) -> Iterator[int | EncodedPrompt]:
        """Yields the numbers of tokens as `EncodedPrompt.encode` does, and then the encoded prompt of `delta`."""
        key = (id(delta.echo), id(delta.prompt))
        shared, uses, first = self._encoded.get(key, (None, 0, delta))
        if shared is None:
            shared = EncodedPrompt(delta.prompt)
            yield from shared.encode(delta.echo, delta.prompt)
        if uses + 1 < self._n:
            self._encoded[key] = (shared, uses + 1, first)
        else:
            self._encoded.pop(key, None)
        yield shared


class EncodedChoice:
    """A choice, or one delta of it, encoded while its deltas arrive."""

    def __init__(self, index: int, shared: EncodedPrompt | None) -> None:
        self._index = index
        self._shared = shared or EncodedPrompt()
        self._text = EncodedArray(_text)
        self._columns: list[EncodedArray] | None = None
        self._has_top = False
        self._token_ids: EncodedArray | None = None
        self._finish: str | None = None

    def encode(self, delta: Delta) -> Iterator[int]:
        """Add the next delta. Yields the number of tokens in each encoded slice."""
        self._text.extend([delta.own_text])
        if delta.own_logprobs is not None:
            self._columns = self._columns or [EncodedArray() for _ in serialization.COLUMNS]
            self._has_top = delta.own_logprobs.top_logprobs is not None
            for part in column_slices(delta.own_logprobs):
                yield from _add_columns(self._columns, part)
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

    def fragments(self, null_scores: bool = False) -> Iterator[bytes]:
        """The JSON object of the choice, with its keys in the order of `serialization.ChunkEncoder`.

        `null_scores`: see `ResponseHead`.
        """
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
        elif null_scores:
            yield b',"prompt_logprobs":null'
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
    """The body of a whole response, encoded while its deltas arrive."""

    def __init__(self, head: serialization.ResponseHead, n: int) -> None:
        self._head = head
        self._sharing = PromptEncoder(n)
        self._choices: dict[int, EncodedChoice] = {}

    def encode(self, delta: Delta) -> Iterator[int]:
        """Add a delta. Yields the number of tokens in each encoded slice."""
        if delta.index not in self._choices:
            for step in self._sharing.encode(delta):
                if isinstance(step, EncodedPrompt):
                    self._choices[delta.index] = EncodedChoice(delta.index, step)
                else:
                    yield step
        yield from self._choices[delta.index].encode(delta)

    def fragments(self, usage: Usage) -> Iterator[bytes]:
        """The JSON response object. The method can be called more than once."""
        opening, closing = serialization.envelope(self._head, usage)
        for index in sorted(self._choices):
            yield opening
            yield from self._choices[index].fragments(self._head.null_scores)
            opening = b","
        yield closing


def completion(head: serialization.ResponseHead, choices: list[Delta], usage: Usage) -> bytes:
    """The body of a whole response, encoded in one call."""
    body = EncodedBody(head, len(choices))
    for choice in choices:
        for _ in body.encode(choice):
            pass
    return b"".join(body.fragments(usage))


def event(
    head: serialization.ResponseHead, choice: EncodedChoice, usage: Usage | Literal["later", "never"]
) -> Iterator[bytes]:
    """One server-sent event, with the same bytes as `serialization.ChunkEncoder`."""
    opening, closing = serialization.envelope(head, usage)
    yield b"data: " + opening
    yield from choice.fragments()
    yield closing + b"\n\n"


def _text(parts: list[str]) -> bytes:
    return encode("".join(parts))


def _add_columns(series: list[EncodedArray], part: Logprobs) -> Iterator[int]:
    """Add the columns. Yields as `EncodedArray.extend_in_parts` does."""
    for each, column in zip(series, serialization.columns(part).values(), strict=True):
        yield from each.extend_in_parts(column or ())


def _array(key: bytes, *series: EncodedArray) -> Iterator[bytes]:
    yield key + b"["
    separator = b""
    for each in series:
        for piece in each.encoded:
            yield separator
            yield piece
            separator = b","
    yield b"]"

"""A server that plays the routes of a vLLM server, in the wire format of vLLM 0.32, for a toy model.

The toy model's logits depend on the last two tokens. A test can put behaviours into `ScriptedUpstream.plan`: each next
request for tokens takes one, and without one it is answered properly.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

END, BEGIN, VOCABULARY = 256, 257, 260
GENERATE = "/inference/v1/generate"
KEY = "upstream-key"


# ---- the toy model


@cache
def logits(before: int, last: int) -> tuple[float, ...]:
    draw = random.Random(before * 1000 + last)
    return tuple(draw.uniform(-4, 4) for _ in range(VOCABULARY))


def logprobs(tokens: list[int]) -> list[float]:
    """The log probabilities of the token after these, by id."""
    row = logits(tokens[-2] if len(tokens) > 1 else -1, tokens[-1])
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def choose(tokens: list[int], fields: dict[str, Any], count: int) -> int:
    """The token that the model generates: the best one, or one that depends on the seed."""
    row = list(logprobs(tokens))
    for token, bias in (fields.get("logit_bias") or {}).items():
        if int(token) < VOCABULARY:
            row[int(token)] += bias
    if count < fields.get("min_tokens", 0):
        for token in {END, *fields["stop_token_ids"]}:
            row[token] = -math.inf
    order = sorted(range(VOCABULARY), key=lambda token: (-row[token], token))
    if not fields["temperature"] or row[order[0]] - row[order[1]] > 50:
        return order[0]
    return order[random.Random(f"{fields['seed']} {count}").randrange(8)]


def greedy(prompt: list[int], count: int) -> list[int]:
    """What the model continues a prompt with at temperature 0."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(choose(tokens, {"temperature": 0}, 0))
    return tokens[len(prompt) :]


def ranked(row: list[float]) -> list[int]:
    return sorted(range(VOCABULARY), key=lambda token: (-row[token], token))


def entry(token: int, row: list[float]) -> dict[str, Any]:
    return {"token_id": token, "logprob": row[token], "rank": ranked(row).index(token) + 1}


def position(tokens: list[int], token: int, alternatives: int) -> dict[str, Any]:
    """A generated token as vLLM reports it: the token first, then the best ones, at most `alternatives` in all."""
    row = logprobs(tokens)
    listed = list(dict.fromkeys([token, *ranked(row)[:alternatives]]))[: max(alternatives, 1)]
    return entry(token, row) | {"top_logprobs": [entry(each, row) for each in listed]}


def scores(prompt: list[int], alternatives: int) -> list[dict[str, Any] | None]:
    found: list[dict[str, Any] | None] = [None]
    for at in range(1, len(prompt)):
        row = logprobs(prompt[:at])
        listed = dict.fromkeys([prompt[at], *ranked(row)[:alternatives]])
        entries = {str(each): entry(each, row) for each in listed}
        found.append({key: {"logprob": each["logprob"], "rank": each["rank"]} for key, each in entries.items()})
    return found


# ---- the server


class Exchange:
    """One request for tokens, and the means to answer it."""

    def __init__(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.body = body
        self.writer = writer
        self.fields: dict[str, Any] = body["sampling_params"]
        self.tokens = list(body["token_ids"])
        self.count = 0

    def send_whole(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)

    def begin(self) -> None:
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def event(self, value: Any) -> None:
        await self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def end(self) -> None:
        await self.chunk(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")

    def next_choice(self) -> dict[str, Any]:
        """The next token of the toy model."""
        token = choose(self.tokens, self.fields, self.count)
        self.count += 1
        reason = "length" if self.count == self.fields["max_tokens"] else None
        reason = "stop" if token in self.fields["stop_token_ids"] else reason
        choice = {"index": 0, "token_ids": [token], "finish_reason": reason, "logprobs": None}
        if (alternatives := self.fields.get("logprobs")) is not None:
            choice["logprobs"] = {"content": [position(self.tokens, token, alternatives)]}
        self.tokens.append(token)
        return choice

    async def send_tokens(self, count: int) -> bool:
        """Send this many tokens as events. Returns whether the sample has ended."""
        for _ in range(count):
            choice = self.next_choice()
            await self.event({"request_id": "r", "choices": [choice], "usage": None})
            if choice["finish_reason"]:
                return True
        return False


Behaviour = Callable[[Exchange], Awaitable[None]]


async def answer(exchange: Exchange) -> None:
    """Answer as vLLM does."""
    fields = exchange.fields
    if exchange.body["stream"]:
        exchange.begin()
        while not await exchange.send_tokens(1):
            await asyncio.sleep(0)
        await exchange.end()
        return
    prompt = list(exchange.tokens)
    found = None if fields.get("prompt_logprobs") is None else scores(prompt, fields["prompt_logprobs"])
    exchange.send_whole(200, {"choices": [exchange.next_choice()], "prompt_logprobs": found})


def status(number: int) -> Behaviour:
    """Answer with an error."""

    async def behave(exchange: Exchange) -> None:
        exchange.send_whole(number, {"error": {"message": "no", "code": number}})

    return behave


def error_event(code: int, after: int = 0) -> Behaviour:
    """Say in a stream that the request is wrong, as vLLM does where it has begun the response."""

    async def behave(exchange: Exchange) -> None:
        exchange.begin()
        await exchange.send_tokens(after)
        await exchange.event({"error": {"message": "no", "type": "X", "param": None, "code": code}})
        await exchange.end()

    return behave


def dies(after: int) -> Behaviour:
    """Break off the connection after this many tokens; -1: before the response."""

    async def behave(exchange: Exchange) -> None:
        if after >= 0:
            exchange.begin()
            await exchange.send_tokens(after)
        await asyncio.sleep(0.05)  # so that the tokens are read before the connection is reset
        exchange.writer.transport.abort()

    return behave


def silent(after: int) -> Behaviour:
    """Send nothing more after this many tokens."""

    async def behave(exchange: Exchange) -> None:
        exchange.begin()
        await exchange.send_tokens(after)
        await asyncio.Event().wait()

    return behave


def sends(*chunks: bytes, after: int = 0) -> Behaviour:
    """Send bytes as they are in a stream, then end it."""

    async def behave(exchange: Exchange) -> None:
        exchange.begin()
        await exchange.send_tokens(after)
        for each in chunks:
            await exchange.chunk(each)
        await exchange.end()

    return behave


def clamps(most: int) -> Behaviour:
    """Answer, but list at most this many alternatives of a token, as a gateway may do."""

    async def behave(exchange: Exchange) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            if exchange.fields.get(field) is not None:
                exchange.fields[field] = min(exchange.fields[field], most)
        await answer(exchange)

    return behave


def together(upstream: ScriptedUpstream, count: int) -> Behaviour:
    """Answer when this many requests for tokens are there at the same time."""

    async def behave(exchange: Exchange) -> None:
        while upstream.most < count:
            await asyncio.sleep(0.01)
        await answer(exchange)

    return behave


class ScriptedUpstream:
    """The server. `requests`: bodies of requests for tokens, in order. `left`: clients that left before the end.

    `active`, `most`: requests for tokens that are being answered; the most of them at the same time.

    `max_logprobs`, `vocabulary`, `models`, `length`, `version`, `has_route`, `tokenizes`: what the upstream is.

    `lists`: how it says which models it has, if not properly.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.plan: deque[Behaviour] = deque()
        self.left = self.active = self.most = 0
        self.connections = 0
        self.answer: Behaviour = answer
        self.lists: Behaviour | None = None
        self.max_logprobs, self.vocabulary, self.length = 21, VOCABULARY, 512
        self.models = ["toy"]
        self.version = "0.32.0"
        self.has_route = self.tokenizes = True
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End the server and all connections, as a killed process does."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head[0].split()[1]
        self.headers.append(headers)
        exchange = Exchange(json.loads(body) if path == GENERATE else {"token_ids": [], "sampling_params": {}}, writer)
        if path == GENERATE:
            return await self._generate(exchange, reader)
        if path == "/tokenize" and self.tokenizes:
            exchange.send_whole(200, {"tokens": list(json.loads(body)["prompt"].encode())})
        elif path == "/version":
            exchange.send_whole(200, {"version": self.version})
        elif path == "/v1/models" and self.lists:
            await self.lists(exchange)
        elif path == "/v1/models":
            cards = [
                {"id": name, "root": f"org/{name}", "parent": None, "max_model_len": self.length}
                for name in self.models
            ]
            exchange.send_whole(200, {"data": cards})
        else:
            exchange.send_whole(404, {"detail": "Not Found"})
        await writer.drain()
        return True

    async def _generate(self, exchange: Exchange, reader: asyncio.StreamReader) -> bool:
        self.requests.append(exchange.body)
        behaviour = self.plan.popleft() if self.plan else self._checked(exchange) or self.answer
        self.active += 1
        self.most = max(self.most, self.active)
        answering = asyncio.ensure_future(behaviour(exchange))
        leaving = asyncio.ensure_future(self._left(reader))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.left += 1
                return False
            await answering
            await exchange.writer.drain()
            return not exchange.writer.is_closing()
        finally:
            self.active -= 1
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _left(self, reader: asyncio.StreamReader) -> None:
        """Return when the client has closed the connection. Reads nothing: the next request may follow."""
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.01)

    def _checked(self, exchange: Exchange) -> Behaviour | None:
        """How vLLM refuses a request, if it does."""
        fields = exchange.fields
        if not self.has_route:
            return status(403)
        if exchange.body["model"] not in self.models:
            return status(404)
        wrong = any(int(token) >= self.vocabulary for token in fields.get("logit_bias") or {})
        wrong |= max(fields.get("logprobs") or 0, fields.get("prompt_logprobs") or 0) > self.max_logprobs
        if wrong:
            return error_event(400) if exchange.body["stream"] else status(400)
        return None


@asynccontextmanager
async def upstream_here() -> AsyncIterator[ScriptedUpstream]:
    """A running upstream on this event loop."""
    upstream = ScriptedUpstream()
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.stop()


class ThreadUpstream:
    """An upstream on an event loop in a thread of its own. `script` may be changed while no request runs."""

    def __init__(self) -> None:
        self.script = ScriptedUpstream()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start, on the same port as before."""
        asyncio.run_coroutine_threadsafe(self.script.start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.script.stop(), self._loop).result(10)

    def end(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextmanager
def upstream_in_thread() -> Iterator[ThreadUpstream]:
    upstream = ThreadUpstream()
    upstream.start()
    try:
        yield upstream
    finally:
        upstream.end()


# ---- its model's folder


def write_folder(path: Path) -> Path:
    """Write the tokenizer and the configuration of the toy model: each byte is a token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": END, "content": "<|end|>", **flags}, {"id": BEGIN, "content": "<|begin|>", **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {characters[byte]: byte for byte in range(256)}, "merges": []},
    }
    files = {
        "tokenizer": tokenizer,
        "config": {"vocab_size": VOCABULARY, "eos_token_id": END, "max_position_embeddings": 512},
        "tokenizer_config": {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": False},
    }
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path

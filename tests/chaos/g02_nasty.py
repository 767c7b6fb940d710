"""G2: malicious texts in every text field, on the built-in model; a stream equals the whole response."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product
from random import Random
from typing import Any

import pytest

from afterword.completion.text_stream import TextStream

from .client import ClientConnection, Reply, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .nasty import SURROGATES, TEXTS
from .server import Server

AT_ONCE, LARGEST = 16, 2048  # connections, bytes of an error's body
FIELDS = ("prompt", "suffix", "stop", "user", "model", "cache_salt", "prompts", "echo")
"""The fields that hold a text; "prompts": a list of prompts, "echo": a prompt that is echoed."""

Body = dict[str, Any]


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "16", "--context", "512") as server:
        return asyncio.run(_ask_all(server, trial))


async def _ask_all(server: Server, trial: Trial) -> Result:
    statuses: Counter[int] = Counter()
    problems: list[str] = []

    async def send_item(connection: ClientConnection, body: Body | bytes) -> None:
        whole = await connection.ask(body)
        statuses[whole.status] += 1
        found = _wrong(whole)
        if isinstance(body, dict) and whole.status == 200 and not found:
            streamed = await connection.ask(body | {"stream": True})
            if _wrong(streamed) or _text(streamed) != _text(whole):
                found = "the stream has another text"
        if found:
            problems.append(f"{found}: {str(body)[:120]!r}")

    await run_concurrently(server, islice(_bodies(trial), trial.size), send_item, AT_ONCE)
    alive = server.load()["status"] == "ready" and server.load()["restarts"] == 0
    first = {"first": problems[0]} if problems else {}
    return Result(
        not problems and alive,
        {"texts": len(TEXTS), "2xx": statuses[200], "4xx": statuses.total() - statuses[200], "wrong": len(problems)}
        | {"worker": "lived" if alive else "died"}
        | first,
    )


def _bodies(trial: Trial) -> Iterator[Body | bytes]:
    """First invalid surrogates as JSON, then all texts in all fields, in an order that depends on the seed."""
    pairs = [*product(TEXTS, FIELDS)]
    Random(trial.seed).shuffle(pairs)
    broken = [b'{"%s": %s}' % (name.encode(), text) for name in FIELDS[:6] for text in SURROGATES]
    yield from broken
    for number, (text, name) in enumerate(pairs):
        if number % 50 == 0:
            trial.say(f"G2 {number} of {len(pairs)}")
        yield _body(name, text)


def _body(name: str, text: str) -> Body:
    usual: Body = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 1}
    match name:
        case "prompts":
            return usual | {"prompt": [text, "Once", text]}
        case "echo":
            return usual | {"prompt": text, "echo": True, "logprobs": 1}
        case "stop":
            return usual | {"stop": [text, "zz"]}
    return usual | {name: text}


def _wrong(reply: Reply) -> str | None:
    if reply.status >= 500 or reply.status == 0:
        return f"status {reply.status}"
    if reply.status >= 400 and (len(reply.body) > LARGEST or reply.json().keys() != {"error"}):
        return "an error without the error envelope"
    return None


def _text(reply: Reply) -> list[tuple[str, str | None]]:
    """The text and the finish reason of each choice."""
    objects = (
        [event for event in reply.events() if event != "[DONE]"] if reply.body[:6] == b"data: " else [reply.json()]
    )
    texts: dict[int, tuple[str, str | None]] = {}
    for choice in (choice for each in objects for choice in each["choices"]):
        before, _ = texts.get(choice["index"], ("", None))
        texts[choice["index"]] = before + choice["text"], choice["finish_reason"]
    return [texts[index] for index in sorted(texts)]


def cut_characters_where_tokens_end(patch: pytest.MonkeyPatch) -> None:
    """Each token is decoded alone, so a part of a character raises UnicodeDecodeError."""
    push = TextStream.push
    patch.setattr(
        TextStream, "push", lambda self, token, piece, *rest: push(self, token, piece.decode().encode(), *rest)
    )


GATE = Gate(
    name="G2",
    goal="malicious texts in every field: no 5xx, no dead worker, a stream equals the whole response",
    unit="bodies, each whole and streamed",
    commit=600,
    nightly=len(SURROGATES) * 6 + len(TEXTS) * len(FIELDS),
    run=run,
    fault=Fault("a token with a part of a character raises an exception", "server", cut_characters_where_tokens_end),
    planted=200,
)

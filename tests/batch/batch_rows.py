"""Rows, and servers that answer them without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.journal import Journal
from afterword.batch.output_lines import SendRequest, ServerReply

Json = dict[str, Any]
CREATED = 1_700_000_000
LONGEST = 10_000


def wrapped(name: object, **body: Any) -> bytes:
    """A line in OpenAI's form."""
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode()


def bare(**body: Any) -> bytes:
    """A line that is a request."""
    return json.dumps(body).encode()


def completion(request: Json, **more: Any) -> ServerReply:
    """What a server could answer, with things in it that differ each time."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": id(request) % 3}}
    body = {"id": f"cmpl-{id(request)}", "created": id(request), "choices": [{"text": request}], "usage": usage}
    return ServerReply(200, json.dumps(body | more).encode())


def answering(choose: Callable[[Json], ServerReply] = completion) -> SendRequest:
    """A server."""

    async def ask(_: str, __: str, body: bytes) -> ServerReply:
        await asyncio.sleep(0)
        return choose(json.loads(body))

    return ask


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def begun(source: Path, place: Path) -> Journal:
    """A journal of a job over a file."""
    journal = Journal(place)
    if not journal.facts:
        journal.scan(source, LONGEST, {})
    return journal


def run(source: Path, journal: Journal, ask: SendRequest, at_once: int = 3, **how: Any) -> Progress:
    """Do the job, or what is left of it."""
    progress = Progress(int(journal.facts["rows"]), journal.counts())
    asyncio.run(BatchJob(source, journal, CREATED, LONGEST, at_once).run(ask, progress, **how))
    return progress


def output(journal: Journal) -> list[Json]:
    return [json.loads(text) for _, text in journal.lines()]


def seconds() -> Iterator[float]:
    """A clock that goes on by itself."""
    now = float(CREATED)
    while True:
        yield now
        now += 1

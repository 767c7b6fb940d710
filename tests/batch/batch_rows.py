"""Helpers for the tests of batches: input lines, and servers that answer without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.journal import Journal
from afterword.batch.output_lines import SendRequest, ServerReply

Json = dict[str, Any]
CREATED = 1_700_000_000
LONGEST = 10_000


def wrapped(name: object, **body: Any) -> bytes:
    """An input line in OpenAI's batch form."""
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode()


def bare(**body: Any) -> bytes:
    """An input line with the body of a request alone."""
    return json.dumps(body).encode()


def completion(request: Json, **more: Any) -> ServerReply:
    """A server's reply with an id, a time and cached tokens that differ from call to call."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": id(request) % 3}}
    body = {"id": f"cmpl-{id(request)}", "created": id(request), "choices": [{"text": request}], "usage": usage}
    return ServerReply(200, json.dumps(body | more).encode())


def answering(choose: Callable[[Json], ServerReply] = completion) -> SendRequest:
    """A client of a server with the replies that `choose` makes."""

    async def send(_: str, __: str, body: bytes) -> ServerReply:
        await asyncio.sleep(0)
        return choose(json.loads(body))

    return send


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def open_journal(source: Path, path: Path) -> Journal:
    """Open the journal of a job; a new one gets the lines of `source`."""
    journal = Journal(path)
    if not journal.facts:
        journal.scan(source, LONGEST, {})
    return journal


def run(source: Path, journal: Journal, send: SendRequest, concurrency: int = 3, **options: Any) -> Progress:
    """Run a job to its end."""
    progress = Progress(int(journal.facts["rows"]), journal.counts())
    asyncio.run(BatchJob(source, journal, CREATED, LONGEST, concurrency).run(send, progress, **options))
    return progress


def output(journal: Journal) -> list[Json]:
    return [json.loads(text) for _, text in journal.lines()]

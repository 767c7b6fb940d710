"""A server over HTTP: what it says comes through, and one that is gone is worth another try."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from batch_rows import bare, begun, completion, write

from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.http_client import http_client
from afterword.batch.output_lines import SendRequest
from afterword.errors import SettingError

Handle = Callable[[bytes, bytes], bytes | None]


def served(
    handle: Handle, visit: Callable[[SendRequest, str], Awaitable[Any]], key: str | None = None, path: str = ""
) -> None:
    """Visit a server that answers a head and a body with bytes, or hangs up on None."""

    visitors: list[Any] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(sizes[0].split(b":")[1])) if sizes else b""
                if (told := handle(head, body)) is None:
                    break
                writer.write(told)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        async with http_client(url, key, 4) as ask:
            await visit(ask, url)
        server.close()
        await asyncio.gather(*visitors)

    asyncio.run(main())


def told(status: int, body: bytes = b"{}", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Something", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_request_goes_to_its_path_with_the_key(path):
    heads: list[bytes] = []

    def handle(head: bytes, body: bytes) -> bytes:
        heads.append(head)
        return told(200, body)

    async def visit(ask: SendRequest, _: str) -> None:
        assert (await ask("POST", "/v1/completions", b'{"a":1}')).body == b'{"a":1}'
        assert (await ask("GET", "/ready", b"")).is_success

    served(handle, visit, key="secret", path=path)
    assert heads[0].startswith(b"POST /v1/completions HTTP/1.1")
    assert heads[1].startswith(b"GET /ready HTTP/1.1")
    assert all(b"Bearer secret" in head for head in heads)


def test_a_server_that_hangs_up_or_is_not_there_is_worth_another_try():
    async def visit(ask: SendRequest, _: str) -> None:
        reply = await ask("GET", "/ready", b"")
        assert (reply.status, reply.retry) == (0, True)

    served(lambda *_: None, visit)

    async def alone() -> None:
        async with http_client("http://127.0.0.1:1", None, 1) as ask:
            assert (await ask("GET", "/ready", b"")).retry

    asyncio.run(alone())


def test_a_server_that_restarts_is_a_pause(tmp_path: Path):
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(6)))
    journal = begun(source, tmp_path / "journal")
    seen = 0

    def handle(_: bytes, body: bytes) -> bytes | None:
        nonlocal seen
        seen += 1
        match seen:
            case 3 | 4:
                return None
            case 5:
                return told(503, b'{"error":{"code":"loading"}}', "Retry-After: 3")
            case 6:
                return told(500)
        return told(200, completion(json.loads(body)).body)

    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    async def visit(ask: SendRequest, _: str) -> None:
        progress = Progress(6, journal.counts())
        await BatchJob(source, journal, 0, 10_000, 2).run(ask, progress, lambda: 0.0, sleep)
        assert (progress.done.succeeded, progress.done.failed) == (6, 0)

    served(handle, visit)
    assert seen == 10
    assert 3.0 in waits


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://[x", ""])
def test_a_url_that_is_none_is_refused(url):
    async def main() -> None:
        async with http_client(url, None, 1):
            raise AssertionError

    with pytest.raises(SettingError, match="--url"):
        asyncio.run(main())

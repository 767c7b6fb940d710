"""The HTTP client of batches: paths, keys, lost connections, restarts of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from batch_rows import bare, completion, open_journal, write

from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.http_client import http_client
from afterword.batch.output_lines import SendRequest
from afterword.errors import SettingError

Handle = Callable[[bytes, bytes], bytes | None]


def with_server(
    handle: Handle, use: Callable[[SendRequest, str], Awaitable[Any]], key: str | None = None, path: str = ""
) -> None:
    """Call `use` with a client of a server. `handle` gets a head and a body; None closes the connection."""

    connections: list[Any] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(sizes[0].split(b":")[1])) if sizes else b""
                if (response := handle(head, body)) is None:
                    break
                writer.write(response)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        async with http_client(url, key, 4) as send:
            await use(send, url)
        server.close()
        await asyncio.gather(*connections)

    asyncio.run(main())


def response_bytes(status: int, body: bytes = b"{}", *headers: str) -> bytes:
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
        return response_bytes(200, body)

    async def use(send: SendRequest, _: str) -> None:
        assert (await send("POST", "/v1/completions", b'{"a":1}')).body == b'{"a":1}'
        assert (await send("GET", "/ready", b"")).is_success

    with_server(handle, use, key="secret", path=path)
    assert heads[0].startswith(b"POST /v1/completions HTTP/1.1")
    assert heads[1].startswith(b"GET /ready HTTP/1.1")
    assert all(b"Bearer secret" in head for head in heads)


def test_a_lost_or_refused_connection_is_retried():
    async def use(send: SendRequest, _: str) -> None:
        reply = await send("GET", "/ready", b"")
        assert (reply.status, reply.retry) == (0, True)

    with_server(lambda *_: None, use)

    async def without_server() -> None:
        async with http_client("http://127.0.0.1:1", None, 1) as send:
            assert (await send("GET", "/ready", b"")).retry

    asyncio.run(without_server())


def test_a_job_continues_after_a_restart_of_the_server(tmp_path: Path):
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(6)))
    journal = open_journal(source, tmp_path / "journal")
    seen = 0

    def handle(_: bytes, body: bytes) -> bytes | None:
        nonlocal seen
        seen += 1
        match seen:
            case 3 | 4:
                return None
            case 5:
                return response_bytes(503, b'{"error":{"code":"loading"}}', "Retry-After: 3")
            case 6:
                return response_bytes(500)
        return response_bytes(200, completion(json.loads(body)).body)

    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    async def use(send: SendRequest, _: str) -> None:
        progress = Progress(6, journal.counts())
        await BatchJob(source, journal, 0, 10_000, 2).run(send, progress, lambda: 0.0, sleep)
        assert (progress.done.succeeded, progress.done.failed) == (6, 0)

    with_server(handle, use)
    assert seen == 10
    assert 3.0 in waits


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://[x", ""])
def test_an_invalid_url_is_refused(url):
    async def main() -> None:
        async with http_client(url, None, 1):
            raise AssertionError

    with pytest.raises(SettingError, match="--url"):
        asyncio.run(main())

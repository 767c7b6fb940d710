"""The HTTP connection to the upstream, a vLLM server: sends requests, and says why one has failed. Keeps no jobs.

What the upstream sends is not trusted and may be slow: each response and each event of a stream is limited in bytes and
in time. Closing a stream closes its connection, upon which vLLM ends the computation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx2
import msgspec

from afterword.engine.http.failures import Broken, Malformed, Unavailable, failure
from afterword.engine.http.wire import BASE_BYTES, DONE, PARSE_ERRORS, EventReader

GENERATE = "/inference/v1/generate"
_CONNECT_SECONDS = 10.0
_GET_SECONDS = 5.0
"""The most seconds for an answer that needs no computation. Waiting requests are told soon that it is not there."""

_JSON = {"content-type": "application/json"}
_CONNECTION_ERRORS = (httpx2.TransportError, httpx2.StreamError)


class Upstream:
    """A server. `silence`: seconds without an event, or without a whole response, after which a request has failed.

    All methods raise `UpstreamFailure`. Proxies of the environment (`HTTP_PROXY`) and `.netrc` are not used: a proxy
    would see the key and the prompts. Certificates of the environment (`SSL_CERT_FILE`) are used.
    """

    def __init__(self, url: str, key: str, connections: int, silence: float) -> None:
        self._silence = silence
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=connections, keepalive_expiry=20),
            verify=httpx2.create_ssl_context(),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str, most: int = BASE_BYTES) -> Any:
        """The JSON value at a path, which the upstream has without computation."""
        return _json(await self._whole("GET", path, b"", most, min(_GET_SECONDS, self._silence)))

    async def post(self, path: str, body: bytes, most: int = BASE_BYTES) -> bytes:
        """The whole response to a request, of at most `most` bytes."""
        return await self._whole("POST", path, body, most, self._silence)

    async def events(self, path: str, body: bytes, most: int) -> AsyncGenerator[bytes]:
        """The data of the events of a stream, each of at most `most` bytes, until the event that says it is done."""
        reader = EventReader(most)
        async with self._response("POST", path, body, self._silence) as response, aclosing(_chunks(response)) as chunks:
            while True:
                events = await self._next_events(chunks, reader)
                for data in events:
                    if data == DONE:
                        async with _limited(self._silence):
                            await anext(chunks, None)  # the end of the body: the connection can be used again
                        return
                    yield data

    async def _next_events(self, chunks: AsyncGenerator[bytes], reader: EventReader) -> list[bytes]:
        """The next events. The time is limited for a whole event, so that single bytes do not prolong it."""
        async with _limited(self._silence):
            while True:
                chunk = await anext(chunks, None)
                if chunk is None:
                    raise Broken("the stream has ended early")
                if events := list(reader.feed(chunk)):
                    return events

    async def _whole(self, method: str, path: str, body: bytes, most: int, seconds: float) -> bytes:
        async with self._response(method, path, body, seconds) as response, _limited(seconds):
            return await _read(response, most)

    @asynccontextmanager
    async def _response(self, method: str, path: str, body: bytes, seconds: float) -> AsyncIterator[httpx2.Response]:
        """A response whose status is 200 and whose body is not read. `seconds`: the limit for its head."""
        request = self._client.build_request(method, path, content=body, headers=_JSON if body else {})
        try:
            async with _limited(seconds):
                response = await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as problem:
            raise Unavailable(type(problem).__name__, str(problem)) from None
        except _CONNECTION_ERRORS as problem:
            raise Broken(type(problem).__name__, str(problem)) from None
        try:
            if response.status_code != 200:
                async with _limited(seconds):
                    text = await _read(response, BASE_BYTES)
                raise failure(response.status_code, text.decode(errors="replace"))
            yield response
        finally:
            await response.aclose()


@asynccontextmanager
async def _limited(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Broken(f"there was no answer for {seconds:g} s") from None


async def _chunks(response: httpx2.Response) -> AsyncGenerator[bytes]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except _CONNECTION_ERRORS as problem:
        raise Broken(type(problem).__name__, str(problem)) from None


async def _read(response: httpx2.Response, most: int) -> bytes:
    data = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > most:
                raise Malformed(f"a response has more than {most} bytes")
    return bytes(data)


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except PARSE_ERRORS as problem:
        raise Malformed(f"a response is no JSON ({problem})", repr(data[:200])) from None

"""Connections: what a client may send, how slowly, how much, and how many connections may be open."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import weakref
from typing import Any

import pytest
from in_memory_connection import Engine, InMemoryClient, InMemoryServer, application, get, post

import scripted_engine
from afterword.api.responses import incremental, part_sender
from afterword.batch.batch_limits import BatchLimits
from afterword.engine.protocol import Job
from afterword.transport.body_writer import WRITE_BODY_KEY
from afterword.transport.transport_limits import TransportLimits

REQUEST = post(b'{"prompt":"a","max_tokens":8}')
STREAM_REQUEST = post(b'{"prompt":"a","max_tokens":60,"stream":true,"logprobs":5}')


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 30))


def body_of(response: bytes) -> Any:
    return json.loads(response.partition(b"\r\n\r\n")[2])


# ---- parts of a body that are written past `send`


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_has_the_same_bytes_with_other_servers(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no `WriteBody`. In HTTP/1.0 nothing is written past `send`, because such a body has no chunks."""

    async def scenario() -> bytes:
        client = InMemoryServer(application(Engine(scripted_engine.text_script("Hello world the cat")))).connect()
        return await client.send(STREAM_REQUEST.replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))

    def varying(response: bytes) -> bytes:
        return re.sub(rb'(req_|cmpl-)\w+|"created":\d+|processing-ms: \d+', b"", response)

    direct = run(scenario())
    monkeypatch.setattr(part_sender, "WRITE_BODY_KEY", "another")
    assert varying(direct) == varying(run(scenario()))
    assert (direct.count(b"\r\ndata: ") > 3) == (version == "1.1")


@pytest.mark.parametrize(
    ("change", "written"),
    [
        (lambda cycle: None, True),
        (lambda cycle: setattr(cycle, "chunked_encoding", None), False),  # the response has not started
        (lambda cycle: setattr(cycle, "chunked_encoding", False), False),
        (lambda cycle: setattr(cycle, "response_complete", True), False),
        (lambda cycle: setattr(cycle, "disconnected", True), False),
        (lambda cycle: cycle.flow.pause_writing(), False),
        (lambda cycle: cycle.scope.update(method="HEAD"), False),
    ],
)
def test_a_part_is_written_only_where_send_would_write_it_at_once(change: Any, written: bool) -> None:
    async def scenario() -> tuple[bool, bytes]:
        client = InMemoryServer(application(Engine(generate_forever, max_jobs=10))).connect()
        client.transport.reads = False  # so that the response does not end
        await client.send(post(b'{"prompt":"a","max_tokens":60,"n":64,"stream":true,"logprobs":9}'))
        client.transport.unsent = 0
        client.protocol.resume_writing()
        cycle, before = client.protocol.cycle, len(client.transport.written)
        change(cycle)
        return cycle.scope[WRITE_BODY_KEY](b"x" * 17), bytes(client.transport.written[before:])

    assert run(scenario()) == (written, b"11\r\n" + b"x" * 17 + b"\r\n" if written else b"")


# ---- valid requests


@pytest.mark.parametrize("size", [None, 1, 7, 64])
def test_a_request_may_arrive_in_pieces_of_any_size(size: int | None) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(REQUEST * 1, size)
        await client.send(REQUEST, size)
        return client

    client = run(scenario())
    assert client.statuses == [200, 200]
    assert not client.closed


def test_an_offer_to_upgrade_is_declined_and_the_body_read() -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")

    async def scenario(size: int | None) -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(post(b'{"prompt":"a","max_tokens":8}', *offer), size)
        await client.send(get("/version"), size)
        return client

    for size in (None, 1):
        assert run(scenario(size)).statuses == [200, 200]


@pytest.mark.parametrize(
    "connection",
    [
        ["Connection: close, Upgrade"],
        ["Connection: Upgrade, Close"],
        ["connection: upgrade", "Connection: close"],
        ["Connection:Upgrade,HTTP2-Settings ,\tclose"],
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [None, 1])
def test_a_declined_upgrade_keeps_connection_close(connection: list[str], size: int | None) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(post(b'{"prompt":"a"}', *connection, "Upgrade: h2c"), size)
        return client

    client = run(scenario())
    assert (client.statuses, client.closed) == ([200], True)
    assert b"connection: close\r\n" in client.transport.written


def as_http_1_0(request: bytes) -> bytes:
    """The same request in HTTP/1.0."""
    return request.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


STREAM = b'{"prompt":"a","max_tokens":8,"stream":true}'


@pytest.mark.parametrize(
    "headers",
    [[], ["Connection: keep-alive"], ["Connection: Upgrade", "Upgrade: h2c"], ["Expect: 100-continue"]],
    ids=str,
)
def test_an_http_1_0_stream_has_no_chunks_and_ends_with_the_connection(headers: list[str]) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(as_http_1_0(post(STREAM, *headers)))
        return client

    client = run(scenario())
    head, _, body = bytes(client.transport.written).partition(b"\r\n\r\n")
    assert (client.statuses, client.closed) == ([200], True)
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("parts", [[b"all"], [b"all ", b"", b"of it"], [b""]], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_http_1_0_response_without_a_length_ends_with_the_connection(parts: list[bytes], method: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(app=app).connect()
        await client.send(as_http_1_0(get("/", method=method)))
        return client

    client = run(scenario())
    head, _, body = bytes(client.transport.written).partition(b"\r\n\r\n")
    assert client.closed
    assert b"transfer-encoding" not in head
    assert body == (b"" if method == "HEAD" else b"".join(parts))


def test_a_content_length_is_sent_in_http_1_0_too() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(as_http_1_0(REQUEST))
        return client

    head, _, body = bytes(run(scenario()).transport.written).partition(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(body) in head
    assert json.loads(body)["object"] == "text_completion"


@pytest.mark.parametrize("parts", [[b"all of it"], [b"all ", b"of it"], [b"all of it", b""]], ids=str)
def test_a_response_is_complete_with_its_last_byte(parts: list[bytes]) -> None:
    """A client that has read as many bytes as the content length may send its next request at once."""

    async def scenario() -> InMemoryClient:
        read = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"9")]})
            for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await read.wait()
            await send({"type": "http.response.body"})

        client = InMemoryServer(app=app).connect()
        await client.send(get("/"))
        assert client.transport.written.endswith(b"all of it")
        await client.send(get("/"))
        read.set()
        await client.send(get("/"))
        return client

    client = run(scenario())
    assert (client.statuses, client.closed) == ([200, 200, 200], False)


def test_a_stream_tells_proxies_not_to_buffer_it() -> None:
    async def scenario(body: bytes) -> bytes:
        return await InMemoryServer().connect().send(post(body))

    assert b"x-accel-buffering: no\r\n" in run(scenario(STREAM))
    assert b"x-accel-buffering" not in run(scenario(b'{"prompt":"a"}'))


def test_expect_100_continue_is_answered() -> None:
    async def scenario() -> bytes:
        client = InMemoryServer().connect()
        head, _, body = post(b'{"prompt":"a"}', "Expect: 100-continue").partition(b"\r\n\r\n")
        first = await client.send(head + b"\r\n\r\n")
        assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
        return await client.send(body)

    assert b"HTTP/1.1 200 OK" in run(scenario())


# ---- time limits


def send_slowly(chunks: list[tuple[bytes, float]], limits: TransportLimits | None = None) -> InMemoryClient:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer(limits=limits or TransportLimits()).connect()
        for chunk, pause in chunks:
            if client.transport.ended or client.closed:
                break
            await client.send(chunk)
            await client.wait(pause)
        return client

    return run(scenario())


def test_a_head_has_ten_seconds_however_it_drips() -> None:
    client = send_slowly([(bytes([byte]), 1.0) for byte in REQUEST])
    assert client.statuses == [408]
    assert client.server.now == pytest.approx(1011)


def test_a_client_that_sends_nothing_is_disconnected_without_a_response() -> None:
    client = send_slowly([(b"", 12)])
    assert (client.closed, client.transport.written) == (True, b"")


@pytest.mark.parametrize("blank", [b"", b"\r\n"])
def test_the_idle_limit_ends_at_a_blank_line(blank: bytes) -> None:
    client = send_slowly([(REQUEST, 125), (blank, 4), (blank, 4)])
    assert client.closed is (not blank)
    assert client.statuses == [200]
    assert send_slowly([(REQUEST, 125), (b"\r\n", 12)]).statuses == [200, 408]


def test_a_body_must_keep_the_rate_after_the_grace_time() -> None:
    body = b'{"prompt":"' + b"a" * 4000 + b'"}'
    head, rest = post(body)[: -len(body)], body
    slow = [(head, 0.0), *((rest[at : at + 10], 1.0) for at in range(0, len(rest), 10))]
    assert send_slowly(slow).statuses == [408]
    good = [(head, 0.0), *((rest[at : at + 1030], 1.0) for at in range(0, len(rest), 1030))]
    assert send_slowly(good).statuses == [400]  # the request is complete, and its prompt is too long for the model


def test_a_body_must_be_whole_in_time_at_any_rate() -> None:
    steady = [(post(b"x" * 10**6)[: -(10**6)], 0.0), *((b"x" * 2000, 1.0) for _ in range(40))]
    client = send_slowly(steady)
    assert client.statuses == [408]
    assert client.server.now == pytest.approx(1031)


def test_chunk_extensions_do_not_count_as_progress() -> None:
    head = get("/v1/completions", "Transfer-Encoding: chunked", "Content-Type: application/json", method="POST")
    client = send_slowly([(head, 0.0), *((b"1;" + b"x" * 500 + b"\r\nx\r\n", 1.0) for _ in range(20))])
    assert client.statuses == [408]
    assert client.server.now < 1008


def test_the_rest_of_a_body_is_read_for_a_limited_time_after_an_early_response() -> None:
    wrong = post(b" " * 10**6, key="no-key-of-this-server")
    client = send_slowly([(wrong[:5000], 4.0), (wrong[5000:], 1.0), (REQUEST, 1.0)])
    assert client.statuses == [401, 200]
    client = send_slowly([(wrong[:5000], 4.0), (wrong[5000:9000], 4.0)])
    assert (client.statuses, client.closed) == ([401], True)


# ---- size limits


def test_a_head_may_be_large_but_not_larger() -> None:
    async def status(size: int, piece: int | None) -> list[int]:
        client = InMemoryServer().connect()
        await client.send(get("/version", "X-Long: " + "x" * size), piece)
        return client.statuses

    for piece in (None, 1000):
        assert run(status(32_000, piece)) == [200]
        assert run(status(33_000, piece)) == [431]
        assert run(status(300_000, piece)) == [431]


def test_headers_may_be_many_but_not_more() -> None:
    async def status(count: int) -> list[int]:
        client = InMemoryServer().connect()
        await client.send(get("/version", *(f"X-{number}: 1" for number in range(count))))
        return client.statuses

    assert run(status(98)) == [200]
    assert run(status(99)) == [431]
    assert run(status(10_000)) == [431]


def test_a_client_that_keeps_sending_after_a_rejection_is_disconnected() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        for _ in range(40):
            await client.send(b"x" * 2**16)
        return client

    client = run(scenario())
    assert client.statuses == [400]
    assert client.transport.aborted


CHUNKED = get("/v1/files", "Transfer-Encoding: chunked", "Content-Type: application/json", method="POST")


def chunks(size: int, extension: bytes = b"") -> bytes:
    """A body of 60,000 bytes in chunks of `size` bytes."""
    chunk = b"%x%s\r\n%s\r\n" % (size, extension, b" " * size)
    return chunk * (60_000 // size) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("size", "extension", "status"),
    [
        (1, b"", 400),
        (2, b"", 400),
        (5, b"", 200),
        (15, b"", 200),
        (110, b"", 200),
        (6000, b";signature=" + b"a" * 64, 200),
        (6000, b";e=" + b"a" * 20_000, 400),
        (110, b";e=" + b"a" * 1000, 400),
        (30, b' ;e="' + b"a;" * 50 + b'"', 400),
    ],
)
def test_framing_may_be_as_large_as_the_body_plus_the_limit(size: int, extension: bytes, status: int) -> None:
    async def statuses() -> list[int]:
        client = InMemoryServer(read_body, TransportLimits(max_framing=50_000)).connect()
        await client.send(CHUNKED + chunks(size, extension), 1000)
        return client.statuses

    assert run(statuses()) == [status]


def test_an_endless_chunk_extension_aborts_the_connection() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer(read_body).connect()
        await client.send(CHUNKED + b"5;")
        for _ in range(100):
            await client.send(b"a" * 2**16)
        return client

    client = run(scenario())
    assert client.statuses == [400]
    assert client.transport.aborted


def test_a_batch_of_small_lines_may_be_sent_with_one_line_per_chunk() -> None:
    """20,000 lines of about 110 bytes, and as many small lines as a batch may have."""

    async def statuses(row: bytes, count: int) -> list[int]:
        client = InMemoryServer(read_body).connect()
        await client.send(CHUNKED + b"%x\r\n%s\r\n" % (len(row), row) * count + b"0\r\n\r\n", 2**16)
        return client.statuses

    assert run(statuses(b'{"custom_id": "row-12345", "body": {"prompt": "%s"}}\n' % (b"a" * 60), 20_000)) == [200]
    assert run(statuses(b'{"prompt":""}\n', BatchLimits().max_rows)) == [200]


async def read_body(_: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_connections_are_counted_in_total_and_by_address() -> None:
    async def scenario() -> None:
        server = InMemoryServer(max_connections=5, max_per_client=3)
        first = [server.connect("10.0.0.1") for _ in range(4)]
        assert [client.statuses for client in first] == [[], [], [], [503]]
        others = [server.connect(f"10.0.0.{number}") for number in (2, 3, 4)]
        assert [client.statuses for client in others] == [[], [], [503]]
        first[0].disconnect()
        assert server.connect("10.0.0.9").statuses == []
        for client in (*first, *others):
            client.disconnect()
        assert server.context.connection_limiter.open_connections == 1

    run(scenario())


# ---- pipelined requests


def test_a_second_request_does_not_disturb_the_first_and_ends_the_connection() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(STREAM_REQUEST + REQUEST + REQUEST)
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert client.transport.written.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert client.closed


@pytest.mark.parametrize("sends", [REQUEST, b"rubbish", b"\x00" * 100, b"GET"])
def test_input_during_a_response_does_not_damage_it(sends: bytes) -> None:
    hold = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await hold.wait()
        await send({"type": "http.response.body", "body": b"all of it"})

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(app=app).connect()
        await client.send(REQUEST)
        await client.send(sends)
        hold.set()
        await client.settle()
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert b"all of it" in client.transport.written


# ---- clients that read slowly


def generate_forever(job: Job, sample: int) -> Any:
    while True:
        yield from scripted_engine.ids(" the cat sat")


def test_a_client_that_reads_nothing_is_disconnected_and_its_job_cancelled() -> None:
    engine = Engine(generate_forever, max_jobs=10)
    body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 64, "stream": True, "logprobs": 9}).encode()

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(application(engine)).connect()
        client.transport.reads = False
        await client.send(post(body))
        assert engine.jobs
        await client.wait(29)
        assert not client.closed
        await client.wait(3)
        return client

    client = run(scenario())
    assert client.transport.aborted
    assert client.transport.unsent < 2**16 + 2**14  # the bytes that the connection buffers
    assert all(each.closed or not each.live for each in engine.jobs)
    assert not client.server.state.tasks


def read_late(engine: Engine, patience: float) -> bytes:
    """The bytes that a client receives of a stream that it begins to read after two times `patience` seconds."""
    body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 64, "stream": True, "logprobs": 9}).encode()

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(application(engine)).connect()
        client.transport.reads = False
        await client.send(post(body))
        await asyncio.sleep(2 * patience)
        assert engine.jobs[0].pauses == 1  # long before the stall limit
        client.transport.reads, client.transport.unsent = True, 0
        client.protocol.resume_writing()
        for _ in range(400):
            await client.settle()
        return client

    return bytes(run(scenario()).transport.written)


def test_the_engine_waits_for_a_reader_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterword.completion.step_queue.MAX_UNREAD_BYTES", 2**20)
    received = read_late(Engine(generate_forever, max_jobs=10), 0.0)
    assert received.count(b"data: ") == 64 * 60 + 1
    assert b"data: [DONE]" in received


def test_a_reader_that_is_behind_for_too_long_gets_what_there_is_and_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterword.completion.step_queue.MAX_UNREAD_BYTES", 2**20)
    monkeypatch.setattr("afterword.completion.step_queue.READER_SECONDS", 0.01)
    received = read_late(Engine(generate_forever, max_jobs=10), 0.01)
    assert received.count(b"data: ") > 128
    assert b'"code":"reader_too_slow"' in received
    assert b"[DONE]" not in received


def test_large_events_are_not_encoded_after_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    event = incremental.event
    monkeypatch.setattr(incremental, "event", lambda *facts: made.append(facts) or event(*facts))
    fields = {"prompt": "a" * 50, "echo": True, "logprobs": 15, "n": 64, "max_tokens": 1, "stream": True}

    async def scenario() -> int:
        client = InMemoryServer(application(Engine(generate_forever, max_jobs=10))).connect()
        client.transport.reads = False
        await client.send(post(json.dumps(fields).encode()))
        before = len(made)
        client.disconnect()
        await client.settle()
        assert not client.server.state.tasks
        return len(made) - before

    assert run(scenario()) <= 3
    assert 0 < len(made) < 10


def test_a_client_that_reads_slowly_stays_connected() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.transport.reads = False
        await client.send(REQUEST)
        for _ in range(20):
            await client.wait(20)
            client.transport.unsent -= 1
        return client

    assert not run(scenario()).closed


def test_a_client_that_does_not_read_the_end_of_a_response_is_disconnected() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.transport.reads = False
        await client.send(post(b'{"prompt":"a"}', "Connection: close"))
        assert client.transport.closing
        assert not client.closed
        await client.wait(32)
        return client

    assert run(scenario()).transport.aborted


# ---- drain and disconnect


def test_a_draining_server_sends_connection_close() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.server.context.draining = True
        await client.send(REQUEST)
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert b"connection: close" in client.transport.written
    assert client.closed


def test_a_disconnect_during_the_body_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(REQUEST[:-5])
        client.disconnect()
        await client.settle()
        return client

    assert not run(scenario()).server.state.tasks
    assert not caplog.records


@pytest.mark.parametrize("problem", [None, ConnectionResetError()], ids=["closed", "reset"])
def test_nothing_keeps_a_connection_that_is_lost(problem: Exception | None) -> None:
    """Timers such as the one for an idle connection would keep it, with its last request, for minutes."""

    async def scenario() -> None:
        client = InMemoryServer().connect()
        await client.send(REQUEST)
        connection = weakref.ref(client.protocol)
        client.disconnect(problem)
        del client
        await asyncio.sleep(0)
        gc.collect()
        assert connection() is None

    run(scenario())

"""One connection at a time: what may be sent, how slowly, and how many may do so."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from in_memory_connection import Engine, InMemoryClient, InMemoryServer, application, get, post

import scripted_engine
from afterword.api.responses import incremental
from afterword.batch.batch_limits import BatchLimits
from afterword.engine.protocol import Job
from afterword.transport.transport_limits import TransportLimits

ASK = post(b'{"prompt":"a","max_tokens":8}')
ENDLESS = post(b'{"prompt":"a","max_tokens":60,"stream":true,"logprobs":5}')


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 30))


def body_of(told: bytes) -> Any:
    return json.loads(told.partition(b"\r\n\r\n")[2])


# ---- what works


@pytest.mark.parametrize("size", [None, 1, 7, 64])
def test_a_request_is_answered_however_it_is_cut(size: int | None) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(ASK * 1, size)
        await client.send(ASK, size)
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
def test_an_offer_to_upgrade_keeps_the_wish_to_close(connection: list[str], size: int | None) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(post(b'{"prompt":"a"}', *connection, "Upgrade: h2c"), size)
        return client

    client = run(scenario())
    assert (client.statuses, client.closed) == ([200], True)
    assert b"connection: close\r\n" in client.transport.written


def old(request: bytes) -> bytes:
    """The same in HTTP/1.0."""
    return request.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


STREAM = b'{"prompt":"a","max_tokens":8,"stream":true}'


@pytest.mark.parametrize(
    "headers",
    [[], ["Connection: keep-alive"], ["Connection: Upgrade", "Upgrade: h2c"], ["Expect: 100-continue"]],
    ids=str,
)
def test_a_stream_to_a_client_of_http_1_0_has_no_chunks_and_ends_with_the_connection(headers: list[str]) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(old(post(STREAM, *headers)))
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
def test_an_answer_without_a_length_ends_with_the_connection_in_http_1_0(parts: list[bytes], method: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(app=app).connect()
        await client.send(old(get("/", method=method)))
        return client

    client = run(scenario())
    head, _, body = bytes(client.transport.written).partition(b"\r\n\r\n")
    assert client.closed
    assert b"transfer-encoding" not in head
    assert body == (b"" if method == "HEAD" else b"".join(parts))


def test_an_answer_with_a_length_has_it_in_http_1_0_too() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(old(ASK))
        return client

    head, _, body = bytes(run(scenario()).transport.written).partition(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(body) in head
    assert json.loads(body)["object"] == "text_completion"


@pytest.mark.parametrize("parts", [[b"all of it"], [b"all ", b"of it"], [b"all of it", b""]], ids=str)
def test_an_answer_is_complete_with_its_last_byte(parts: list[bytes]) -> None:
    """A client that has read as many bytes as the length says may send its next request at once."""

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


def test_a_stream_asks_proxies_not_to_hold_it_back() -> None:
    async def scenario(body: bytes) -> bytes:
        return await InMemoryServer().connect().send(post(body))

    assert b"x-accel-buffering: no\r\n" in run(scenario(STREAM))
    assert b"x-accel-buffering" not in run(scenario(b'{"prompt":"a"}'))


def test_who_expects_100_is_told_to_continue() -> None:
    async def scenario() -> bytes:
        client = InMemoryServer().connect()
        head, _, body = post(b'{"prompt":"a"}', "Expect: 100-continue").partition(b"\r\n\r\n")
        first = await client.send(head + b"\r\n\r\n")
        assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
        return await client.send(body)

    assert b"HTTP/1.1 200 OK" in run(scenario())


# ---- how slowly


def slowly(chunks: list[tuple[bytes, float]], limits: TransportLimits | None = None) -> InMemoryClient:
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
    client = slowly([(bytes([byte]), 1.0) for byte in ASK])
    assert client.statuses == [408]
    assert client.server.now == pytest.approx(1011)


def test_who_says_nothing_at_all_is_let_go_without_a_word() -> None:
    client = slowly([(b"", 12)])
    assert (client.closed, client.transport.written) == (True, b"")


@pytest.mark.parametrize("blank", [b"", b"\r\n"])
def test_between_requests_there_is_time_but_a_blank_line_begins_the_next(blank: bytes) -> None:
    client = slowly([(ASK, 125), (blank, 4), (blank, 4)])
    assert client.closed is (not blank)
    assert client.statuses == [200]
    assert slowly([(ASK, 125), (b"\r\n", 12)]).statuses == [200, 408]


def test_a_body_must_keep_a_rate_after_a_grace() -> None:
    body = b'{"prompt":"' + b"a" * 4000 + b'"}'
    head, rest = post(body)[: -len(body)], body
    drip = [(head, 0.0), *((rest[at : at + 10], 1.0) for at in range(0, len(rest), 10))]
    assert slowly(drip).statuses == [408]
    good = [(head, 0.0), *((rest[at : at + 1030], 1.0) for at in range(0, len(rest), 1030))]
    assert slowly(good).statuses == [400]  # it is whole, and too long for the model


def test_a_body_must_be_whole_in_time_at_any_rate() -> None:
    steady = [(post(b"x" * 10**6)[: -(10**6)], 0.0), *((b"x" * 2000, 1.0) for _ in range(40))]
    client = slowly(steady)
    assert client.statuses == [408]
    assert client.server.now == pytest.approx(1031)


def test_an_empty_chunk_is_no_progress() -> None:
    head = get("/v1/completions", "Transfer-Encoding: chunked", "Content-Type: application/json", method="POST")
    client = slowly([(head, 0.0), *((b"1;" + b"x" * 500 + b"\r\nx\r\n", 1.0) for _ in range(20))])
    assert client.statuses == [408]
    assert client.server.now < 1008


def test_what_comes_after_an_early_answer_is_let_in_for_a_while() -> None:
    wrong = post(b" " * 10**6, key="no-key-of-this-server")
    client = slowly([(wrong[:5000], 4.0), (wrong[5000:], 1.0), (ASK, 1.0)])
    assert client.statuses == [401, 200]
    client = slowly([(wrong[:5000], 4.0), (wrong[5000:9000], 4.0)])
    assert (client.statuses, client.closed) == ([401], True)


# ---- how much


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


def test_who_goes_on_sending_after_a_refusal_is_cut() -> None:
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
    """A body of 60,000 bytes in chunks of a size."""
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
def test_framing_may_be_as_large_as_the_body_and_little_more(size: int, extension: bytes, status: int) -> None:
    async def statuses() -> list[int]:
        client = InMemoryServer(swallow, TransportLimits(max_framing=50_000)).connect()
        await client.send(CHUNKED + chunks(size, extension), 1000)
        return client.statuses

    assert run(statuses()) == [status]


def test_a_chunk_whose_extension_never_ends_is_cut() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer(swallow).connect()
        await client.send(CHUNKED + b"5;")
        for _ in range(100):
            await client.send(b"a" * 2**16)
        return client

    client = run(scenario())
    assert client.statuses == [400]
    assert client.transport.aborted


def test_a_batch_of_small_rows_may_come_a_row_a_chunk() -> None:
    """20,000 rows of some 110 bytes, and as many small ones as a batch may have."""

    async def statuses(row: bytes, count: int) -> list[int]:
        client = InMemoryServer(swallow).connect()
        await client.send(CHUNKED + b"%x\r\n%s\r\n" % (len(row), row) * count + b"0\r\n\r\n", 2**16)
        return client.statuses

    assert run(statuses(b'{"custom_id": "row-12345", "body": {"prompt": "%s"}}\n' % (b"a" * 60), 20_000)) == [200]
    assert run(statuses(b'{"prompt":""}\n', BatchLimits().max_rows)) == [200]


async def swallow(_: Any, receive: Any, send: Any) -> None:
    """An application that reads all of a body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_places_are_counted_in_all_and_by_address() -> None:
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


# ---- one at a time


def test_a_second_request_does_not_disturb_the_first_and_ends_the_connection() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(ENDLESS + ASK + ASK)
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert client.transport.written.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert client.closed


@pytest.mark.parametrize("sends", [ASK, b"rubbish", b"\x00" * 100, b"GET"])
def test_whatever_is_sent_during_an_answer_leaves_it_whole(sends: bytes) -> None:
    hold = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await hold.wait()
        await send({"type": "http.response.body", "body": b"all of it"})

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(app=app).connect()
        await client.send(ASK)
        await client.send(sends)
        hold.set()
        await client.settle()
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert b"all of it" in client.transport.written


# ---- slow readers


def endless(job: Job, sample: int) -> Any:
    while True:
        yield from scripted_engine.ids(" the cat sat")


def test_a_reader_who_takes_nothing_is_cut_and_his_job_ended() -> None:
    engine = Engine(endless, room=10)
    body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 64, "stream": True, "logprobs": 9}).encode()

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(application(engine)).connect()
        client.transport.reads = False
        await client.send(post(body))
        assert engine.runs
        await client.wait(29)
        assert not client.closed
        await client.wait(3)
        return client

    client = run(scenario())
    assert client.transport.aborted
    assert client.transport.unsent < 2**16 + 2**14  # what waited in the connection
    assert all(each.closed or not each.live for each in engine.runs)
    assert not client.server.state.tasks


def unread_stream(engine: Engine, patience: float) -> bytes:
    """What a client gets of a stream that it begins to read after a second."""
    body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 64, "stream": True, "logprobs": 9}).encode()

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(application(engine)).connect()
        client.transport.reads = False
        await client.send(post(body))
        await asyncio.sleep(2 * patience)
        assert engine.runs[0].pauses == 1  # long before it has stalled
        client.transport.reads, client.transport.unsent = True, 0
        client.protocol.resume_writing()
        for _ in range(400):
            await client.settle()
        return client

    return bytes(run(scenario()).transport.written)


def test_the_engine_waits_for_a_reader_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterword.completion.run.MAX_UNREAD_BYTES", 2**20)
    told = unread_stream(Engine(endless, room=10), 0.0)
    assert told.count(b"data: ") == 64 * 60 + 1
    assert b"data: [DONE]" in told


def test_a_reader_that_is_behind_for_too_long_gets_what_there_is_and_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterword.completion.run.MAX_UNREAD_BYTES", 2**20)
    monkeypatch.setattr("afterword.completion.run.READER_SECONDS", 0.01)
    told = unread_stream(Engine(endless, room=10), 0.01)
    assert told.count(b"data: ") > 128
    assert b'"code":"reader_too_slow"' in told
    assert b"[DONE]" not in told


def test_large_events_are_not_made_for_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    event = incremental.event
    monkeypatch.setattr(incremental, "event", lambda *facts: made.append(facts) or event(*facts))
    fields = {"prompt": "a" * 50, "echo": True, "logprobs": 15, "n": 64, "max_tokens": 1, "stream": True}

    async def scenario() -> int:
        client = InMemoryServer(application(Engine(endless, room=10))).connect()
        client.transport.reads = False
        await client.send(post(json.dumps(fields).encode()))
        before = len(made)
        client.disconnect()
        await client.settle()
        assert not client.server.state.tasks
        return len(made) - before

    assert run(scenario()) <= 3
    assert 0 < len(made) < 10


def test_a_slow_reader_who_takes_something_may_stay() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.transport.reads = False
        await client.send(ASK)
        for _ in range(20):
            await client.wait(20)
            client.transport.unsent -= 1
        return client

    assert not run(scenario()).closed


def test_who_does_not_take_the_last_of_an_answer_is_cut_too() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.transport.reads = False
        await client.send(post(b'{"prompt":"a"}', "Connection: close"))
        assert client.transport.closing
        assert not client.closed
        await client.wait(32)
        return client

    assert run(scenario()).transport.aborted


# ---- leaving


def test_when_the_server_leaves_every_answer_says_that_it_is_the_last() -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        client.server.context.draining = True
        await client.send(ASK)
        return client

    client = run(scenario())
    assert client.statuses == [200]
    assert b"connection: close" in client.transport.written
    assert client.closed


def test_a_client_that_leaves_during_its_body_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        await client.send(ASK[:-5])
        client.disconnect()
        await client.settle()
        return client

    assert not run(scenario()).server.state.tasks
    assert not caplog.records

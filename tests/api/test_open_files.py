"""A low limit of open files: connections and downloads leave enough file descriptors for a new worker process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from completion_requests import complete, wait_until
from test_files import upload

MAX_FILES = 256
CONTENT = b"x" * 8_000_000  # bytes; more than the buffers of a connection hold
LIMIT_FILES = ("sh", "-c", f'ulimit -n {MAX_FILES} && exec "$@"', "sh")
ASK = {"prompt": "Once upon a time", "max_tokens": 3}


@pytest.fixture(scope="module")
def limited_server(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    where = str(tmp_path_factory.mktemp("data") / "batches")
    with serve("--parallel", "1", "--batch-dir", where, key=None, before=LIMIT_FILES) as server:
        yield server


def connect_clients(server: Any, request: bytes, stack: ExitStack) -> list[socket.socket]:
    """150 connected clients that have sent a request and read up to 12 bytes of its response."""
    host, port = server.url.removeprefix("http://").split(":")
    clients = [stack.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(150)]
    for client in clients:
        client.sendall(request)
    for client in clients:
        client.recv(12)
    return clients


def worker_of(server: Any) -> psutil.Process:
    (worker,) = [each for each in psutil.Process(server.pid).children() if each.status() != "zombie"]
    return worker


@pytest.mark.parametrize("kind", ["downloads", "uploads", "pages"])
def test_an_engine_that_dies_is_replaced_beside_a_crowd(limited_server, kind):
    with limited_server.http() as http, ExitStack() as stack:
        file = upload(http, CONTENT).json()["id"]
        connect_clients(limited_server, requests(kind, file), stack)
        assert psutil.Process(limited_server.pid).num_fds() <= MAX_FILES - 100
        restarts = http.get("/ready").json()["restarts"]
        worker_of(limited_server).kill()
        wait_until(lambda: (state := http.get("/ready").json())["status"] == "ready" and state["restarts"] > restarts)
        assert complete(http, **ASK)
        assert http.get(f"/v1/files/{file}").status_code == 200, "files can be read too"
    with limited_server.http() as http:
        wait_until(lambda: http.get("/ready").status_code == 200)


def requests(kind: str, file: str) -> bytes:
    if kind == "downloads":
        return b"GET /v1/files/%s/content HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % file.encode()
    if kind == "uploads":
        return (
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"y" * 5000
        )
    return b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

"""A real server during shutdown and at its limit of open files. The gates in tests/chaos repeat this many times."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import wait_until

ENDLESS = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("second_signal", [False, True], ids=["grace period over", "second signal"])
def test_streams_beyond_the_grace_period_end_with_an_error(serve: Any, second_signal: bool) -> None:
    seconds = "1000" if second_signal else "0"
    with serve("--parallel", "1", "--drain-delay", seconds, "--grace", seconds) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(server.pid, signal.SIGTERM)
            if second_signal:
                wait_until(lambda: http.get("/ready").status_code == 503)
                os.kill(server.pid, signal.SIGTERM)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_is_overloaded"
        # The fixture sends one more signal, which would end a process that is about to exit with another status.
        wait_until(lambda: psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE)


def test_a_draining_server_reports_it_and_still_answers(serve: Any) -> None:
    with serve("--parallel", "1", "--drain-delay", "1000") as server, server.http() as http:
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/ready").json()["status"] == "draining"
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_the_server_survives_the_limit_of_open_files(serve: Any) -> None:
    with serve("--parallel", "1", key=None) as server, server.http() as http:
        assert http.get("/version").status_code == 200
        port, process = httpx.URL(server.url).port, psutil.Process(server.pid)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 3, hard))
        with ExitStack() as connections:
            for _ in range(30):
                connections.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert http.get("/version").status_code == 200  # the existing connection is still served
        with server.http() as other:
            wait_until(lambda: is_answering(other))
        assert process.is_running()


def is_answering(http: httpx.Client) -> bool:
    try:
        return http.get("/version").status_code == 200
    except httpx.TransportError:
        return False

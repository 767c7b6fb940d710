"""A real server at its limits and at its end: gates in tests/chaos do the same in numbers."""

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


@pytest.mark.parametrize("hurried", [False, True], ids=["too late", "hurried"])
def test_what_does_not_end_in_time_says_so_and_the_exit_is_clean(serve: Any, hurried: bool) -> None:
    seconds = "1000" if hurried else "0"
    with serve("--parallel", "1", "--drain-delay", seconds, "--grace", seconds) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(server.pid, signal.SIGTERM)
            if hurried:
                wait_until(lambda: http.get("/ready").status_code == 503)
                os.kill(server.pid, signal.SIGTERM)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_is_overloaded"


def test_it_says_at_once_that_it_ends_and_answers_on(serve: Any) -> None:
    with serve("--parallel", "1", "--drain-delay", "1000") as server, server.http() as http:
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/ready").json()["status"] == "draining"
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_it_survives_that_no_more_files_can_be_opened(serve: Any) -> None:
    with serve("--parallel", "1", key=None) as server, server.http() as http:
        assert http.get("/version").status_code == 200
        port, process = httpx.URL(server.url).port, psutil.Process(server.pid)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 3, hard))
        with ExitStack() as visitors:
            for _ in range(30):
                visitors.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert http.get("/version").status_code == 200  # those who are there are served
        with server.http() as other:
            wait_until(lambda: answers(other))
        assert process.is_running()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/version").status_code == 200
    except httpx.TransportError:
        return False

"""`afterword complete --url`: what a server says, as if the model ran here."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from afterword.cli import main
from afterword.cli.remote_complete import parse_events

STORY = ("complete", "Once upon a time", "--max-tokens", "12", "--seed", "7")


def afterword(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(main, words, env=environment, prog_name="afterword")


@pytest.fixture(scope="module")
def server(serve: Any) -> Iterator[Any]:
    with serve("--parallel", "2") as server:
        yield server


def test_a_server_says_what_the_model_says_here(server):
    here = afterword(*STORY)
    there = afterword(*STORY, "--url", server.url, "--api-key", server.key)
    assert there.exit_code == 0, there.output
    assert there.stdout == here.stdout
    assert afterword(*STORY, "--url", f"{server.url}/v1/", OPENAI_API_KEY=server.key).stdout == here.stdout
    gap = ("complete", "One day", "--suffix", " The end.", "--max-tokens", "5", "--seed", "1", "--stop", ".")
    assert afterword(*gap, "--url", server.url, "--api-key", server.key).stdout == afterword(*gap).stdout


def test_the_answer_comes_whole_as_json(server):
    shown = afterword(*STORY, "--json", "--model", "afterword-tiny", "--url", server.url, "--api-key", server.key)
    answer = json.loads(shown.stdout)
    assert answer["choices"][0]["text"] + "\n" == afterword(*STORY).stdout
    assert answer["usage"]["completion_tokens"] == 12


def test_what_a_server_refuses_is_one_sentence(server):
    wrong = afterword(*STORY, "--url", server.url, "--api-key", "wrong")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("afterword: Incorrect API key provided")
    other = afterword(*STORY, "--model", "gpt", "--url", server.url, "--api-key", server.key)
    assert "The model `gpt` does not exist" in other.stderr


def test_what_cannot_be_asked_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = afterword(*STORY, "--url", f"http://127.0.0.1:{port}")
    assert (nobody.exit_code, nobody.stdout) == (1, "")
    assert "cannot be asked" in nobody.stderr
    assert nobody.stderr.count("\n") == 1
    assert "write http://" in afterword(*STORY, "--url", "localhost:8000").stderr


@contextmanager
def saying(status: int, body: bytes) -> Iterator[str]:
    """A server of someone else's that always answers this."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


SEPARATORS = "\u2028\u2029\u0085\u000b\u000c\u001c\u001d\u001e"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("text", [f"a{letter}b" for letter in SEPARATORS] + [SEPARATORS, "a\rb"], ids=ascii)
def test_only_the_ends_of_lines_end_an_event(end, text):
    told = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False)
    body = f": a comment{end}data: {told}{end}{end}data:{told}{end}{end}data: [DONE]{end}{end}".encode()
    with saying(200, body) as url:
        result = afterword(*STORY, "--url", url)
    assert (result.exit_code, result.stdout_bytes.decode()) == (0, text * 2 + "\n")


def test_events_are_whole_however_they_are_cut():
    body = 'data: {"a":"\u2028é"}\r\n\r\ndata:1\n\nevent: x\ndata: broken off'.encode()
    for size in range(1, len(body)):
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert [*parse_events(parts)] == ['{"a":"\u2028é"}'.encode(), b"1"]


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        (404, b"<html>", 2, "The server answered 404."),
        (500, b'{"error": {"message": "Broken."}}', 1, "afterword: Broken."),
        (200, b'data: {"choices": [{"text": "a"}]}\n\n', 1, "broke off"),
        (
            200,
            b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "Gone."}}\n\n',
            1,
            "afterword: Gone.",
        ),
        (200, b"data: {\n\n", 1, "is no server of completions"),
        (200, b"data: 7\n\n", 1, "is no server of completions"),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(status, body, code, said):
    with saying(status, body) as url:
        result = afterword(*STORY, "--url", url)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_options_that_would_do_nothing_are_refused():
    assert "--threads is for a model that runs here" in afterword(*STORY, "--url", "http://a", "--threads", "1").stderr
    assert "--api-key goes with --url" in afterword(*STORY, "--api-key", "a").stderr
    assert afterword(*STORY, OPENAI_API_KEY="a").exit_code == 0

"""`afterword complete --url`: the same output as with a local model, and one-line errors."""

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


def test_a_server_gives_the_same_text_as_a_local_model(server):
    here = afterword(*STORY)
    there = afterword(*STORY, "--url", server.url, "--api-key", server.key)
    assert there.exit_code == 0, there.output
    assert there.stdout == here.stdout
    assert afterword(*STORY, "--url", f"{server.url}/v1/", OPENAI_API_KEY=server.key).stdout == here.stdout
    gap = ("complete", "One day", "--suffix", " The end.", "--max-tokens", "5", "--seed", "1", "--stop", ".")
    assert afterword(*gap, "--url", server.url, "--api-key", server.key).stdout == afterword(*gap).stdout


def test_json_prints_the_whole_response(server):
    shown = afterword(*STORY, "--json", "--model", "afterword-tiny", "--url", server.url, "--api-key", server.key)
    answer = json.loads(shown.stdout)
    assert answer["choices"][0]["text"] + "\n" == afterword(*STORY).stdout
    assert answer["usage"]["completion_tokens"] == 12


def test_an_error_of_the_server_is_one_line(server):
    wrong = afterword(*STORY, "--url", server.url, "--api-key", "wrong")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("afterword: Incorrect API key provided")
    other = afterword(*STORY, "--model", "gpt", "--url", server.url, "--api-key", server.key)
    assert "The model `gpt` does not exist" in other.stderr


def test_an_unreachable_server_is_a_one_line_error():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    result = afterword(*STORY, "--url", f"http://127.0.0.1:{port}")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "The request to http" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Write http://" in afterword(*STORY, "--url", "localhost:8000").stderr


@contextmanager
def fixed_response(status: int, body: bytes) -> Iterator[str]:
    """A server that sends the same response to every request."""

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
def test_only_lf_and_cr_lf_end_an_event(end, text):
    data = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False)
    body = f": a comment{end}data: {data}{end}{end}data:{data}{end}{end}data: [DONE]{end}{end}".encode()
    with fixed_response(200, body) as url:
        result = afterword(*STORY, "--url", url)
    assert (result.exit_code, result.stdout_bytes.decode()) == (0, text * 2 + "\n")


def test_events_are_parsed_from_pieces_of_any_size():
    body = 'data: {"a":"\u2028é"}\r\n\r\ndata:1\n\nevent: x\ndata: broken off'.encode()
    for size in range(1, len(body)):
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert [*parse_events(parts)] == ['{"a":"\u2028é"}'.encode(), b"1"]


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (404, b"<html>", 2, "The server responded with status 404."),
        (500, b'{"error": {"message": "Broken."}}', 1, "afterword: Broken."),
        (200, b'data: {"choices": [{"text": "a"}]}\n\n', 1, "ended before it was complete"),
        (
            200,
            b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "Gone."}}\n\n',
            1,
            "afterword: Gone.",
        ),
        (200, b"data: {\n\n", 1, "is not a stream of completions"),
        (200, b"data: 7\n\n", 1, "is not a stream of completions"),
    ],
)
def test_an_invalid_response_is_a_one_line_error(status, body, code, message):
    with fixed_response(status, body) as url:
        result = afterword(*STORY, "--url", url)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_options_without_effect_are_refused():
    assert "--threads cannot be used with --url" in afterword(*STORY, "--url", "http://a", "--threads", "1").stderr
    assert "--api-key cannot be used without --url" in afterword(*STORY, "--api-key", "a").stderr
    assert afterword(*STORY, OPENAI_API_KEY="a").exit_code == 0

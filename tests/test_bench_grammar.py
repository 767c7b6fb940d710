"""The measurement of grammars: what llama-server is asked for, and what it says about a server that cannot answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.grammar import Turns, cases
from bench.grammar_peer import LlamaServer, NotWritten


def server(answer: httpx.Response | httpx.TransportError, bodies: list[dict[str, object]]) -> LlamaServer:
    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer

    found = LlamaServer("http://peer", 3, 60)
    found._http = httpx.Client(base_url="http://peer", transport=httpx.MockTransport(respond))
    return found


@pytest.mark.parametrize("case", cases(5), ids=lambda case: case.name)
def test_each_text_is_asked_for_with_the_grammar_and_its_length(case: object) -> None:
    bodies: list[dict[str, object]] = []
    peer = server(httpx.Response(200, json={"tokens_predicted": 5}), bodies)
    peer.seconds(case.for_llama_server, 5)  # type: ignore[attr-defined]
    assert len(bodies) == 3
    assert all(body["n_predict"] == 5 and ("json_schema" in body) != ("grammar" in body) for body in bodies)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.Response(200, json={"tokens_predicted": 4}), "a text has 4 tokens"),
        (httpx.Response(400, text="no such\ngrammar"), "no such grammar"),
        (httpx.ReadTimeout("slow"), "no response in 60 s"),
        (httpx.ConnectError("gone"), "no response: ConnectError"),
    ],
)
def test_what_is_not_written_has_a_reason(answer: httpx.Response | httpx.TransportError, reason: str) -> None:
    with pytest.raises(NotWritten, match=reason):
        server(answer, []).seconds({}, 5)


def test_a_line_has_the_milliseconds_of_a_step_and_the_differences_in_the_turns() -> None:
    columns = Turns([1.0, 1.0, 9.0], [1.5, 1.5, 9.0]).columns(100).split()
    assert columns == ["10.00", "15.00", "50.0%", "0.0", "to", "50.0", "(3)"]
    assert Turns([1.0], [], "no response").columns(100).strip() == "no response"

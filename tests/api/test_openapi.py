"""`/openapi.json`: the document is of this server, whole, and right about its own examples."""

from __future__ import annotations

import httpx
import jsonschema_rs
from asking import complete, problem, stream

from afterword.api.app import GUARDED, OPEN


def test_the_document_has_every_route_and_every_method(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    routes = {(route.path.replace(":path", ""), method) for route in (*OPEN, *GUARDED) for method in route.methods}
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}


def test_answers_are_as_the_document_says(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    def check(name: str, value: object) -> None:
        described = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema_rs.validate(described, value)

    more = {"logprobs": 2, "echo": True, "return_token_ids": True}
    check("CompletionRequest", {"prompt": "Once", "max_tokens": 3, **more})
    check("Completion", complete(http, prompt="Once", max_tokens=3, prompt_logprobs=1, **more))
    for chunk in stream(http, prompt="Once", max_tokens=3, stream_options={"include_usage": True}, **more):
        check("Chunk", chunk)
    check("Error", {"error": problem(http.post("/v1/completions", json={"n": 0}), 400)})
    check("Models", http.get("/v1/models").json())
    check("Tokenizer", http.get("/tokenizer_info").json())

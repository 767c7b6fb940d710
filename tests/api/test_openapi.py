"""`/openapi.json`: it has all routes and fields, its examples are valid, and responses match its schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
from completion_requests import complete, problem, stream

from afterword.api.app import PROTECTED_ROUTES, PUBLIC_ROUTES
from afterword.api.specification.document import ERRORS
from afterword.completion.request import parse, schema
from afterword.completion.request_limits import RequestLimits
from afterword.errors import AfterwordError


def test_the_document_has_every_route_and_every_method(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    routes = {
        (route.path.replace(":path", ""), method)
        for route in (*PUBLIC_ROUTES, *PROTECTED_ROUTES)
        for method in route.methods
    }
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}


def test_every_operation_has_a_name_and_a_group_and_the_document_the_address(http: httpx.Client, server: Any) -> None:
    document = http.get("/openapi.json").json()
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    names = [each["operationId"] for each in operations]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z][A-Za-z]+", name) for name in names)
    groups = {tag["name"] for tag in document["tags"]}
    assert {tag for each in operations for tag in each["tags"]} == groups
    assert all(len(each["tags"]) == 1 for each in operations)
    assert document["servers"] == [{"url": server.url}]


def test_responses_match_the_openapi_document(http: httpx.Client) -> None:
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


# ---- descriptions and examples


def members(schema: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every member of the objects within a schema, with its dotted name."""
    if isinstance(schema, list):
        for each in schema:
            yield from members(each, name)
    elif isinstance(schema, dict):
        for member, inner in schema.get("properties", {}).items():
            yield f"{name}.{member}", inner
            yield from members(inner, f"{name}.{member}")
        for part in ("items", "anyOf", "additionalProperties"):
            yield from members(schema.get(part), name)


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas of all request bodies, with their paths."""
    for path, methods in document["paths"].items():
        for described in methods.values():
            for content in described.get("requestBody", {}).get("content", {}).values():
                schema = content["schema"]
                name = schema.get("$ref", "").rpartition("/")[2]
                yield path, document["components"]["schemas"][name] if name else schema


def test_every_request_field_has_a_description_and_a_valid_example(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, body in bodies(document):
        for name, each in members(body, path):
            assert each.get("description"), f"{name}: see completion/request_descriptions.py"
            assert each.get("examples") or each.get("format") == "binary", (
                f"{name}: see completion/request_descriptions.py"
            )
            for example in each.get("examples", ()):
                jsonschema_rs.validate(each, example)
        for example in body.get("examples", ()):
            jsonschema_rs.validate(body, example)
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert all(each["description"] for operation in operations for each in operation.get("parameters", ()))


def test_every_response_member_has_a_description_and_an_example(http: httpx.Client) -> None:
    components = http.get("/openapi.json").json()["components"]
    for name, described in components["schemas"].items():
        assert described.get("examples"), f"{name}: see specification/field_descriptions.py"
        shown = json.dumps(described["examples"])
        for example in described["examples"]:
            jsonschema_rs.validate({"$ref": f"#/components/schemas/{name}", "components": components}, example)
        for member, each in members(described, name):
            assert each.get("description"), f"{member}: see specification/field_descriptions.py"
            *parents, own = member.split(".")
            if name not in ("CompletionRequest", "InfillRequest") and not any(
                f'"{parent}": null' in shown for parent in parents
            ):
                assert f'"{own}":' in shown, f"{member} is in no example"


def test_the_examples_of_the_document_work(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    (example,) = document["components"]["schemas"]["CompletionRequest"]["examples"]
    assert example["model"] == http.get("/v1/models").json()["data"][0]["id"]
    assert http.post("/v1/completions", json=example).status_code == 200
    for path in ("/tokenize", "/detokenize"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert http.post(path, json=schema["examples"][0]).status_code == 200


def test_defaults_are_those_of_the_parser() -> None:
    described = schema(RequestLimits())["properties"]
    absent = parse(b'{"prompt": "a"}', RequestLimits())
    for name, each in described.items():
        known = tuple(each["default"]) if isinstance(each["default"], list) else each["default"]
        assert known == getattr(absent, name) or (known is None and getattr(absent, name) in ((), None, ("a",)))


def _error_statuses(kind: type[AfterwordError]) -> set[int]:
    return {kind.status}.union(*map(_error_statuses, kind.__subclasses__()))


def test_every_status_of_an_error_is_described() -> None:
    assert _error_statuses(AfterwordError) <= ERRORS.keys()


def enumerations(schema: Any) -> Iterator[list[Any]]:
    """All lists of allowed values in a document."""
    if isinstance(schema, dict):
        if isinstance(schema.get("enum"), list):
            yield schema["enum"]
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        yield from enumerations(part)


def test_generators_can_make_constants_of_enumerations(http: httpx.Client) -> None:
    """They write values in capitals, with `_` for all other signs. They cannot name true, false, or null alone."""
    found = list(enumerations(http.get("/openapi.json").json()))
    assert len(found) > 3
    for values in found:
        texts = [value for value in values if isinstance(value, str)]
        assert texts, values
        assert set(values) - {None} == set(texts), values
        assert len({re.sub(r"\W", "_", text).upper() for text in texts}) == len(texts), values

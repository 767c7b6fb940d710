"""`GET /openapi.json`: the API described in its own words, from the parsers that read requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.routes.models import json_response
from afterword.api.service import Service
from afterword.api.specification import batch_schemas
from afterword.api.specification.field_descriptions import DESCRIPTIONS, REQUEST_SCHEMAS, described_schemas
from afterword.api.specification.response_schemas import RESPONSE_SCHEMAS, JsonSchema, array_schema, or_null, ref
from afterword.completion.request import schema
from afterword.completion.request_descriptions import described_schema, description
from afterword.config import Config

ERRORS = {
    400: "The request is at fault; `param` names the field.",
    401: "No key, or an unknown one.",
    403: "A web page that may not.",
    404: "No such model or path.",
    405: "Not with this method.",
    408: "Head or body did not come in time.",
    409: "A batch still reads the file.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A limit of the key is reached; try again after `Retry-After`, if there is one.",
    431: "The head is too large.",
    500: "The server is at fault.",
    503: "Too much to do, or the engine is being replaced; try again after `Retry-After`.",
    507: "The server has no room for files.",
}
"""Every status that an error can have."""

STREAMS = (
    "With `stream` the answer is a text/event-stream: each event is `data: ` and a Chunk, or an Error if the answer "
    "breaks off; after the last chunk comes `data: [DONE]`."
)
"""OpenAPI 3.1 has no words for the events of a stream, so beside this `x-event` says what one is."""


async def openapi(request: Request) -> Response:
    """The document, for this server's settings and model."""
    service: Service = request.app.state.service
    service.models.check_started()
    loaded = [
        len(managed_model.loaded_engine.model_info.pieces)
        for managed_model in service.models
        if managed_model.loaded_engine
    ]
    model = next(managed_model.id for managed_model in service.models)
    return json_response(document(service.config, max(loaded, default=2**31), model))


def document(config: Config, vocabulary: int, model: str) -> JsonSchema:
    """OpenAPI 3.1. `vocabulary`: no model has more tokens. `model`: the name of one, for examples."""
    example = {"model": model, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.8, "stream": True}
    asked = schema(config.limits) | {"examples": [example]}
    locked: JsonSchema = {"security": [{"key": []}]} if config.requires_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Afterword", "version": __version__},
        "paths": _paths(config, vocabulary),
        "components": {
            "schemas": described_schemas(RESPONSE_SCHEMAS) | batch_schemas.ANSWERS | {"CompletionRequest": asked},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        **locked,
    }


def _paths(config: Config, vocabulary: int) -> JsonSchema:
    token: JsonSchema = {"type": "integer", "minimum": 0, "maximum": vocabulary - 1}
    text = _body("Tokenize", ["prompt"], prompt={"type": "string"}, add_special_tokens=or_null({"type": "boolean"}))
    name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    } | description("The model's name; it may have slashes in it.")
    spelled = _body("Detokenize", ["tokens"], tokens=array_schema(token))
    answer = _json(ref("Completion")) | {"text/event-stream": {"x-event": ref("Chunk")}}
    completion = _operation("create a completion", answer, ref("CompletionRequest")) | {"description": STREAMS}
    return {
        "/v1/completions": {"post": completion},
        "/v1/models": {"get": _operation("list what is served", _json(ref("Models")))},
        "/v1/models/{model}": {"get": _operation("one model", _json(ref("Model"))) | {"parameters": [name]}},
        **batch_schemas.paths(_operation),
        "/tokenize": {"post": _operation("a text's tokens", _json(ref("Tokens")), text)},
        "/detokenize": {"post": _operation("the text of tokens", _json(ref("Text")), spelled)},
        "/tokenizer_info": {"get": _operation("special tokens and sizes", _json(ref("Tokenizer")))},
        "/version": {"get": _operation("the server's version", _json(ref("Version")))},
        "/metrics": {"get": _operation("figures for Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
        "/openapi.json": {"get": _operation("this document", _json({"type": "object"}))},
        "/health": {"get": _status("whether the server lives")},
        "/ready": {"get": _status("whether requests are answered, and how busy it is")},
    }


def _operation(summary: str, content: JsonSchema, body: JsonSchema | None = None) -> JsonSchema:
    answers: JsonSchema = {str(status): _answer(why, _json(ref("Error"))) for status, why in ERRORS.items()}
    taken: JsonSchema = {"requestBody": {"required": True, "content": _json(body)}} if body else {}
    return {"summary": summary, "responses": {"200": _answer(summary, content), **answers}, **taken}


def _status(summary: str) -> JsonSchema:
    said_there: JsonSchema = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    state = _json(described_schema(said_there, "Status", DESCRIPTIONS))
    return {"summary": summary, "security": [], "responses": {code: _answer(summary, state) for code in ("200", "503")}}


def _answer(description: str, content: JsonSchema) -> JsonSchema:
    return {"description": description, "content": content}


def _json(value: JsonSchema) -> JsonSchema:
    return {"application/json": {"schema": value}}


def _body(name: str, required: list[str], **properties: JsonSchema) -> JsonSchema:
    properties["model"] = or_null({"type": "string"})
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    example = {member: REQUEST_SCHEMAS[f"{name}.{member}"]["examples"][0] for member in required}
    return described_schema(body, name, REQUEST_SCHEMAS) | {"examples": [example]}

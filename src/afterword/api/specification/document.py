"""`GET /openapi.json`: the OpenAPI document. The schemas of requests come from the parsers that read them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.routes.models import json_response
from afterword.api.service import Service
from afterword.api.specification import batch_schemas
from afterword.api.specification.field_descriptions import DESCRIPTIONS, REQUEST_SCHEMAS, described_schemas
from afterword.api.specification.response_schemas import RESPONSE_SCHEMAS, JsonSchema, array_schema, or_null, ref
from afterword.completion.infill_request import infill_schema
from afterword.completion.request import schema
from afterword.completion.request_descriptions import described_schema, description
from afterword.config import Config

ERRORS = {
    400: "The request is invalid; `param` names the field.",
    401: "The API key is missing or invalid.",
    403: "The origin of the web page is not allowed, or the API key may not do this.",
    404: "The model, object or path does not exist.",
    405: "The path does not have this method.",
    408: "The request head or body did not arrive in time.",
    409: "A batch still uses the file.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A limit of the API key is reached; retry after `Retry-After`, if that header is present.",
    431: "The request head is too large.",
    500: "The server failed.",
    503: "The server is overloaded, or its worker process is restarting; retry after `Retry-After`.",
    504: "The request waited too long in the queue and was not started.",
    505: "The request is not HTTP/1.0 or HTTP/1.1.",
    507: "The server cannot store files.",
}
"""The HTTP statuses of errors in the document, with their descriptions."""

TAGS = {
    "completions": "Texts that continue prompts.",
    "models": "The served models.",
    "files": "Uploaded files for batches, and their results.",
    "batches": "Files of requests that are answered in the background.",
    "tokenizer": "The tokenizer of a model.",
    "server": "The state of the server.",
}
"""Groups of operations, with their descriptions."""

OPERATIONS = {
    ("post", "/v1/completions"): ("createCompletion", "completions"),
    ("post", "/infill"): ("createInfill", "completions"),
    ("get", "/v1/models"): ("listModels", "models"),
    ("get", "/v1/models/{model}"): ("retrieveModel", "models"),
    ("post", "/v1/load_lora_adapter"): ("loadAdapter", "models"),
    ("post", "/v1/unload_lora_adapter"): ("unloadAdapter", "models"),
    ("post", "/v1/files"): ("createFile", "files"),
    ("get", "/v1/files"): ("listFiles", "files"),
    ("get", "/v1/files/{id}"): ("retrieveFile", "files"),
    ("delete", "/v1/files/{id}"): ("deleteFile", "files"),
    ("get", "/v1/files/{id}/content"): ("downloadFile", "files"),
    ("post", "/v1/batches"): ("createBatch", "batches"),
    ("get", "/v1/batches"): ("listBatches", "batches"),
    ("get", "/v1/batches/{id}"): ("retrieveBatch", "batches"),
    ("post", "/v1/batches/{id}/cancel"): ("cancelBatch", "batches"),
    ("post", "/tokenize"): ("tokenize", "tokenizer"),
    ("post", "/detokenize"): ("detokenize", "tokenizer"),
    ("get", "/tokenizer_info"): ("getTokenizerInfo", "tokenizer"),
    ("get", "/version"): ("getVersion", "server"),
    ("get", "/metrics"): ("getMetrics", "server"),
    ("get", "/openapi.json"): ("getOpenapi", "server"),
    ("get", "/health"): ("getHealth", "server"),
    ("get", "/ready"): ("getReady", "server"),
}
"""`operationId` and tag by method and path. The names of OpenAI's own operations are those of its document."""

STREAMS = (
    "With `stream` the response is a text/event-stream. Each event is `data: ` and a Chunk, or an Error that ends an "
    "incomplete response. `data: [DONE]` follows the last chunk."
)
"""OpenAPI 3.1 cannot describe the events of a stream. This text does, and the member `x-event` names their schema."""


INFILL_STREAMS = (
    "With `stream` the response is a text/event-stream whose events are `data: ` and an Infill. `stop` is true in the "
    "last event of each middle. With `response_fields` a response has only these members; with `n_cmpl` above 1 it is "
    "an array."
)
"""The description of `/infill`."""


async def openapi(request: Request) -> Response:
    """The document for the settings and models of this server."""
    service: Service = request.app.state.service
    service.models.check_started()
    loaded = [
        len(managed_model.loaded_engine.model_info.pieces)
        for managed_model in service.models
        if managed_model.loaded_engine
    ]
    model = next(managed_model.id for managed_model in service.models)
    url = str(request.base_url).rstrip("/")
    return json_response(document(service.config, max(loaded, default=2**31), model, url))


def document(config: Config, vocabulary: int, model: str, url: str) -> JsonSchema:
    """An OpenAPI 3.1 document. `vocabulary`: tokens of the largest vocabulary. `model`: a model name for examples.

    `url`: the address at which the client reached the server.
    """
    example = {"model": model, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.8, "stream": True}
    request_schema = schema(config.limits) | {"examples": [example]}
    security: JsonSchema = {"security": [{"key": []}]} if config.requires_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Afterword", "version": __version__},
        "servers": [{"url": url}],
        "tags": [description(text) | {"name": name} for name, text in TAGS.items()],
        "paths": _named(_paths(config, vocabulary)),
        "components": {
            "schemas": described_schemas(RESPONSE_SCHEMAS)
            | batch_schemas.BATCH_RESPONSE_SCHEMAS
            | {"CompletionRequest": request_schema, "InfillRequest": infill_schema(config.limits)},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        **security,
    }


def _paths(config: Config, vocabulary: int) -> JsonSchema:
    token: JsonSchema = {"type": "integer", "minimum": 0, "maximum": vocabulary - 1}
    model = or_null({"type": "string"})
    flag = or_null({"type": "boolean"})
    text = _body("Tokenize", ["prompt"], prompt={"type": "string"}, add_special_tokens=flag, model=model)
    name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    } | description("The model's name, which may contain slashes.")
    tokens = _body("Detokenize", ["tokens"], tokens=array_schema(token), model=model)
    content = _json(ref("Completion")) | {"text/event-stream": {"x-event": ref("Chunk")}}
    completion = _operation("create a completion", content, ref("CompletionRequest")) | {"description": STREAMS}
    middle: JsonSchema = {"anyOf": [ref("Infill"), array_schema(ref("Infill"))]}
    filled = _json(middle) | {"text/event-stream": {"x-event": ref("Infill")}}
    infill = _operation("fill a gap, with llama-server's fields", filled, ref("InfillRequest"))
    return {
        "/v1/completions": {"post": completion},
        "/infill": {"post": infill | {"description": INFILL_STREAMS}},
        "/v1/models": {"get": _operation("list the models", _json(ref("Models")))},
        "/v1/models/{model}": {"get": _operation("get a model", _json(ref("Model"))) | {"parameters": [name]}},
        **_adapter_paths(),
        **batch_schemas.paths(_operation),
        "/tokenize": {"post": _operation("tokenize a text", _json(ref("Tokens")), text)},
        "/detokenize": {"post": _operation("get the text of tokens", _json(ref("Text")), tokens)},
        "/tokenizer_info": {"get": _operation("get special tokens and sizes", _json(ref("Tokenizer")))},
        "/version": {"get": _operation("get the server's version", _json(ref("Version")))},
        "/metrics": {"get": _operation("get metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
        "/openapi.json": {"get": _operation("get this document", _json({"type": "object"}))},
        "/health": {"get": _status("check whether the server works")},
        "/ready": {"get": _status("check whether the server accepts requests, and its load")},
    }


def _adapter_paths() -> JsonSchema:
    answer: JsonSchema = {"text/plain": {"schema": {"type": "string"}}}
    load = _body(
        "LoadAdapter",
        ["lora_name", "lora_path"],
        lora_name={"type": "string", "minLength": 1, "maxLength": 256},
        lora_path={"type": "string", "minLength": 1, "maxLength": 4096},
        load_inplace=or_null({"type": "boolean"}),
    )
    unload = _body("UnloadAdapter", ["lora_name"], lora_name={"type": "string"}, lora_int_id={"type": "null"})
    return {
        "/v1/load_lora_adapter": {"post": _operation("serve an adapter", answer, load)},
        "/v1/unload_lora_adapter": {"post": _operation("serve an adapter no longer", answer, unload)},
    }


def _named(paths: JsonSchema) -> JsonSchema:
    """The paths with the `operationId` and the tag of each operation. Generated clients name functions by them."""
    return {
        path: {
            method: {"operationId": OPERATIONS[method, path][0], "tags": [OPERATIONS[method, path][1]], **operation}
            for method, operation in operations.items()
        }
        for path, operations in paths.items()
    }


def _operation(summary: str, content: JsonSchema, body: JsonSchema | None = None) -> JsonSchema:
    responses: JsonSchema = {str(status): _response(text, _json(ref("Error"))) for status, text in ERRORS.items()}
    request_body: JsonSchema = {"requestBody": {"required": True, "content": _json(body)}} if body else {}
    return {"summary": summary, "responses": {"200": _response(summary, content), **responses}, **request_body}


def _status(summary: str) -> JsonSchema:
    body: JsonSchema = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    state = _json(described_schema(body, "Status", DESCRIPTIONS))
    return {
        "summary": summary,
        "security": [],
        "responses": {code: _response(summary, state) for code in ("200", "503")},
    }


def _response(description: str, content: JsonSchema) -> JsonSchema:
    return {"description": description, "content": content}


def _json(value: JsonSchema) -> JsonSchema:
    return {"application/json": {"schema": value}}


def _body(name: str, required: list[str], **properties: JsonSchema) -> JsonSchema:
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    example = {member: REQUEST_SCHEMAS[f"{name}.{member}"]["examples"][0] for member in required}
    return described_schema(body, name, REQUEST_SCHEMAS) | {"examples": [example]}

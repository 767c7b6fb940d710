"""What `/openapi.json` says of files and batches: their paths, bodies and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from afterword.api.routes import batches, files
from afterword.api.specification.response_schemas import (
    COUNT,
    FLAG,
    TEXT,
    JsonSchema,
    array_schema,
    constant,
    object_schema,
    or_null,
    ref,
)
from afterword.batch.file_store import BatchStatus
from afterword.batch.input_lines import ENDPOINT
from afterword.completion.request_descriptions import described_schema, description

Operation = Callable[..., JsonSchema]
"""Makes an operation of a summary, an answer's content, and a body's schema."""

_WHEN = {name: or_null(COUNT) for name, _ in batches.TIMES}
_METADATA: JsonSchema = {
    "type": "object",
    "maxProperties": batches.MOST_METADATA,
    "propertyNames": {"maxLength": batches.LONGEST_KEY},
    "additionalProperties": {"type": "string", "maxLength": batches.LONGEST_VALUE},
}
_FILE = object_schema(
    id=TEXT,
    object=constant("file"),
    bytes=COUNT,
    created_at=COUNT,
    expires_at=or_null(COUNT),
    filename=TEXT,
    purpose={"enum": [*files.PURPOSES]},
    status=constant("processed"),
)
_ERROR = object_schema(code=TEXT, line=or_null(COUNT), message=TEXT, param=or_null(TEXT))
_BATCH = object_schema(
    id=TEXT,
    object=constant("batch"),
    endpoint=constant(ENDPOINT),
    errors=or_null(object_schema(object=constant("list"), data=array_schema(_ERROR))),
    input_file_id=TEXT,
    completion_window=constant(batches.WINDOW),
    status={"enum": [*get_args(BatchStatus)]},
    output_file_id=or_null(TEXT),
    error_file_id=or_null(TEXT),
    created_at=COUNT,
    expires_at=COUNT,
    **_WHEN,
    request_counts=object_schema(total=COUNT, completed=COUNT, failed=COUNT),
    usage=object_schema(
        input_tokens=COUNT,
        input_tokens_details=object_schema(cached_tokens=COUNT),
        output_tokens=COUNT,
        output_tokens_details=object_schema(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    ),
    metadata=or_null(_METADATA),
)


def _list(item: str) -> JsonSchema:
    ends = or_null(TEXT)
    return object_schema(
        object=constant("list"), data=array_schema(ref(item)), first_id=ends, last_id=ends, has_more=FLAG
    )


_DESCRIPTIONS = {
    "File.id": "Its name.",
    "File.object": "What this is.",
    "File.bytes": "Its size.",
    "File.created_at": "When it came, in Unix seconds.",
    "File.expires_at": "When it is removed, in Unix seconds; null: when it is deleted.",
    "File.filename": "What it was called.",
    "File.purpose": "batch: it was uploaded; batch_output: a batch wrote it.",
    "File.status": "Always processed.",
    "DeletedFile.id": "What it was named.",
    "DeletedFile.object": "What it was.",
    "DeletedFile.deleted": "Always true.",
    "Batch.id": "Its name.",
    "Batch.object": "What this is.",
    "Batch.endpoint": "What its requests are for.",
    "Batch.errors": "Why it has failed.",
    "Batch.errors.object": "What this is.",
    "Batch.errors.data": "What is wrong, at most 100 of it.",
    "Batch.errors.data.code": "The kind of mistake.",
    "Batch.errors.data.line": "The line of the input whose fault it is, if it is one's.",
    "Batch.errors.data.message": "In a sentence.",
    "Batch.errors.data.param": "Always null.",
    "Batch.input_file_id": "The file of requests.",
    "Batch.completion_window": "After so long what is not answered is given up.",
    "Batch.status": "What it is at.",
    "Batch.output_file_id": "The file of answers, when it has ended and there are some.",
    "Batch.error_file_id": "The file of errors, when it has ended and there are some.",
    "Batch.created_at": "When it was made, in Unix seconds.",
    "Batch.expires_at": "When it will be given up.",
    **{f"Batch.{name}": f"When it became {status}." for name, status in batches.TIMES},
    "Batch.request_counts": "How many of its requests are where.",
    "Batch.request_counts.total": "All of them.",
    "Batch.request_counts.completed": "Answered.",
    "Batch.request_counts.failed": "With an error.",
    "Batch.usage": "What the answers have used.",
    "Batch.usage.input_tokens": "Tokens of the prompts.",
    "Batch.usage.input_tokens_details": "Of them.",
    "Batch.usage.input_tokens_details.cached_tokens": "Tokens that had been computed before.",
    "Batch.usage.output_tokens": "Tokens of the texts.",
    "Batch.usage.output_tokens_details": "Of them.",
    "Batch.usage.output_tokens_details.reasoning_tokens": "Always 0.",
    "Batch.usage.total_tokens": "Both together.",
    "Batch.metadata": "What it was made with.",
    **{
        f"{name}.{member}": text
        for name in ("Files", "Batches")
        for member, text in {
            "object": "What this is.",
            "data": "Some of them.",
            "first_id": "The first of these.",
            "last_id": "The last of these: what to ask for more after.",
            "has_more": "Whether there are more.",
        }.items()
    },
}
_FILE_EXAMPLE = {
    "id": "file-c510f9ba236dbb7f539123238985da5d",
    "object": "file",
    "bytes": 5019,
    "created_at": 1795406827,
    "expires_at": None,
    "filename": "in.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_BATCH_EXAMPLE: dict[str, Any] = {
    "id": "batch_0b2cfca6fd9936f4b4a34627d07b0084",
    "object": "batch",
    "endpoint": ENDPOINT,
    "errors": None,
    "input_file_id": _FILE_EXAMPLE["id"],
    "completion_window": batches.WINDOW,
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1795406827,
    "expires_at": 1795493227,
    **{name: 1795406828 if status == "in_progress" else None for name, status in batches.TIMES},
    "request_counts": {"total": 40, "completed": 12, "failed": 0},
    "usage": {
        "input_tokens": 186,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 195,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 381,
    },
    "metadata": {"run": "7"},
}
_EXAMPLES: dict[str, tuple[JsonSchema, dict[str, Any]]] = {
    "File": (_FILE, _FILE_EXAMPLE),
    "Files": (_list("File"), files.list_object([_FILE_EXAMPLE], False)),
    "DeletedFile": (
        object_schema(id=TEXT, object=constant("file"), deleted={"const": True}),
        {"id": _FILE_EXAMPLE["id"], "object": "file", "deleted": True},
    ),
    "Batch": (_BATCH, _BATCH_EXAMPLE),
    "Batches": (_list("Batch"), files.list_object([_BATCH_EXAMPLE], False)),
}
_MEMBER_DESCRIPTIONS = {name: description(text) for name, text in _DESCRIPTIONS.items()}
ANSWERS: dict[str, JsonSchema] = {
    name: described_schema(schema, name, _MEMBER_DESCRIPTIONS) | {"examples": [example]}
    for name, (schema, example) in _EXAMPLES.items()
}
"""Every object that is answered with, by its name, with meanings and an example."""


def _request_bodies() -> tuple[JsonSchema, JsonSchema]:
    """Bodies: of an upload, and of a new batch."""
    upload: JsonSchema = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary"} | description("The file."),
            "purpose": constant("batch") | description("What it is for.", "batch"),
            files.ANCHOR: constant("created_at") | description("From when on the next field is counted.", "created_at"),
            files.SECONDS: {"type": "integer", "minimum": files.SHORTEST, "maximum": files.LONGEST}
            | description("Seconds after which the file is removed.", files.SHORTEST),
        },
        "required": ["file", "purpose"],
        "additionalProperties": False,
    }
    batch: JsonSchema = {
        "type": "object",
        "properties": {
            "input_file_id": TEXT | description("The file of requests.", _FILE_EXAMPLE["id"]),
            "endpoint": constant(ENDPOINT) | description("What the requests are for.", ENDPOINT),
            "completion_window": constant(batches.WINDOW) | description("How long it may take.", batches.WINDOW),
            "metadata": or_null(_METADATA) | description("Whatever you want to find there again.", {"run": "7"}),
        },
        "required": ["input_file_id", "endpoint", "completion_window"],
        "additionalProperties": False,
    }
    example = {"input_file_id": _FILE_EXAMPLE["id"], "endpoint": ENDPOINT, "completion_window": batches.WINDOW}
    return upload, batch | {"examples": [example]}


def paths(operation: Operation) -> JsonSchema:
    """What can be asked, by path and method."""
    upload, batch = _request_bodies()
    after = _query("after", TEXT, "Begin after this one.")
    named: JsonSchema = {"parameters": [_parameter("id", "path", {"type": "string", "minLength": 1}, "Its ID.")]}
    some_files: JsonSchema = {
        "parameters": [
            after,
            _query("limit", {"type": "integer", "minimum": 1, "maximum": files.MAX_LISTED}, "Most to list."),
            _query("order", {"enum": ["asc", "desc"]}, "By age; the newest first by default."),
            _query("purpose", {"enum": [*files.PURPOSES]}, "Only these."),
        ]
    }
    most_batches = _query("limit", {"type": "integer", "minimum": 1, "maximum": batches.MAX_LISTED}, "Most to list.")
    form: JsonSchema = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": upload}}}}
    whole: JsonSchema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "/v1/files": {
            "post": operation("upload a file", _json("File")) | form,
            "get": operation("list files", _json("Files")) | some_files,
        },
        "/v1/files/{id}": {
            "get": operation("one file", _json("File")) | named,
            "delete": operation("delete a file", _json("DeletedFile")) | named,
        },
        "/v1/files/{id}/content": {"get": operation("what is in a file", whole) | named},
        "/v1/batches": {
            "post": operation("create a batch", _json("Batch"), batch),
            "get": operation("list batches", _json("Batches")) | {"parameters": [after, most_batches]},
        },
        "/v1/batches/{id}": {"get": operation("one batch", _json("Batch")) | named},
        "/v1/batches/{id}/cancel": {"post": operation("cancel a batch", _json("Batch")) | named},
    }


def _json(name: str) -> JsonSchema:
    return {"application/json": {"schema": ref(name)}}


def _query(name: str, schema: JsonSchema, meaning: str) -> JsonSchema:
    return _parameter(name, "query", schema, meaning)


def _parameter(name: str, place: str, schema: JsonSchema, meaning: str) -> JsonSchema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema} | description(meaning)

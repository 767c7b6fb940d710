"""The part of the OpenAPI document about files and batches: paths, request bodies, responses and descriptions."""

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
from afterword.batch.input_lines import ENDPOINT
from afterword.batch.stored_items import BatchStatus
from afterword.completion.request_descriptions import described_schema, description

Operation = Callable[..., JsonSchema]
"""A function from a summary, the content of the response and a request body's schema to an OpenAPI operation."""

_TIMES = {name: or_null(COUNT) for name, _ in batches.TIMES}
_METADATA: JsonSchema = {
    "type": "object",
    "maxProperties": batches.MAX_METADATA_MEMBERS,
    "propertyNames": {"maxLength": batches.MAX_METADATA_NAME},
    "additionalProperties": {"type": "string", "maxLength": batches.MAX_METADATA_VALUE},
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
    **_TIMES,
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
    id_or_null = or_null(TEXT)
    return object_schema(
        object=constant("list"), data=array_schema(ref(item)), first_id=id_or_null, last_id=id_or_null, has_more=FLAG
    )


_DESCRIPTIONS = {
    "File.id": "The ID of the file.",
    "File.object": "The type of this object.",
    "File.bytes": "The size in bytes.",
    "File.created_at": "The time of the upload, in Unix seconds.",
    "File.expires_at": "The time at which the server deletes the file, in Unix seconds; null: never.",
    "File.filename": "The file name that the client sent.",
    "File.purpose": "batch: a client uploaded it; batch_output: a batch wrote it.",
    "File.status": "Always processed.",
    "DeletedFile.id": "The ID of the deleted file.",
    "DeletedFile.object": "The type of the deleted object.",
    "DeletedFile.deleted": "Always true.",
    "Batch.id": "The ID of the batch.",
    "Batch.object": "The type of this object.",
    "Batch.endpoint": "The endpoint of its requests.",
    "Batch.errors": "The errors in the input file of a failed batch; otherwise null.",
    "Batch.errors.object": "The type of this object.",
    "Batch.errors.data": "The errors, at most 100.",
    "Batch.errors.data.code": "The code of the error.",
    "Batch.errors.data.line": "The number of the wrong line in the input file; null if the error is not in one line.",
    "Batch.errors.data.message": "A description of the error.",
    "Batch.errors.data.param": "Always null.",
    "Batch.input_file_id": "The ID of the input file.",
    "Batch.completion_window": "The time after which the batch expires; requests without a response then get an error.",
    "Batch.status": "The current status.",
    "Batch.output_file_id": "The ID of the file with the responses; null while the batch runs and if there are none.",
    "Batch.error_file_id": "The ID of the file with the errors; null while the batch runs and if there are none.",
    "Batch.created_at": "The time of creation, in Unix seconds.",
    "Batch.expires_at": "The time at which the batch expires, in Unix seconds.",
    **{
        f"Batch.{name}": f"The time at which the status became {status}, in Unix seconds."
        for name, status in batches.TIMES
    },
    "Batch.request_counts": "The numbers of requests in the batch.",
    "Batch.request_counts.total": "All requests.",
    "Batch.request_counts.completed": "Requests with a successful response.",
    "Batch.request_counts.failed": "Requests with an error.",
    "Batch.usage": "The tokens used by all responses.",
    "Batch.usage.input_tokens": "Tokens in the prompts.",
    "Batch.usage.input_tokens_details": "Details of input_tokens.",
    "Batch.usage.input_tokens_details.cached_tokens": "Tokens taken from the prefix cache.",
    "Batch.usage.output_tokens": "Tokens in the generated texts.",
    "Batch.usage.output_tokens_details": "Details of output_tokens.",
    "Batch.usage.output_tokens_details.reasoning_tokens": "Always 0.",
    "Batch.usage.total_tokens": "The sum of input_tokens and output_tokens.",
    "Batch.metadata": "The metadata from the request that created the batch.",
    **{
        f"{name}.{member}": text
        for name in ("Files", "Batches")
        for member, text in {
            "object": "The type of this object.",
            "data": "The objects on this page.",
            "first_id": "The ID of the first object on this page.",
            "last_id": "The ID of the last object on this page: the value of after for the next page.",
            "has_more": "Whether more objects follow after this page.",
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
BATCH_RESPONSE_SCHEMAS: dict[str, JsonSchema] = {
    name: described_schema(schema, name, _MEMBER_DESCRIPTIONS) | {"examples": [example]}
    for name, (schema, example) in _EXAMPLES.items()
}
"""The schemas of all response objects, by name, with descriptions and an example each."""


def _request_bodies() -> tuple[JsonSchema, JsonSchema]:
    """The schemas of two request bodies: of a file upload and of a new batch."""
    upload: JsonSchema = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary"} | description("The file to upload."),
            "purpose": constant("batch") | description("The purpose of the file.", "batch"),
            files.ANCHOR: constant("created_at")
            | description("The time from which expires_after[seconds] counts.", "created_at"),
            files.SECONDS: {"type": "integer", "minimum": files.MIN_LIFETIME, "maximum": files.MAX_LIFETIME}
            | description("Seconds after which the server deletes the file.", files.MIN_LIFETIME),
        },
        "required": ["file", "purpose"],
        "additionalProperties": False,
    }
    batch: JsonSchema = {
        "type": "object",
        "properties": {
            "input_file_id": TEXT | description("The ID of the input file.", _FILE_EXAMPLE["id"]),
            "endpoint": constant(ENDPOINT) | description("The endpoint of the requests.", ENDPOINT),
            "completion_window": constant(batches.WINDOW)
            | description("The time after which the batch expires.", batches.WINDOW),
            "metadata": or_null(_METADATA) | description("Texts of your own, returned with the batch.", {"run": "7"}),
        },
        "required": ["input_file_id", "endpoint", "completion_window"],
        "additionalProperties": False,
    }
    example = {"input_file_id": _FILE_EXAMPLE["id"], "endpoint": ENDPOINT, "completion_window": batches.WINDOW}
    return upload, batch | {"examples": [example]}


def paths(operation: Operation) -> JsonSchema:
    """The operations, by path and method."""
    upload, batch = _request_bodies()
    after = _query("after", TEXT, "List the objects after the one with this ID.")
    with_id: JsonSchema = {
        "parameters": [_parameter("id", "path", {"type": "string", "minLength": 1}, "The ID of the object.")]
    }
    file_query: JsonSchema = {
        "parameters": [
            after,
            _query(
                "limit", {"type": "integer", "minimum": 1, "maximum": files.MAX_LISTED}, "The most objects to list."
            ),
            _query("order", {"enum": ["asc", "desc"]}, "The order by age; desc, the default, lists the newest first."),
            _query("purpose", {"enum": [*files.PURPOSES]}, "List only files with this purpose."),
        ]
    }
    most_batches = {"type": "integer", "minimum": 1, "maximum": batches.MAX_LISTED}
    batch_query: JsonSchema = {"parameters": [after, _query("limit", most_batches, "The most objects to list.")]}
    form: JsonSchema = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": upload}}}}
    content: JsonSchema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "/v1/files": {
            "post": operation("upload a file", _json("File")) | form,
            "get": operation("list files", _json("Files")) | file_query,
        },
        "/v1/files/{id}": {
            "get": operation("get a file", _json("File")) | with_id,
            "delete": operation("delete a file", _json("DeletedFile")) | with_id,
        },
        "/v1/files/{id}/content": {"get": operation("get the content of a file", content) | with_id},
        "/v1/batches": {
            "post": operation("create a batch", _json("Batch"), batch),
            "get": operation("list batches", _json("Batches")) | batch_query,
        },
        "/v1/batches/{id}": {"get": operation("get a batch", _json("Batch")) | with_id},
        "/v1/batches/{id}/cancel": {"post": operation("cancel a batch", _json("Batch")) | with_id},
    }


def _json(name: str) -> JsonSchema:
    return {"application/json": {"schema": ref(name)}}


def _query(name: str, schema: JsonSchema, text: str) -> JsonSchema:
    return _parameter(name, "query", schema, text)


def _parameter(name: str, location: str, schema: JsonSchema, text: str) -> JsonSchema:
    return {"name": name, "in": location, "required": location == "path", "schema": schema} | description(text)

"""What every answer looks like, as JSON Schemas. They are complete: a member that is not here is not in an answer."""

from __future__ import annotations

from typing import Any

JsonSchema = dict[str, Any]

TEXT: JsonSchema = {"type": "string"}
COUNT: JsonSchema = {"type": "integer", "minimum": 0}
FLAG: JsonSchema = {"type": "boolean"}
NUMBER: JsonSchema = {"type": "number"}


def array_schema(items: JsonSchema) -> JsonSchema:
    """A list of one kind of thing."""
    return {"type": "array", "items": items}


def mapping(values: JsonSchema) -> JsonSchema:
    """An object whose keys are data."""
    return {"type": "object", "additionalProperties": values}


def constant(value: str) -> JsonSchema:
    """Always the same text."""
    return {"type": "string", "const": value}


def or_null(schema: JsonSchema) -> JsonSchema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def object_schema(sometimes: tuple[str, ...] = (), /, **properties: JsonSchema) -> JsonSchema:
    """An object with these members, of which some are not always there, and no others."""
    required = [name for name in properties if name not in sometimes]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def ref(name: str) -> JsonSchema:
    """One of `RESPONSE_SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


_RANKED = object_schema(logprob=or_null(NUMBER), rank=COUNT, decoded_token=TEXT)
_CHOICE = object_schema(
    ("token_ids", "prompt_token_ids", "prompt_logprobs"),
    text=TEXT,
    index=COUNT,
    logprobs=or_null(ref("Logprobs")),
    finish_reason={"enum": ["stop", "length", None]},
    token_ids=array_schema(COUNT),
    prompt_token_ids=array_schema(COUNT),
    prompt_logprobs=array_schema(or_null(mapping(_RANKED))),
)
_COMPLETION = {
    "id": TEXT,
    "object": constant("text_completion"),
    "created": COUNT,
    "model": TEXT,
    "system_fingerprint": TEXT,
    "choices": array_schema(_CHOICE),
}

RESPONSE_SCHEMAS: dict[str, JsonSchema] = {
    "Completion": object_schema(**_COMPLETION, usage=ref("Usage")),
    "Chunk": object_schema(("usage",), **_COMPLETION, usage=or_null(ref("Usage"))),
    "Logprobs": object_schema(
        text_offset=array_schema(COUNT),
        token_logprobs=array_schema(or_null(NUMBER)),
        tokens=array_schema(TEXT),
        top_logprobs=or_null(array_schema(or_null(mapping(NUMBER)))),
    ),
    "Usage": object_schema(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        completion_tokens_details=object_schema(
            accepted_prediction_tokens=COUNT,
            audio_tokens=COUNT,
            reasoning_tokens=COUNT,
            rejected_prediction_tokens=COUNT,
        ),
        prompt_tokens_details=object_schema(audio_tokens=COUNT, cached_tokens=COUNT),
    ),
    "Error": object_schema(error=object_schema(message=TEXT, type=TEXT, param=or_null(TEXT), code=or_null(TEXT))),
    "Model": object_schema(
        id=TEXT,
        object=constant("model"),
        created=COUNT,
        owned_by=TEXT,
        status={"enum": ["unloaded", "starting", "ready", "restarting", "failing", "closed"]},
        max_model_len=COUNT,
        system_fingerprint=or_null(TEXT),
        reproducible={"enum": ["exact", "reproducible", "none"]},
        infill=or_null(FLAG),
    ),
    "Models": object_schema(object=constant("list"), data=array_schema(ref("Model"))),
    "Tokens": object_schema(tokens=array_schema(COUNT), count=COUNT, max_model_len=COUNT),
    "Text": object_schema(prompt=TEXT),
    "Tokenizer": object_schema(
        vocab_size=COUNT,
        model_max_length=COUNT,
        add_bos_token=FLAG,
        bos_token=or_null(TEXT),
        bos_token_id=or_null(COUNT),
        eos_token=or_null(TEXT),
        eos_token_id=or_null(COUNT),
    ),
    "Version": object_schema(version=TEXT),
}
"""Every object that is answered with, by its name."""

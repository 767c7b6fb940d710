"""JSON Schemas of all responses but those of files and batches. They are complete: a response has no other members."""

from __future__ import annotations

from typing import Any

JsonSchema = dict[str, Any]

TEXT: JsonSchema = {"type": "string"}
COUNT: JsonSchema = {"type": "integer", "minimum": 0}
FLAG: JsonSchema = {"type": "boolean"}
NUMBER: JsonSchema = {"type": "number"}


def array_schema(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def mapping(values: JsonSchema) -> JsonSchema:
    """An object with arbitrary keys."""
    return {"type": "object", "additionalProperties": values}


def constant(value: str) -> JsonSchema:
    """A string with only one allowed value."""
    return {"type": "string", "const": value}


def or_null(schema: JsonSchema) -> JsonSchema:
    """`schema`, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def object_schema(optional: tuple[str, ...] = (), /, **properties: JsonSchema) -> JsonSchema:
    """An object with exactly these members, of which those in `optional` may be absent."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def ref(name: str) -> JsonSchema:
    """A reference to a schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


_RANKED = object_schema(logprob=or_null(NUMBER), rank=or_null(COUNT), decoded_token=TEXT)
_CHOICE = object_schema(
    ("token_ids", "prompt_token_ids", "prompt_logprobs"),
    text=TEXT,
    index=COUNT,
    logprobs=or_null(ref("Logprobs")),
    finish_reason={"enum": ["stop", "length", "repetition", None]},
    token_ids=array_schema(COUNT),
    prompt_token_ids=array_schema(COUNT),
    prompt_logprobs=or_null(array_schema(or_null(mapping(_RANKED)))),
)
_COMPLETION = {
    "id": TEXT,
    "object": constant("text_completion"),
    "created": COUNT,
    "model": TEXT,
    "system_fingerprint": TEXT,
    "choices": array_schema(_CHOICE),
}

_INFILL = {
    "index": COUNT,
    "content": TEXT,
    "tokens": array_schema(COUNT),
    "id_slot": {"type": "integer"},
    "stop": FLAG,
    "model": TEXT,
    "tokens_predicted": COUNT,
    "tokens_evaluated": COUNT,
    "generation_settings": object_schema(
        n_ctx=COUNT,
        n_predict={"type": "integer", "minimum": -1},
        n_indent=COUNT,
        temperature=NUMBER,
        top_k=COUNT,
        top_p=NUMBER,
        min_p=NUMBER,
        repeat_penalty=NUMBER,
        presence_penalty=NUMBER,
        frequency_penalty=NUMBER,
        seed={"type": "integer", "minimum": -1},
        stop=array_schema(TEXT),
    ),
    "has_new_line": FLAG,
    "truncated": FLAG,
    "stop_type": {"enum": ["eos", "word", "limit"]},
    "stopping_word": TEXT,
    "tokens_cached": COUNT,
    "timings": object_schema(
        cache_n=COUNT,
        prompt_n=COUNT,
        prompt_ms=NUMBER,
        prompt_per_token_ms=NUMBER,
        prompt_per_second=NUMBER,
        predicted_n=COUNT,
        predicted_ms=NUMBER,
        predicted_per_token_ms=NUMBER,
        predicted_per_second=NUMBER,
    ),
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
    # response_fields leaves members out, and adds paths as names
    "Infill": object_schema(tuple(_INFILL), **_INFILL) | {"additionalProperties": True},
    "Error": object_schema(error=object_schema(message=TEXT, type=TEXT, param=or_null(TEXT), code=or_null(TEXT))),
    "Model": object_schema(
        id=TEXT,
        object=constant("model"),
        created=COUNT,
        owned_by=TEXT,
        root=TEXT,
        parent=or_null(TEXT),
        defaults=mapping({}),
        status={"enum": ["unloaded", "starting", "ready", "restarting", "failing", "closed"]},
        max_model_len=COUNT,
        system_fingerprint=or_null(TEXT),
        reproducible={"enum": ["exact", "reproducible", "none"]},
        infill=or_null(FLAG),
        infill_family=or_null(TEXT),
        infill_files=or_null(FLAG),
        prediction=or_null(FLAG),
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
"""The schemas of response objects, by name."""

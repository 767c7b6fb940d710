"""What every answer looks like, as JSON Schemas. They are complete: a member that is not here is not in an answer."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}


def array(items: Schema) -> Schema:
    """A list of one kind of thing."""
    return {"type": "array", "items": items}


def table(values: Schema) -> Schema:
    """An object whose keys are data."""
    return {"type": "object", "additionalProperties": values}


def constant(value: str) -> Schema:
    """Always the same text."""
    return {"type": "string", "const": value}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def members(sometimes: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with these members, of which some are not always there, and no others."""
    required = [name for name in properties if name not in sometimes]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def ref(name: str) -> Schema:
    """One of `ANSWERS`."""
    return {"$ref": f"#/components/schemas/{name}"}


_RANKED = members(logprob=or_null(NUMBER), rank=COUNT, decoded_token=TEXT)
_CHOICE = members(
    ("token_ids", "prompt_token_ids", "prompt_logprobs"),
    text=TEXT,
    index=COUNT,
    logprobs=or_null(ref("Logprobs")),
    finish_reason={"enum": ["stop", "length", None]},
    token_ids=array(COUNT),
    prompt_token_ids=array(COUNT),
    prompt_logprobs=array(or_null(table(_RANKED))),
)
_COMPLETION = {
    "id": TEXT,
    "object": constant("text_completion"),
    "created": COUNT,
    "model": TEXT,
    "system_fingerprint": TEXT,
    "choices": array(_CHOICE),
}

ANSWERS: dict[str, Schema] = {
    "Completion": members(**_COMPLETION, usage=ref("Usage")),
    "Chunk": members(("usage",), **_COMPLETION, usage=or_null(ref("Usage"))),
    "Logprobs": members(
        text_offset=array(COUNT),
        token_logprobs=array(or_null(NUMBER)),
        tokens=array(TEXT),
        top_logprobs=or_null(array(or_null(table(NUMBER)))),
    ),
    "Usage": members(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        completion_tokens_details=members(
            accepted_prediction_tokens=COUNT,
            audio_tokens=COUNT,
            reasoning_tokens=COUNT,
            rejected_prediction_tokens=COUNT,
        ),
        prompt_tokens_details=members(audio_tokens=COUNT, cached_tokens=COUNT),
    ),
    "Error": members(error=members(message=TEXT, type=TEXT, param=or_null(TEXT), code=or_null(TEXT))),
    "Model": members(
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
    "Models": members(object=constant("list"), data=array(ref("Model"))),
    "Tokens": members(tokens=array(COUNT), count=COUNT, max_model_len=COUNT),
    "Text": members(prompt=TEXT),
    "Tokenizer": members(
        vocab_size=COUNT,
        model_max_length=COUNT,
        add_bos_token=FLAG,
        bos_token=or_null(TEXT),
        bos_token_id=or_null(COUNT),
        eos_token=or_null(TEXT),
        eos_token_id=or_null(COUNT),
    ),
    "Version": members(version=TEXT),
}
"""Every object that is answered with, by its name."""

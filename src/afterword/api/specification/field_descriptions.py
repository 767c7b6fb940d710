"""Descriptions of the members of responses, and an example of each response, for `/openapi.json` and `/docs`."""

from __future__ import annotations

from typing import Any

from afterword.api.specification.response_schemas import JsonSchema
from afterword.completion.request_descriptions import described_schema, description

_MEMBER_TEXTS: dict[str, str] = {
    "Completion.id": "The ID of this response.",
    "Completion.object": "The type of this object.",
    "Completion.created": "The time at which the server received the request, in Unix seconds.",
    "Completion.model": "The model that generated the text.",
    "Completion.system_fingerprint": "The same fingerprint, request and seed give the same response.",
    "Completion.choices": "The choices, n per prompt, in the order of the prompts.",
    "Completion.choices.text": "The generated text; with echo, the prompt and the generated text.",
    "Completion.choices.index": "The number of this choice, from 0.",
    "Completion.choices.logprobs": "Log probabilities of the tokens; null if the request did not set logprobs.",
    "Completion.choices.finish_reason": "stop: an end token or a stop string ended the text; length: max_tokens did.",
    "Completion.choices.token_ids": "With return_token_ids: the ids of all generated tokens, even if not in the text.",
    "Completion.choices.prompt_token_ids": "With return_token_ids: the token ids of the prompt as the model read it.",
    "Completion.choices.prompt_logprobs": "With prompt_logprobs: for each token, log probabilities by token id.",
    "Completion.choices.prompt_logprobs.logprob": "The log probability of the token.",
    "Completion.choices.prompt_logprobs.rank": "The rank of the token; 1 for the most likely one.",
    "Completion.choices.prompt_logprobs.decoded_token": "The text of the token.",
    "Completion.usage": "The numbers of tokens used.",
    "Chunk.choices": "One choice with its new text and tokens; empty in a last chunk that has the usage.",
    "Chunk.choices.text": "The new text of the choice.",
    "Chunk.choices.finish_reason": "null before the last chunk of the choice.",
    "Chunk.usage": "The numbers of tokens used; stream_options states in which chunks.",
    "Logprobs.text_offset": "The position of each token, in characters from the start of the prompt.",
    "Logprobs.token_logprobs": "The log probability of each token; null for the first token of a prompt.",
    "Logprobs.tokens": "Each token's text, or bytes:\\x… if the token is not a whole character.",
    "Logprobs.top_logprobs": "The most likely tokens at each position; the token itself comes first.",
    "Usage.prompt_tokens": "Tokens in the prompts; each prompt counts once.",
    "Usage.completion_tokens": "Tokens in the texts of all candidates.",
    "Usage.total_tokens": "The sum of prompt_tokens and completion_tokens.",
    "Usage.completion_tokens_details": "Details of completion_tokens.",
    "Usage.completion_tokens_details.accepted_prediction_tokens": "Tokens of the prediction in the texts.",
    "Usage.completion_tokens_details.audio_tokens": "Always 0.",
    "Usage.completion_tokens_details.reasoning_tokens": "Always 0.",
    "Usage.completion_tokens_details.rejected_prediction_tokens": "Tokens of the prediction that were verified and are "
    "not in the texts. They are not part of completion_tokens.",
    "Usage.prompt_tokens_details": "Details of prompt_tokens.",
    "Usage.prompt_tokens_details.audio_tokens": "Always 0.",
    "Usage.prompt_tokens_details.cached_tokens": "Tokens taken from the prefix cache.",
    "Infill.index": "The number of this middle, from 0.",
    "Infill.content": "The text of the middle; in a stream, the new text.",
    "Infill.tokens": "With return_tokens: the ids of the generated tokens, even if not in the text.",
    "Infill.id_slot": "Always -1.",
    "Infill.stop": "false in the events of a stream before the last one of the middle.",
    "Infill.model": "The model that generated the text.",
    "Infill.tokens_predicted": "The number of generated tokens.",
    "Infill.tokens_evaluated": "The number of tokens of the prompt as the model read it.",
    "Infill.generation_settings": "The settings of the request, and the size of the context.",
    "Infill.generation_settings.n_ctx": "The most tokens of a prompt and its middle together.",
    "Infill.generation_settings.n_predict": "The field n_predict.",
    "Infill.generation_settings.n_indent": "The field n_indent.",
    "Infill.generation_settings.temperature": "The temperature, 1 if it is not among the samplers.",
    "Infill.generation_settings.top_k": "The field top_k, 0 if it is not among the samplers.",
    "Infill.generation_settings.top_p": "The field top_p, 1 if it is not among the samplers.",
    "Infill.generation_settings.min_p": "The field min_p, 0 if it is not among the samplers; at least 0.2 with infill.",
    "Infill.generation_settings.repeat_penalty": "The field repeat_penalty, 1 without the sampler penalties.",
    "Infill.generation_settings.presence_penalty": "The field presence_penalty, 0 without the sampler penalties.",
    "Infill.generation_settings.frequency_penalty": "The field frequency_penalty, 0 without the sampler penalties.",
    "Infill.generation_settings.seed": "The field seed.",
    "Infill.generation_settings.stop": "The field stop.",
    "Infill.has_new_line": "Whether the text has a line end.",
    "Infill.truncated": "Whether the end of the context ended the text.",
    "Infill.stop_type": "eos: an end token ended the text; word: a stop string; limit: a number of tokens, n_indent or "
    "t_max_predict_ms.",
    "Infill.stopping_word": "The stop string that ended the text.",
    "Infill.tokens_cached": "The number of tokens of the prompt and of the middle.",
    "Infill.timings": "Numbers of tokens and times.",
    "Infill.timings.cache_n": "Tokens taken from the prefix cache.",
    "Infill.timings.prompt_n": "Tokens of the prompt that were computed.",
    "Infill.timings.prompt_ms": "Milliseconds until the first token, including the wait in the queue.",
    "Infill.timings.prompt_per_token_ms": "prompt_ms for each of these tokens.",
    "Infill.timings.prompt_per_second": "These tokens per second.",
    "Infill.timings.predicted_n": "Generated tokens of all middles.",
    "Infill.timings.predicted_ms": "Milliseconds from the first token to the end.",
    "Infill.timings.predicted_per_token_ms": "predicted_ms for each generated token.",
    "Infill.timings.predicted_per_second": "Generated tokens per second.",
    "Error.error": "The error.",
    "Error.error.message": "A description of the error.",
    "Error.error.type": "The kind of error: for example an invalid request, a rate limit or a failure of the server.",
    "Error.error.param": "The name of the invalid field; null if the error is not in one field.",
    "Error.error.code": "The code of the error; null if it has none.",
    "Model.id": "The name of the model in requests.",
    "Model.object": "The type of this object.",
    "Model.created": "The time of the last change of the model's file, in Unix seconds.",
    "Model.owned_by": "Always afterword.",
    "Model.root": "The model that computes for this name; another name than id if an operator gave the model several.",
    "Model.parent": "The model to which this one adds a LoRA adapter; null if it has none.",
    "Model.defaults": "The operator's default values of request fields for this name.",
    "Model.status": "The state of the model, such as ready or unloaded.",
    "Model.max_model_len": "The most tokens of a prompt and its completion together.",
    "Model.system_fingerprint": "The fingerprint in its responses; null until the model has been loaded once.",
    "Model.reproducible": "exact: a token has the same log probability whether it is in the prompt or generated; "
    "reproducible: the same request gets the same response; none: no promise.",
    "Model.infill": "Whether the model supports suffix; null until the model has been loaded once.",
    "Model.infill_family": "The layout of prompts with suffix: a model family, other, custom or rerank; null for none.",
    "Model.infill_files": "Whether the model supports input_extra; null until the model has been loaded once.",
    "Model.prediction": "Whether prediction can make responses faster; null until the model has been loaded once.",
    "Models.object": "The type of this object.",
    "Models.data": "All models of this server.",
    "Tokens.tokens": "The token ids.",
    "Tokens.count": "The number of tokens.",
    "Tokens.max_model_len": "The most tokens of a prompt and its completion together.",
    "Text.prompt": "The text of the tokens. Bytes that are not valid UTF-8 become U+FFFD.",
    "Tokenizer.vocab_size": "The number of tokens in the vocabulary.",
    "Tokenizer.model_max_length": "The most tokens of a prompt and its completion together.",
    "Tokenizer.add_bos_token": "Whether the server puts the beginning-of-sequence token before a text.",
    "Tokenizer.bos_token": "The beginning-of-sequence token.",
    "Tokenizer.bos_token_id": "The id of the beginning-of-sequence token.",
    "Tokenizer.eos_token": "The end-of-sequence token.",
    "Tokenizer.eos_token_id": "The id of the end-of-sequence token.",
    "Version.version": "The version of the server.",
    "Status.status": "The state of the server.",
}

REQUEST_SCHEMAS: dict[str, JsonSchema] = {
    "Tokenize.prompt": description("The text to tokenize.", "Once upon a time"),
    "Tokenize.add_special_tokens": description(
        "Whether to add the beginning-of-sequence token if the model needs it; the default is true.", False
    ),
    "Tokenize.model": description("The model; required if the server has several.", "afterword-tiny"),
    "Detokenize.tokens": description("The token ids.", [647, 604]),
    "Detokenize.model": description("The model; required if the server has several.", "afterword-tiny"),
    "LoadAdapter.lora_name": description("The name by which requests select the adapter.", "poems"),
    "LoadAdapter.lora_path": description(
        "A GGUF file in the server's folder of adapters (--lora-dir); the path is relative to it, or absolute.",
        "poems.gguf",
    ),
    "LoadAdapter.load_inplace": description("Only false; an adapter is unloaded before its name is used again.", False),
    "UnloadAdapter.lora_name": description("The name of an adapter.", "poems"),
    "UnloadAdapter.lora_int_id": description("Only null; adapters have no numbers.", None),
}
"""Descriptions and examples of the members of request bodies that no parser describes."""

_LOGPROBS = {
    "text_offset": [0, 4, 9],
    "token_logprobs": [None, -0.0813, -0.0107],
    "tokens": ["Once", " upon", " a"],
    "top_logprobs": [None, {" upon": -0.0813}, {" a": -0.0107}],
}
_USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 1,
    "total_tokens": 3,
    "completion_tokens_details": {
        "accepted_prediction_tokens": 0,
        "audio_tokens": 0,
        "reasoning_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
    "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
}
_CHOICE = {
    "text": "Once upon a",
    "index": 0,
    "logprobs": _LOGPROBS,
    "finish_reason": "length",
    "token_ids": [264],
    "prompt_token_ids": [647, 604],
    "prompt_logprobs": [None, {"604": {"logprob": -0.0813, "rank": 1, "decoded_token": " upon"}}],
}
_COMPLETION = {
    "id": "cmpl-vuLSlAeMdt6yceUE9byHuEebrrNRX",
    "object": "text_completion",
    "created": 1795406641,
    "model": "afterword-tiny",
    "system_fingerprint": "fp_d0859fc2c34c246d",
    "choices": [_CHOICE],
    "usage": _USAGE,
}
_MODEL = {
    "id": "afterword-tiny",
    "object": "model",
    "created": 1795388550,
    "owned_by": "afterword",
    "root": "afterword-tiny",
    "parent": None,
    "defaults": {"temperature": 0.2},
    "status": "ready",
    "max_model_len": 2048,
    "system_fingerprint": "fp_d0859fc2c34c246d",
    "reproducible": "exact",
    "infill": True,
    "infill_family": "qwen",
    "infill_files": False,
    "prediction": True,
}
EXAMPLES: dict[str, Any] = {
    "Completion": _COMPLETION,
    "Chunk": _COMPLETION | {"choices": [_CHOICE | {"finish_reason": None}]},
    "Logprobs": _LOGPROBS,
    "Usage": _USAGE,
    "Infill": {
        "index": 0,
        "content": "a + b",
        "tokens": [264, 293, 265],
        "id_slot": -1,
        "stop": True,
        "model": "afterword-tiny",
        "tokens_predicted": 4,
        "tokens_evaluated": 17,
        "generation_settings": {
            "n_ctx": 2048,
            "n_predict": 16,
            "n_indent": 4,
            "temperature": 1.0,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.2,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": -1,
            "stop": [],
        },
        "has_new_line": False,
        "truncated": False,
        "stop_type": "eos",
        "stopping_word": "",
        "tokens_cached": 21,
        "timings": {
            "cache_n": 0,
            "prompt_n": 17,
            "prompt_ms": 8.5,
            "prompt_per_token_ms": 0.5,
            "prompt_per_second": 2000.0,
            "predicted_n": 4,
            "predicted_ms": 4.0,
            "predicted_per_token_ms": 1.0,
            "predicted_per_second": 1000.0,
        },
    },
    "Error": {
        "error": {
            "message": "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "integer_below_min_value",
        }
    },
    "Model": _MODEL,
    "Models": {"object": "list", "data": [_MODEL]},
    "Tokens": {"tokens": [647, 604], "count": 2, "max_model_len": 2048},
    "Text": {"prompt": "Once upon"},
    "Tokenizer": {
        "vocab_size": 4096,
        "model_max_length": 2048,
        "add_bos_token": False,
        "bos_token": "<|endoftext|>",
        "bos_token_id": 0,
        "eos_token": "<|endoftext|>",
        "eos_token_id": 0,
    },
    "Version": {"version": "0.1.0"},
}
"""One example of each response, with every member."""

_CHUNK_TEXTS = {
    name.replace("Completion.", "Chunk."): text for name, text in _MEMBER_TEXTS.items() if "Completion." in name
}
DESCRIPTIONS = {name: description(text) for name, text in (_CHUNK_TEXTS | _MEMBER_TEXTS).items()}
"""The descriptions by the dotted name of the member."""


def described_schemas(schemas: dict[str, JsonSchema]) -> dict[str, JsonSchema]:
    """The schemas of responses, with descriptions and examples added."""
    examples = {name: {"examples": [EXAMPLES[name]]} if name in EXAMPLES else {} for name in schemas}
    return {name: described_schema(schema, name, DESCRIPTIONS) | examples[name] for name, schema in schemas.items()}

"""What each member of an answer means, and an example of every answer: what `/openapi.json` says and `/docs` shows."""

from __future__ import annotations

from typing import Any

from afterword.api.specification.response_schemas import JsonSchema
from afterword.completion.request_descriptions import described_schema, description

_MEMBER_TEXTS: dict[str, str] = {
    "Completion.id": "A name of this answer.",
    "Completion.object": "What this is.",
    "Completion.created": "When it was begun, in Unix seconds.",
    "Completion.model": "The model that wrote it.",
    "Completion.system_fingerprint": "The same fingerprint and the same seeded request: the same answer.",
    "Completion.choices": "The answers, n for each prompt, in the order of the prompts.",
    "Completion.choices.text": "What was written; with echo the prompt and what was written.",
    "Completion.choices.index": "Its number among all choices.",
    "Completion.choices.logprobs": "Log probabilities of its tokens, if they were asked for.",
    "Completion.choices.finish_reason": "stop: the model or a stop string ended it; length: max_tokens did.",
    "Completion.choices.token_ids": "With return_token_ids: all that was generated, also what is not in the text.",
    "Completion.choices.prompt_token_ids": "With return_token_ids: the prompt as the model read it.",
    "Completion.choices.prompt_logprobs": "With prompt_logprobs: for each token that the model read, by token id.",
    "Completion.choices.prompt_logprobs.logprob": "Its log probability.",
    "Completion.choices.prompt_logprobs.rank": "1 for the likeliest token.",
    "Completion.choices.prompt_logprobs.decoded_token": "Its text.",
    "Completion.usage": "What was counted.",
    "Chunk.choices": "One choice, with what is new of it; none in the last chunk if that has the usage.",
    "Chunk.choices.text": "What is new.",
    "Chunk.choices.finish_reason": "null until its last chunk.",
    "Chunk.usage": "As stream_options says.",
    "Logprobs.text_offset": "Where each token begins, in characters from the start of the prompt.",
    "Logprobs.token_logprobs": "The log probability of each token; null for the first of a prompt.",
    "Logprobs.tokens": "Each token's text, or bytes:\\x… where it is no whole character.",
    "Logprobs.top_logprobs": "The likeliest tokens at each place, the token itself first.",
    "Usage.prompt_tokens": "Tokens of the prompts, each once.",
    "Usage.completion_tokens": "Tokens of all candidates' texts.",
    "Usage.total_tokens": "Both together.",
    "Usage.completion_tokens_details": "Of them.",
    "Usage.completion_tokens_details.accepted_prediction_tokens": "Always 0.",
    "Usage.completion_tokens_details.audio_tokens": "Always 0.",
    "Usage.completion_tokens_details.reasoning_tokens": "Always 0.",
    "Usage.completion_tokens_details.rejected_prediction_tokens": "Always 0.",
    "Usage.prompt_tokens_details": "Of them.",
    "Usage.prompt_tokens_details.audio_tokens": "Always 0.",
    "Usage.prompt_tokens_details.cached_tokens": "Tokens that had been computed before.",
    "Error.error": "What is wrong.",
    "Error.error.message": "In a sentence.",
    "Error.error.type": "Whose fault it is.",
    "Error.error.param": "The field that is to blame, if it is one.",
    "Error.error.code": "The kind of mistake, if it has a name.",
    "Model.id": "Its name in requests.",
    "Model.object": "What this is.",
    "Model.created": "When its file was last changed, in Unix seconds.",
    "Model.owned_by": "Always afterword.",
    "Model.status": "Whether it is loaded.",
    "Model.max_model_len": "Tokens of a prompt and its completion together.",
    "Model.system_fingerprint": "As in its answers; null before it was loaded.",
    "Model.reproducible": "exact: a token has the same numbers read or generated; reproducible: the same request gives "
    "the same answer; none: not promised.",
    "Model.infill": "Whether it takes a suffix; null before it was loaded.",
    "Models.object": "What this is.",
    "Models.data": "All models that are served.",
    "Tokens.tokens": "Token ids.",
    "Tokens.count": "How many.",
    "Tokens.max_model_len": "How many fit.",
    "Text.prompt": "The text that they spell; bytes that are no characters become U+FFFD.",
    "Tokenizer.vocab_size": "How many tokens there are.",
    "Tokenizer.model_max_length": "Tokens of a prompt and its completion together.",
    "Tokenizer.add_bos_token": "Whether a text gets the beginning-of-sequence token.",
    "Tokenizer.bos_token": "The beginning-of-sequence token.",
    "Tokenizer.bos_token_id": "Its id.",
    "Tokenizer.eos_token": "The end-of-sequence token.",
    "Tokenizer.eos_token_id": "Its id.",
    "Version.version": "Of the server.",
    "Status.status": "The state in a word.",
}

REQUEST_SCHEMAS: dict[str, JsonSchema] = {
    "Tokenize.prompt": description("The text.", "Once upon a time"),
    "Tokenize.add_special_tokens": description(
        "Whether to add what the model's texts begin with; true if absent.", False
    ),
    "Tokenize.model": description("Which of the served models; absent where there is only one.", "afterword-tiny"),
    "Detokenize.tokens": description("Token ids.", [647, 604]),
    "Detokenize.model": description("Which of the served models; absent where there is only one.", "afterword-tiny"),
}
"""Members of bodies that are no completion's."""

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
    "status": "ready",
    "max_model_len": 2048,
    "system_fingerprint": "fp_d0859fc2c34c246d",
    "reproducible": "exact",
    "infill": True,
}
EXAMPLES: dict[str, Any] = {
    "Completion": _COMPLETION,
    "Chunk": _COMPLETION | {"choices": [_CHOICE | {"finish_reason": None}]},
    "Logprobs": _LOGPROBS,
    "Usage": _USAGE,
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
"""One of each answer, with every member."""

_CHUNKS = {name.replace("Completion.", "Chunk."): text for name, text in _MEMBER_TEXTS.items() if "Completion." in name}
DESCRIPTIONS = {name: description(text) for name, text in (_CHUNKS | _MEMBER_TEXTS).items()}
"""By the dotted name of the member."""


def described_schemas(schemas: dict[str, JsonSchema]) -> dict[str, JsonSchema]:
    """Schemas of answers with meanings and examples."""
    examples = {name: {"examples": [EXAMPLES[name]]} if name in EXAMPLES else {} for name in schemas}
    return {name: described_schema(schema, name, DESCRIPTIONS) | examples[name] for name, schema in schemas.items()}

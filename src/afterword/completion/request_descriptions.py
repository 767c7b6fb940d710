"""Descriptions and examples of a request's fields, for `/openapi.json` and `/docs`. docs/api.md has the details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afterword.completion.fields import JsonSchema


def description(text: str, *examples: Any) -> JsonSchema:
    """The members `description` and `examples` of a schema."""
    return {"description": text} | ({"examples": list(examples)} if examples else {})


def described_schema(schema: JsonSchema, name: str, meanings: Mapping[str, JsonSchema]) -> JsonSchema:
    """A copy of a schema in which each property has its entry of `meanings`.

    The keys of `meanings` are dotted names, such as `stream_options.include_usage`. `name` is that of `schema` itself.
    """
    whole = dict(schema)
    for part in ("items", "additionalProperties"):
        if isinstance(whole.get(part), dict):
            whole[part] = described_schema(whole[part], name, meanings)
    if "anyOf" in whole:
        whole["anyOf"] = [described_schema(each, name, meanings) for each in whole["anyOf"]]
    if "properties" in whole:
        members = whole["properties"].items()
        named = {member: (f"{name}.{member}" if name else member, each) for member, each in members}
        whole["properties"] = {
            member: meanings.get(path, {}) | described_schema(each, path, meanings)
            for member, (path, each) in named.items()
        }
    return whole


DESCRIPTIONS: dict[str, JsonSchema] = {
    "model": description(
        "The name of a served model. It can be absent or empty if the server has one model.", "afterword-tiny"
    ),
    "prompt": description(
        "The text to continue: a string, an array of strings, an array of token ids, or an array of arrays of token "
        "ids. Absent or null starts a new document. Choices are numbered prompt by prompt.",
        "Once upon a time",
        ["One, two,", "Red, green,"],
    ),
    "best_of": description(
        "The number of candidates to generate for each prompt. The n candidates with the highest mean log probability "
        "are returned. Default: n.",
        3,
    ),
    "echo": description("Put the prompt before the completion, in text and in logprobs.", True),
    "frequency_penalty": description(
        "Subtracted from a token's logit once for each time that the choice already contains the token.", 0.5
    ),
    "logit_bias": description(
        "A number to add to the logit of each of these token ids. −100 bans a token, 100 forces it.", {"1": -100}
    ),
    "logprobs": description(
        "Report the log probability of each token and of this many alternatives. 0: of the token only; -1: of all.", 2
    ),
    "max_tokens": description(
        "The maximum number of tokens to generate. 0, with echo and logprobs, only scores the prompt.", 40
    ),
    "n": description("The number of choices for each prompt.", 2),
    "presence_penalty": description(
        "Subtracted once from the logit of every token that the choice already contains.", 0.5
    ),
    "seed": description("The same request with the same seed gives the same choices.", 7),
    "stop": description(
        "A string or several strings. The choice ends before the first of them that occurs, and does not contain it.",
        "\n",
    ),
    "stream": description("Send the response while it is generated, as server-sent events.", True),
    "stream_options": description("Options for a streamed response.", {"include_usage": True}),
    "stream_options.include_usage": description(
        "Send one more chunk with the usage at the end. In all other chunks usage is null.", True
    ),
    "stream_options.include_obfuscation": description("Accepted without effect.", False),
    "stream_options.continuous_usage_stats": description("Every chunk has the usage up to then.", True),
    "suffix": description("The text after the gap, for models with infill tokens.", " They went home."),
    "temperature": description(
        "0 always chooses the most likely token. Higher values make less likely tokens more frequent.", 0.8
    ),
    "top_p": description(
        "Sample from the smallest set of most likely tokens with at least this total probability.", 0.9
    ),
    "user": description(
        "The end user to count the request for in the API key's usage. The server stores a pseudonym.", "ann"
    ),
    "add_special_tokens": description(
        "Put the beginning-of-sequence token (BOS) before each prompt that does not begin with it, if the model needs "
        "one. True: before texts and token ids. False: never. Default: before texts, and before token ids if the "
        "server runs with --bos-before-ids.",
        False,
    ),
    "allowed_token_ids": description(
        "Only these tokens are generated, and end tokens only if they are among them.", [1, 2]
    ),
    "bad_words": description(
        "Texts that the choice does not contain, in this case only. Where one is complete, the tokens from its "
        "beginning on are taken back, and another token is sampled there.",
        ["very unique"],
    ),
    "banned_strings": description(
        "As bad_words, in any case: a text or several, as in KoboldCpp and TabbyAPI.", ["a testament to"]
    ),
    "banned_tokens": description(
        "Token ids that are never generated: an array, or a string with commas, as in TabbyAPI.", [1, 2]
    ),
    "cache_salt": description("Only requests with the same salt share cached prefixes.", "course-1"),
    "custom_token_bans": description("Another name of banned_tokens, whose ids are banned too.", "1,2"),
    "grammar": description(
        "A grammar that the text must match, in llama.cpp's notation (GBNF) or in Lark's as llguidance reads it. An "
        "empty one allows any text.",
        'root ::= "yes" | "no"',
    ),
    "ignore_eos": description("Continue after the model's end tokens.", True),
    "include_stop_str_in_output": description(
        "The text includes the stop string, or the text of the token of stop_token_ids, that ends it.", True
    ),
    "input_extra": description(
        "Other files that the model reads first, for models with infill tokens and file separators.",
        [{"filename": "names.py", "text": "NAMES = ['Ann', 'Ben']\n"}],
    ),
    "input_extra.filename": description("The name of the file; absent or null: tmp.", "names.py"),
    "input_extra.text": description("The text of the file.", "NAMES = ['Ann', 'Ben']\n"),
    "input_extra.time": description("Accepted without effect.", 1795406641),
    "json_schema": description(
        "A JSON Schema that the text must match.",
        {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
    ),
    "logprobs_mode": description(
        "raw_logprobs: log probabilities of generated tokens are those of the model. processed_logprobs: those after "
        "bias, penalties, bans, temperature and filters, from which the token was drawn.",
        "processed_logprobs",
    ),
    "logprob_token_ids": description(
        "Report the log probabilities of these tokens instead of the most likely ones, at each position of the choice "
        "and, with echo or prompt_logprobs, of the prompt; or a list for each. Needs logprobs or prompt_logprobs.",
        [1, 2],
    ),
    "min_p": description(
        "Sample from tokens with at least this fraction of the most likely token's probability.", 0.05
    ),
    "min_tokens": description("Ignore end tokens and stop strings until the choice has this many tokens.", 10),
    "prediction": description(
        "Text that the completion probably contains, such as the old version of a file. It can make the response "
        "faster and changes nothing else.",
        {"type": "content", "content": "def add(a, b):\n    return a + b\n"},
    ),
    "prediction.type": description("Always content.", "content"),
    "prediction.content": description("The text: a string or an array of text parts.", "def add(a, b):\n"),
    "prediction.content.type": description("Always text.", "text"),
    "prediction.content.text": description("A part of the text.", "def add(a, b):\n"),
    "priority": description(
        "Of one key's requests that wait for their turn, those with the lowest number are first.",
        -1,
    ),
    "prompt_logprobs": description(
        "Report rank and log probability of each token of the prompt, and of this many alternatives. -1: of all.",
        1,
    ),
    "repetition_detection": description(
        "End a choice that repeats a pattern of tokens, with the finish_reason repetition.",
        {"max_pattern_size": 20, "min_pattern_size": 1, "min_count": 4},
    ),
    "repetition_detection.max_pattern_size": description("The most tokens of a pattern. 0: no detection.", 20),
    "repetition_detection.min_pattern_size": description("The fewest tokens of a pattern. 0 stands for 1.", 1),
    "repetition_detection.min_count": description("How often a pattern must occur in a row, at least 2.", 4),
    "repetition_penalty": description(
        "Above 1: make tokens of the prompt and of the choice less likely. Below 1: more likely.", 1.1
    ),
    "response_format": description(
        "What the text must be, as in OpenAI's chat API: any text, a JSON object, or JSON that matches a schema.",
        {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"type": "integer"}}}},
    ),
    "response_format.type": description("text, json_object or json_schema.", "json_object"),
    "response_format.json_schema": description(
        "The schema, for the type json_schema.", {"name": "count", "schema": {"type": "integer"}}
    ),
    "response_format.json_schema.schema": description("A JSON Schema.", {"type": "integer"}),
    "response_format.json_schema.name": description("Accepted without effect.", "person"),
    "response_format.json_schema.description": description("Accepted without effect.", "A person."),
    "response_format.json_schema.strict": description("Accepted without effect: the schema always holds.", True),
    "response_format.schema": description("A JSON Schema, for the type json_object as llama-server takes it.", {}),
    "return_token_ids": description("Return the token ids of the prompt and of the choice.", True),
    "return_tokens_as_token_ids": description("In logprobs, tokens are named token_id: and their id.", True),
    "samplers": description(
        "The samplers that apply, in this order. Default: penalties, temperature, min_p, top_k, top_p; if another "
        "sampler has an effect, llama-server's order of all.",
        ["penalties", "dry", "top_k", "top_p", "xtc", "temperature"],
    ),
    "skip_special_tokens": description(
        "True: control tokens have no text in the choice. False: they have their names, also end tokens with "
        "include_stop_str_in_output. Default: as false, without end tokens.",
        True,
    ),
    "spaces_between_special_tokens": description("Accepted without effect: no spaces are added to tokens.", True),
    "stop_token_ids": description("Token ids that end the choice. Its text does not contain them.", [0]),
    "structured_outputs": description(
        "What the text must be, as in vLLM: one of the members below.", {"choice": ["yes", "no"]}
    ),
    "structured_outputs.json": description("A JSON Schema, as an object or as a string.", {"type": "integer"}),
    "structured_outputs.json_object": description("Any JSON object.", True),
    "structured_outputs.regex": description("A regular expression that the whole text matches.", "[0-9]{4}"),
    "structured_outputs.choice": description("One of these texts.", ["yes", "no"]),
    "structured_outputs.grammar": description("A grammar, as in the field grammar.", 'root ::= "a"+'),
    "token_healing": description(
        "Leave out the last token of each prompt, and begin the choice with a token that begins with its bytes. The "
        "text continues after the whole prompt.",
        True,
    ),
    "top_k": description("Sample from this many of the most likely tokens. 0 and −1: from all.", 40),
    "truncate_prompt_tokens": description(
        "Read only this many tokens of each prompt. -1: as many as fit into the context with max_tokens.", 512
    ),
    "truncation_side": description(
        "Which tokens are left out: left keeps the last ones, right the first ones.", "left"
    ),
    "adaptive_decay": description("How much the last probabilities count for adaptive_target: less for 0.", 0.9),
    "adaptive_target": description(
        "Prefer tokens so that the mean probability comes near this, after all other samplers. Below 0: off.", 0.5
    ),
    "dry_allowed_length": description("Repetitions of this many tokens can be continued without a penalty of DRY.", 2),
    "dry_base": description("DRY's penalty is multiplied by this for each further repeated token. Below 1: off.", 1.75),
    "dry_multiplier": description("DRY's penalty for a token that continues a repetition. 0: off.", 0.8),
    "dry_penalty_last_n": description(
        "DRY looks for repetitions in this many last tokens of prompt and choice. 0: off. -1: in all.", 64
    ),
    "dry_sequence_breakers": description("Texts over which no repetition extends.", ["\n", ":", '"', "*"]),
    "dynatemp_exponent": description("How the temperature follows the entropy with dynatemp_range.", 1.0),
    "dynatemp_range": description(
        "The temperature is lower by up to this for certain tokens, and higher for uncertain ones. 0: off.", 0.5
    ),
    "min_keep": description("The fewest tokens that top_p, min_p, typical_p and XTC leave. 0 and 1: no effect.", 3),
    "mirostat": description("Mirostat 1 or 2 draws the tokens, after penalties, DRY and temperature. 0: off.", 2),
    "mirostat_eta": description("How fast Mirostat adapts its limit.", 0.1),
    "mirostat_tau": description("The mean surprise of a token that Mirostat aims at, in bits.", 5.0),
    "repeat_last_n": description(
        "The penalties count this many last tokens of prompt and choice. 0: no penalties. -1: all. Default: presence "
        "and frequency penalties count the choice, the repetition penalty prompt and choice.",
        64,
    ),
    "top_n_sigma": description(
        "Sample from the logits within this many standard deviations of the largest. 0 or below: off.", 1.5
    ),
    "typical_p": description(
        "Sample from the tokens nearest to the entropy that have this total probability. 1: off.", 0.9
    ),
    "xtc_probability": description("How often XTC removes the most likely tokens. 0: off.", 0.5),
    "xtc_threshold": description(
        "XTC removes the tokens with at least this probability, except the least likely of them. Above 0.5: off.", 0.1
    ),
}
"""Every field of `request.FIELDS` and `request.EXTENSIONS`, and the members of those that are objects."""

_PLAIN = ("model", "top_k", "top_p", "min_p", "temperature", "presence_penalty", "frequency_penalty", "logit_bias")
_SAMPLERS = tuple(
    name for name in DESCRIPTIONS if name.startswith(("adaptive_", "dry_", "dynatemp_", "mirostat", "xtc_"))
)
_FILES = ("input_extra", "input_extra.filename", "input_extra.text", "input_extra.time")

INFILL_DESCRIPTIONS: dict[str, JsonSchema] = {
    **{name: DESCRIPTIONS[name] for name in (*_PLAIN, *_FILES, *_SAMPLERS, "stop", "ignore_eos", "stream")},
    **{name: DESCRIPTIONS[name] for name in ("min_keep", "repeat_last_n", "top_n_sigma", "typical_p")},
    "input_prefix": description("The text before the line of the cursor.", "def add(a, b):\n"),
    "input_suffix": description("The text after the cursor.", "\n"),
    "prompt": description("The line of the cursor, up to the cursor. It follows the prefix.", "    return "),
    "n_predict": description(
        "The maximum number of tokens to generate. -1: as many as the context holds. 0 only fills the prefix cache.", 32
    ),
    "n_cmpl": description("The number of middles. With more than one the response is an array.", 1),
    "n_indent": description("A line with fewer spaces and tabs at its beginning ends the middle.", 4),
    "t_max_prompt_ms": description("Accepted without effect, as in llama-server.", 500),
    "t_max_predict_ms": description(
        "After this many milliseconds of generation the next line end ends the middle. 0 and -1: no limit.", 1000
    ),
    "samplers": description(
        "The samplers whose parameters apply. Their order counts if dry, top_n_sigma, typ_p, xtc or a dynamic "
        "temperature has an effect.",
        ["top_k", "top_p"],
    ),
    "repeat_penalty": description("The field repetition_penalty of a completion.", 1.0),
    "seed": description("The same request with the same seed gives the same middle. -1: a random seed.", 7),
    "cache_prompt": description("False: share no prefix with other requests.", True),
    "id_slot": description("Accepted without effect: the server finds the slot with the longest prefix.", 0),
    "return_tokens": description("Return the ids of the generated tokens.", True),
    "response_fields": description(
        "The members that the response has. A path with slashes is the name of an inner member.",
        ["content", "timings/predicted_n"],
    ),
}
"""Every field of `infill_request.INFILL_FIELDS`."""

"""What each field of a request means, in a sentence and an example: what `/openapi.json` says and `/docs` shows.

docs/api.md says the same at more length, with what shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afterword.completion.fields import JsonSchema


def description(text: str, *examples: Any) -> JsonSchema:
    """What is added to a schema."""
    return {"description": text} | ({"examples": list(examples)} if examples else {})


def described_schema(schema: JsonSchema, name: str, meanings: Mapping[str, JsonSchema]) -> JsonSchema:
    """A schema in which every member has its meaning, found by its dotted name; `name` is the schema's own."""
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
    "model": description("Which of the served models; absent or empty where there is only one.", "afterword-tiny"),
    "prompt": description(
        "The text to continue: a string, several, token ids, or several lists of token ids. Absent or null begins a "
        "new document. Choices are numbered prompt by prompt.",
        "Once upon a time",
        ["One, two,", "Red, green,"],
    ),
    "best_of": description(
        "How many candidates to write for each prompt; the n with the highest mean log probability are the answer. By "
        "default n.",
        3,
    ),
    "echo": description("Put the prompt before the completion, in the text and in logprobs.", True),
    "frequency_penalty": description(
        "Subtracted from a token's logit for each time that it has been written in this answer.", 0.5
    ),
    "logit_bias": description(
        "What to add to the logits of tokens, by token id; −100 forbids one, 100 forces it.", {"1": -100}
    ),
    "logprobs": description(
        "Give the log probability of each token and of so many alternatives; 0: of the token only.", 2
    ),
    "max_tokens": description(
        "Most tokens to write. 0, with echo and logprobs, writes nothing and gives the prompt's log probabilities.", 40
    ),
    "n": description("How many answers to each prompt.", 2),
    "presence_penalty": description(
        "Subtracted once from the logit of every token that was written in this answer.", 0.5
    ),
    "seed": description("The same request with the same seed gives the same answer.", 7),
    "stop": description(
        "Text, or several texts: the answer ends before the first that comes, which is left out.", "\n"
    ),
    "stream": description("Send the answer as it is written, as server-sent events.", True),
    "stream_options": description("What a stream carries beside the text.", {"include_usage": True}),
    "stream_options.include_usage": description("A last chunk has the usage; in all others it is null.", True),
    "stream_options.include_obfuscation": description("Accepted; there is nothing here to obfuscate.", False),
    "stream_options.continuous_usage_stats": description("Every chunk has the usage so far.", True),
    "suffix": description("The text after the gap to fill, for models that were trained to.", " They went home."),
    "temperature": description("0 takes the likeliest token, higher draws more freely.", 0.8),
    "top_p": description("Draw from the fewest likeliest tokens that have this much probability together.", 0.9),
    "user": description("Whom to count this for in the key's usage; kept as a pseudonym.", "ann"),
    "add_special_tokens": description("False: no beginning-of-sequence token before a text.", False),
    "cache_salt": description("Only requests with the same salt use what was computed for each other.", "course-1"),
    "ignore_eos": description("Go on where the model would end.", True),
    "min_p": description("Draw from tokens with at least this share of the likeliest one's probability.", 0.05),
    "min_tokens": description("Nothing ends the answer before it has so many tokens.", 10),
    "prompt_logprobs": description(
        "Give rank and log probability of each token that the model read, and of so many alternatives. Not with "
        "stream.",
        1,
    ),
    "repetition_penalty": description(
        "Above 1: against tokens that stand in the prompt or the answer; below: for them.", 1.1
    ),
    "return_token_ids": description("Give the ids of the prompt's and the answer's tokens.", True),
    "stop_token_ids": description("Ids of tokens that end the answer and are left out.", [0]),
    "top_k": description("Draw from so many of the likeliest tokens; 0 and −1: from all.", 40),
}
"""Every field of `request.FIELDS` and `request.EXTENSIONS`, and what is in `stream_options`."""

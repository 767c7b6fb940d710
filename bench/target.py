"""A server under measurement, and the request fields with which it does the same work as the other servers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from bench.client import Answer, Client, Exchange, Json, NotPossible

Ids = list[int]
RANGES = (range(1000, 30000), range(300, 3000), range(40, 120))
"""Ranges of token ids that are plain text in most vocabularies, large and small."""
WORDS = """
the and of to in is was for on with as by at from his her he she it they we you not are be this that have had but or an
all one were which their can will more when who been has if some would about out up into so time people no other than
""".split()  # noqa: SIM905 - a list literal would take a page
"""Each word is one token in most vocabularies that were trained on English."""
COMMON: Json = {"temperature": 0}
TOLERANCE = 0.05
"""Allowed relative deviation of the prompt's length on servers that accept only text."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Request fields beyond the API. Servers of one family share a dialect."""

    name: str
    token_prompts: bool
    extra: Json
    """Fields of every request, so that responses do not end early."""
    ids: Json | None
    """Fields that request the ids of generated tokens; None if the server does not return them."""

    def token_ids(self, answer: Answer) -> Ids | None:
        """The token ids of a whole response."""
        (event,) = (event for _, event in answer.events)
        given = event["choices"][0].get("token_ids") or event.get("__verbose", {}).get("tokens")
        return list(given) if given else None


DIALECTS = (
    Dialect("vLLM's", True, {"ignore_eos": True}, {"return_token_ids": True}),
    Dialect("llama-server's", True, {"ignore_eos": True}, {"return_tokens": True, "verbose": True}),
    Dialect("token prompts only", True, {}, None),
    Dialect("text prompts only", False, {}, None),
)


@dataclass(frozen=True, slots=True)
class Target:
    """One server with its dialect, token range and version."""

    name: str
    client: Client
    model: str
    dialect: Dialect
    tokens: range
    tokens_per_word: float
    version: str

    def ids(self, random: Random, count: int) -> Ids:
        """`count` random token ids."""
        return random.choices(self.tokens, k=count)

    def prompt(self, *parts: Ids | str) -> Ids | str:
        """A prompt of these parts: token ids if the server accepts them, else words of about as many tokens."""
        if self.dialect.token_prompts:
            return [token for part in parts for token in _ids(part)]
        return "".join(part if isinstance(part, str) else self._words(part) for part in parts)

    def body(self, prompt: Ids | str, **fields: Any) -> Json:
        """The body of a request with the common and dialect fields."""
        return {"model": self.model, "prompt": prompt, **COMMON, **self.dialect.extra, **fields}

    async def complete(self, prompt: Ids | str, max_tokens: int, **fields: Any) -> Answer:
        """Send a request and return its whole response. Raises `NotPossible` unless it has `max_tokens` tokens."""
        body = self.body(prompt, max_tokens=max_tokens, **fields)
        if fields.get("stream"):
            body["stream_options"] = {"include_usage": True}
        answer = await self.client.ask("/v1/completions", body)
        check_length(answer, max_tokens, fields.get("n", 1))
        return answer

    async def begin(self, prompt: Ids | str, max_tokens: int) -> Exchange:
        """Start a stream. The caller reads and closes it."""
        return await self.client.begin("/v1/completions", self.body(prompt, max_tokens=max_tokens, stream=True))

    def check_prompt(self, answer: Answer, count: int) -> None:
        """Raises `NotPossible` if the reported number of prompt tokens is not `count`."""
        usage = answer.usage
        if usage is None:
            return  # some servers report no usage in streams, only in whole responses
        slack = 1 if self.dialect.token_prompts else 2 + TOLERANCE * count  # some servers add a BOS token
        if abs(usage["prompt_tokens"] - count) > slack:
            raise NotPossible(f"read {usage['prompt_tokens']} prompt tokens but {count} were sent")

    def _words(self, ids: Ids) -> str:
        return words(ids[: round(len(ids) / self.tokens_per_word)])


def words(ids: Iterable[int]) -> str:
    """A word for each id."""
    return "".join(" " + WORDS[token % len(WORDS)] for token in ids)


def _ids(part: Ids | str) -> Ids:
    if isinstance(part, str):
        raise NotPossible("does not return token ids, which the next prompt needs")
    return part


def check_length(answer: Answer, max_tokens: int, choices: int = 1) -> None:
    """Raises `NotPossible` unless the response has `choices` choices of `max_tokens` tokens each."""
    indices = {choice["index"] for choice in answer.choices}
    if len(indices) != choices:
        raise NotPossible(f"gave {len(indices)} choices where {choices} were requested")
    ends = [choice["finish_reason"] for choice in answer.choices if choice.get("finish_reason")]
    usage = answer.usage
    # Some streams have no usage, and llama-server counts only the first choice: check the finish reasons instead.
    generated = usage["completion_tokens"] if usage else max_tokens
    if generated == max_tokens and (choices > 1 or not usage) and ends == ["length"] * choices:
        return
    if generated != choices * max_tokens:
        raise NotPossible(f"generated {generated} tokens where {choices * max_tokens} were requested")
    if not usage:
        raise NotPossible(f"ended with {', '.join(ends) or 'nothing'} before its length")


async def find_target(name: str, url: str, key: str | None = None, model: str | None = None) -> Target:
    """Send test requests to find out the dialect of a server. Raises `NotPossible` if none works."""
    client = Client(url, key)
    listed = (await client.ask("/v1/models")).events[0][1].get("data") or [{"id": "model"}]
    model = model or str(listed[0]["id"])
    problems = []
    for dialect in DIALECTS:
        for tokens in RANGES if dialect.token_prompts else RANGES[:1]:
            target = Target(name, client, model, dialect, tokens, 1.0, "")
            try:
                return await _tried(target)
            except NotPossible as problem:
                problems.append(f"{dialect.name}: {problem}")
    raise NotPossible("; ".join(dict.fromkeys(problems)))


async def _tried(target: Target) -> Target:
    """The target with facts from its response. Raises `NotPossible` if the dialect does not fit."""
    dialect, count = target.dialect, 64
    # The range's last ids must be in the vocabulary too.
    ids = [*target.ids(Random(1), count - 2), target.tokens[-1], target.tokens[-2]]
    answer = await target.complete(target.prompt(ids), max_tokens=4, **(dialect.ids or {}))
    if dialect.ids and len(dialect.token_ids(answer) or ()) != 4:
        raise NotPossible("no ids of generated tokens")
    usage = answer.usage
    if usage is None:
        raise NotPossible("no usage")
    per_word = 1.0
    if dialect.token_prompts:
        target.check_prompt(answer, count)
    else:
        per_word = usage["prompt_tokens"] / count
    version = str(answer.events[0][1].get("system_fingerprint") or "unknown")
    return replace(target, tokens_per_word=per_word, version=version)


def common_tokens(targets: Sequence[Target]) -> list[Target]:
    """The same targets, all with a range of token ids that every target accepts."""
    tokens = min((target.tokens for target in targets), key=lambda tokens: tokens[-1])
    return [replace(target, tokens=tokens) for target in targets]

"""What a batch would take, before it is done: counted where that is cheap, else estimated from a sample, and said so.

Where a server does not count tokens, a token is taken to have four characters. The sample of rows is the same every
time. What is measured is thrown away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from afterword.batch.input_lines import ENDPOINT, BatchRequest, read_lines, read_row
from afterword.batch.journal import open_input
from afterword.batch.output_lines import SendRequest

SAMPLE = 256  # rows whose prompts are counted in tokens
_TIMED = 4  # times as many rows as are done together are measured, so that the machine is as full as it will be
_DEFAULT = 16  # max_tokens of a request that does not say


@dataclass(slots=True)
class _Counts:
    """What one reading of the input finds. `rows` is a sample; `texts` and `shared` are characters of prompts."""

    good: int = 0
    bad: int = 0
    most: int = 0
    ids: int = 0
    texts: int = 0
    shared: int = 0
    shared_ids: int = 0
    rows: list[BatchRequest] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures by name; those in `guessed` are estimates."""

    facts: dict[str, Any]

    @property
    def text(self) -> str:
        """For a person."""
        facts = self.facts
        left = f"; {facts['faulty']:,} lines are faulty" if facts["faulty"] else ""
        about = "about " if "prompt_tokens" in facts["estimates"] else ""
        seconds = timedelta(seconds=round(facts["seconds"]))
        timed = f"if the rest are like the {facts['timed']:,} rows that were tried"
        return "\n".join(
            [
                f"rows                 {facts['rows']:,}{left}",
                f"prompt tokens        {about}{facts['prompt_tokens']:,}"
                + (f" (from {facts['sampled']:,} rows)" if about else ""),
                f"  begin alike        about {facts['shared_tokens']:,} of them (computed once)",
                f"completion tokens    at most {facts['most_completion_tokens']:,}",
                f"time                 about {seconds}, {timed}" if facts["timed"] else "time                 unknown",
            ]
        )


async def estimate(source: Path, longest: int, ask: SendRequest, at_once: int) -> Estimate:
    """Read the input once, count some prompts with the server's tokenizer, and try some rows."""
    counts = await asyncio.to_thread(_count, source, longest)
    texts = [text for row in counts.rows for text in _texts(row)]
    counted = await _map_concurrently([_tokens(ask, row, text) for row in counts.rows for text in _texts(row)], at_once)
    tokens = sum(len(text) // 4 if count < 0 else count for count, text in zip(counted, texts, strict=True))
    letters = sum(map(len, texts))
    guessed = bool(counts.texts) and (len(counts.rows) < counts.good or -1 in counted)
    each = tokens / letters if letters else 0.0  # tokens a character
    tried = counts.rows[: _TIMED * at_once]
    start = time.monotonic()
    good = sum(await _map_concurrently([_time_request(ask, row) for row in tried], at_once))
    seconds = (time.monotonic() - start) / len(tried) * counts.good if good else 0.0
    return Estimate(
        {
            "rows": counts.good + counts.bad,
            "faulty": counts.bad,
            "prompt_tokens": counts.ids + round(counts.texts * each),
            "sampled": len(counts.rows) + counts.bad,
            "shared_tokens": counts.shared_ids + round(counts.shared * each),
            "most_completion_tokens": counts.most,
            "seconds": round(seconds, 1),
            "timed": len(tried) if good else 0,
            "estimates": ["shared_tokens", "seconds"] + (["prompt_tokens"] if guessed else []),
        }
    )


def _count(source: Path, longest: int) -> _Counts:
    counts, chance = _Counts(), Random(0)
    with open_input(source) as file:
        for line in read_lines(file, longest):
            row = read_row(line)
            if not isinstance(row, BatchRequest):
                counts.bad += 1
                continue
            counts.good += 1
            counts.most += _max_tokens(row.body)
            counts.texts += sum(map(len, _texts(row)))
            counts.ids += sum(map(len, _ids(row)))
            if len(counts.rows) < SAMPLE:
                counts.rows.append(row)
            elif (place := chance.randrange(counts.good)) < SAMPLE:
                counts.rows[place] = row
    _count_shared(counts)
    return counts


def _count_shared(counts: _Counts) -> None:
    """What neighbours in the order of the work begin alike with: of the sample, as if all rows were so."""
    ordered = sorted(counts.rows, key=lambda row: row.sort_key)
    scale = counts.good / len(ordered) if ordered else 0
    for one, other in pairwise(ordered):
        for kind, name in ((_texts, "shared"), (_ids, "shared_ids")):
            alike = sum(_common_prefix(*pair) for pair in zip(list(kind(one))[:1], list(kind(other))[:1], strict=False))
            setattr(counts, name, getattr(counts, name) + round(alike * scale))


def _common_prefix(one: Any, other: Any) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def _texts(row: BatchRequest) -> Iterator[str]:
    prompt = row.body.get("prompt")
    for each in prompt if isinstance(prompt, list) else [prompt]:
        if isinstance(each, str):
            yield each


def _ids(row: BatchRequest) -> Iterator[list[int]]:
    prompt = row.body.get("prompt")
    if isinstance(prompt, list):
        if prompt and all(isinstance(each, int) for each in prompt):
            yield prompt
        yield from (each for each in prompt if isinstance(each, list))


def _max_tokens(body: dict[str, Any]) -> int:
    """Tokens that a request can generate. What is no number is refused later."""
    prompt = body.get("prompt")
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    samples = body.get("best_of") or body.get("n") or 1
    tokens = _DEFAULT if body.get("max_tokens") is None else body["max_tokens"]
    if not isinstance(samples, int) or not isinstance(tokens, int):
        return 0
    return (len(prompt) if many and isinstance(prompt, list) else 1) * samples * max(tokens, 0)


async def _tokens(ask: SendRequest, row: BatchRequest, text: str) -> int:
    """How many tokens a text has; -1 where the server does not say."""
    named = {"model": row.body["model"]} if isinstance(row.body.get("model"), str) else {}
    reply = await ask("POST", "/tokenize", msgspec.json.encode({"prompt": text, **named}))
    try:
        return int(msgspec.json.decode(reply.body)["count"])
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return -1


async def _time_request(ask: SendRequest, row: BatchRequest) -> bool:
    return (await ask("POST", ENDPOINT, row.request_body)).is_success


async def _map_concurrently(work: list[Any], at_once: int) -> list[int]:
    """Do all, some at a time."""
    room = asyncio.Semaphore(at_once)

    async def one(each: Any) -> int:
        async with room:
            return int(await each)

    return list(await asyncio.gather(*map(one, work)))

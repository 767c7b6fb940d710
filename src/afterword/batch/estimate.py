"""Estimates tokens and time of a batch for `afterword batch --plan`.

Lines, token ids and completion tokens are counted; tokens of texts, common prefixes and the time are estimated from a
sample of requests, which is the same in every run. If the server has no `/tokenize`, a token counts as four characters.
The time comes from requests that are really sent; their answers are discarded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
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

SAMPLE = 256  # requests with tokenized prompts
_TIMED = 4  # requests that are timed, for each one sent at the same time: enough to keep the server fully loaded
_TIMED_SHARE = 10  # at most one of so many requests is timed, so that a plan costs a fraction of the batch
_DEFAULT = 16  # max_tokens of a request without that field


@dataclass(slots=True)
class _Counts:
    """Counts over the input file.

    `requests`, `faulty`: lines. `max_completion_tokens`: of all requests. `ids`: token ids in prompts. `characters`: of
    the texts of prompts. `shared`, `shared_ids`: those of them in a prefix that a neighbouring prompt has too.
    `sample`: at most `SAMPLE` requests.
    """

    requests: int = 0
    faulty: int = 0
    max_completion_tokens: int = 0
    ids: int = 0
    characters: int = 0
    shared: int = 0
    shared_ids: int = 0
    sample: list[BatchRequest] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures by name. `facts["estimates"]` lists the names of the estimated ones."""

    facts: dict[str, Any]

    @property
    def text(self) -> str:
        """The figures as a table of five lines."""
        facts = self.facts
        faulty = f", of which {facts['faulty']:,} are faulty" if facts["faulty"] else ""
        about = "about " if "prompt_tokens" in facts["estimates"] else ""
        seconds = timedelta(seconds=round(facts["seconds"]))
        timed = f"extrapolated from {facts['timed']:,} requests"
        return "\n".join(
            [
                f"lines                {facts['rows']:,}{faulty}",
                f"prompt tokens        {about}{facts['prompt_tokens']:,}"
                + (f" (from {facts['sampled']:,} lines)" if about else ""),
                f"  in common prefixes about {facts['shared_tokens']:,} (computed once)",
                f"completion tokens    at most {facts['most_completion_tokens']:,}",
                f"time                 about {seconds}, {timed}" if facts["timed"] else "time                 unknown",
            ]
        )


async def estimate(
    source: Path,
    max_line_bytes: int,
    send: SendRequest,
    concurrency: int,
    report: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Read the input once, tokenize a sample of prompts on the server, and time a few requests.

    `max_line_bytes`: bytes of a line. `concurrency`: requests sent at the same time. `report` gets a line of text at
    the start of each part.
    """
    counts = await asyncio.to_thread(_count, source, max_line_bytes)
    report(f"Counting the tokens of {len(counts.sample):,} of {counts.requests:,} requests.")
    texts = [text for row in counts.sample for text in _texts(row)]
    counted = await _map_concurrently(
        [_tokens(send, row, text) for row in counts.sample for text in _texts(row)], concurrency
    )
    tokens = sum(len(text) // 4 if count < 0 else count for count, text in zip(counted, texts, strict=True))
    characters = sum(map(len, texts))
    estimated = bool(counts.characters) and (len(counts.sample) < counts.requests or -1 in counted)
    tokens_per_character = tokens / characters if characters else 0.0
    timed = counts.sample[: min(_TIMED * concurrency, max(1, counts.requests // _TIMED_SHARE))]
    report(f"Sending {len(timed):,} of {counts.requests:,} requests to time them.")
    start = time.monotonic()
    succeeded = sum(await _map_concurrently([_is_answered(send, row) for row in timed], concurrency))
    seconds = (time.monotonic() - start) / len(timed) * counts.requests if succeeded else 0.0
    return Estimate(
        {
            "rows": counts.requests + counts.faulty,
            "faulty": counts.faulty,
            "prompt_tokens": counts.ids + round(counts.characters * tokens_per_character),
            "sampled": len(counts.sample) + counts.faulty,
            "shared_tokens": counts.shared_ids + round(counts.shared * tokens_per_character),
            "most_completion_tokens": counts.max_completion_tokens,
            "seconds": round(seconds, 1),
            "timed": len(timed) if succeeded else 0,
            "estimates": ["shared_tokens", "seconds"] + (["prompt_tokens"] if estimated else []),
        }
    )


def _count(source: Path, max_line_bytes: int) -> _Counts:
    counts, random = _Counts(), Random(0)
    with open_input(source) as file:
        for line in read_lines(file, max_line_bytes):
            row = read_row(line)
            if not isinstance(row, BatchRequest):
                counts.faulty += 1
                continue
            counts.requests += 1
            counts.max_completion_tokens += _max_tokens(row.body)
            counts.characters += sum(map(len, _texts(row)))
            counts.ids += sum(map(len, _ids(row)))
            if len(counts.sample) < SAMPLE:
                counts.sample.append(row)
            elif (index := random.randrange(counts.requests)) < SAMPLE:  # reservoir sampling
                counts.sample[index] = row
    _count_shared(counts)
    return counts


def _count_shared(counts: _Counts) -> None:
    """Sum the common prefixes of neighbours in the order of sending, scaled from the sample to all requests."""
    ordered = sorted(counts.sample, key=lambda row: row.sort_key)
    scale = counts.requests / len(ordered) if ordered else 0
    for one, other in pairwise(ordered):
        for kind, name in ((_texts, "shared"), (_ids, "shared_ids")):
            length = sum(
                _common_prefix(*pair) for pair in zip(list(kind(one))[:1], list(kind(other))[:1], strict=False)
            )
            setattr(counts, name, getattr(counts, name) + round(length * scale))


def _common_prefix(one: Any, other: Any) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


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
    """Return the most tokens that a request can generate; 0 if a field is not a number, which the server refuses."""
    prompt = body.get("prompt")
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    samples = body.get("best_of") or body.get("n") or 1
    tokens = _DEFAULT if body.get("max_tokens") is None else body["max_tokens"]
    if not isinstance(samples, int) or not isinstance(tokens, int):
        return 0
    return (len(prompt) if many and isinstance(prompt, list) else 1) * samples * max(tokens, 0)


async def _tokens(send: SendRequest, row: BatchRequest, text: str) -> int:
    """Return the number of tokens in a text; -1 if the server does not report it."""
    named = {"model": row.body["model"]} if isinstance(row.body.get("model"), str) else {}
    reply = await send("POST", "/tokenize", msgspec.json.encode({"prompt": text, **named}))
    try:
        return int(msgspec.json.decode(reply.body)["count"])
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return -1


async def _is_answered(send: SendRequest, row: BatchRequest) -> bool:
    return (await send("POST", ENDPOINT, row.request_body)).is_success


async def _map_concurrently(work: list[Any], concurrency: int) -> list[int]:
    """Await all of `work`, at most `concurrency` at the same time. Returns the results in the order of `work`."""
    semaphore = asyncio.Semaphore(concurrency)

    async def one(each: Any) -> int:
        async with semaphore:
            return int(await each)

    return list(await asyncio.gather(*map(one, work)))

"""Simulated clients: what they request, how they behave, and which text they must receive.

They call the functions that the HTTP layer calls: keys, limits, parser, plan, run.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any

from afterword.completion.choice import Delta
from afterword.completion.plan import ClientIdentity, Plan, Tokenized, make_plan
from afterword.completion.request import parse
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import Usage, run, tokenize
from afterword.completion.step_queue import Reader
from afterword.engine.protocol import Engine, ModelInfo
from afterword.errors import AfterwordError
from afterword.keys.key import TokenUsage, digest
from afterword.keys.key_registry import Grant, KeyRegistry
from afterword.keys.rate_limiter import LimitExceeded

from .invariants import AccountModel, InvariantChecker, expected_tokens, require
from .process import DECODE_CRASH, LETTERS, PREFILL_CRASH, TOKENIZER_CRASH

_PLAIN = LETTERS[:24]
_PREFIXES = ("", "", _PLAIN[:8], _PLAIN[:16])


@dataclass(frozen=True)
class Behavior:
    """What a client requests and how it behaves.

    `body`: the JSON body. `crashes`: the prompt crashes the worker. `leaves_after`: number of items after which the
    client disconnects. `read_seconds`: seconds that it takes to read an item. `queue`: as in `ClientIdentity`.
    `predicts`: the body gets a prediction, which agrees in part with the text that the model generates.
    """

    body: dict[str, Any]
    crashes: bool
    leaves_after: int | None = None
    read_seconds: float = 0.0
    queue: str = ""
    predicts: bool = False


def random_behavior(random: Random, contended: bool, crash_share: float) -> Behavior:
    """A random request. `contended`: one of many small equal requests. `crash_share`: how many crash the worker."""
    texts = [random.choice(_PREFIXES) + _word(random, 1, 8) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    crashes = random.random() < crash_share
    if crashes:
        texts[0] = texts[0] + random.choice((PREFILL_CRASH, DECODE_CRASH, TOKENIZER_CRASH)) + _word(random, 0, 3)
    body: dict[str, Any] = {"prompt": texts, "max_tokens": random.randint(1, 12), "seed": random.getrandbits(31)}
    body["n"] = random.choice((1, 1, 1, 2, 3))
    if contended:
        body |= {"prompt": texts[0][:12], "n": 1, "max_tokens": 8, "ignore_eos": True}
        return Behavior(body, crashes)
    if random.random() < 0.3:
        body["stop"] = [_word(random, 1, 2) for _ in range(random.randint(1, 3))]
    if random.random() < 0.2 and not crashes:
        body |= {"echo": True, "logprobs": random.randint(0, 2)}
        body["max_tokens"] *= random.choice((0, 1))
    if random.random() < 0.2:
        body["cache_salt"] = "salt"
    body["temperature"] = random.choice((0, 0.7, 1))
    leaves_after = random.randint(0, 8) if random.random() < 0.15 else None
    read_seconds = random.uniform(0.1, 3) if random.random() < 0.1 else 0.0
    if predicts := Random(body["seed"]).random() < 0.4:
        body["max_tokens"] *= 3  # drafts are verified only behind the first tokens
    return Behavior(body, crashes, leaves_after, read_seconds, predicts=predicts)


def heavy_behavior(random: Random) -> Behavior:
    """A random request, either long with several samples or short; 30 % are batch lines."""
    body: dict[str, Any] = {"prompt": _word(random, 1, 12), "seed": random.getrandbits(31), "ignore_eos": True}
    body["echo"] = random.random() < 0.2
    if body["echo"]:
        body["logprobs"] = 1
    queue = "batch" if random.random() < 0.3 else ""
    if random.random() < 0.08:
        body |= {"max_tokens": 110, "n": random.randint(1, 5)}
        return Behavior(body, crashes=False, queue=queue, predicts=Random(body["seed"]).random() < 0.5)
    return Behavior(body | {"max_tokens": random.randint(1, 6)}, crashes=False, queue=queue)


def _word(random: Random, least: int, most: int) -> str:
    return "".join(random.choices(_PLAIN, k=random.randint(least, most)))


@dataclass
class SimulatedRequest:
    """One request. `deaths`: worker deaths before it arrived. `outcome`: set once, when it ends."""

    name: int
    key: str
    behavior: Behavior
    deaths: int
    arrived: bool = False
    outcome: str | None = None


async def send_request(
    request: SimulatedRequest,
    engine: Engine,
    key_registry: KeyRegistry,
    account: AccountModel,
    checker: InvariantChecker,
) -> None:
    """Process a request as the server does: key, limits, tokens, plan, token limits, response."""
    request.arrived = True
    checker.record("arrives", request.name, request.key, json.dumps(request.behavior.body))
    found = key_registry.find(request.key)
    assert found is not None
    grant = key_registry.admit(found)
    if isinstance(grant, LimitExceeded):
        record_end(request, "limited", checker)
        return
    account.entered(checker.now)
    outcome, usage = "left", None
    try:
        outcome, usage = await _complete(request, engine, grant, account, checker)
    except AfterwordError as error:
        outcome = type(error).__name__
    finally:
        record_end(request, outcome, checker)
        account.inside -= 1
        _settle(grant, usage, account)


def record_end(request: SimulatedRequest, outcome: str, checker: InvariantChecker) -> None:
    """Record the outcome of a request. It must not have ended before."""
    require(1, request.outcome is None, f"request {request.name} ended twice")
    request.outcome = outcome
    checker.outcomes[outcome] += 1
    checker.record("ends", request.name, outcome)


async def _complete(
    request: SimulatedRequest, engine: Engine, grant: Grant, account: AccountModel, checker: InvariantChecker
) -> tuple[str, Usage | None]:
    identity = ClientIdentity(request.key, queue=request.behavior.queue)
    body = request.behavior.body
    if request.behavior.predicts:
        body = body | {"prediction": _prediction(body, engine.model_info, identity)}
    parsed = parse(json.dumps(body).encode(), RequestLimits())
    plan = make_plan(parsed, engine.model_info, await tokenize(parsed, engine), 0, identity)
    if grant.reserve(plan.max_total_tokens) is not None:
        return "limited", None
    account.tokens.take(plan.max_total_tokens, checker.now)
    choices: dict[int, list[Delta]] = {}
    used: list[Usage] = []
    count = 0
    reader = Reader()
    try:
        async with aclosing(run(plan, engine, used.append, reader=reader)) as items:
            async for item in items:
                if isinstance(item, Delta):
                    require(4, not _finished(choices.get(item.index, [])), "text for a choice that has ended")
                    choices.setdefault(item.index, []).append(item)
                if request.behavior.leaves_after == count:
                    return "left", None
                count += 1
                with reader.sending(1):
                    await asyncio.sleep(request.behavior.read_seconds)
    finally:
        _check_texts(request, plan, choices)
    require(5, all(_finished(deltas) for deltas in choices.values()), "a choice has no finish reason")
    require(5, len(choices) == len(plan.prompts) * plan.n, "a choice is missing")
    return "finished", used[0]


def _prediction(body: dict[str, Any], model_info: ModelInfo, identity: ClientIdentity) -> dict[str, str]:
    """A prediction made of the first choice's text, of which some tokens are replaced, left out or repeated."""
    random = Random(f"prediction {body['seed']}")
    parsed = parse(json.dumps(body).encode(), RequestLimits())
    tokenized = Tokenized(tuple(tuple(map(LETTERS.index, text)) for text in parsed.prompt), ())
    job = make_plan(parsed, model_info, tokenized, 0, identity).prompts[0].job
    share = random.choice((0, 0, 0.1, 1))
    parts = [
        random.choice(("", letter * 2, random.choice(_PLAIN))) if random.random() < share else letter
        for letter in (LETTERS[token] for token in expected_tokens(job, 0))
    ]
    return {"type": "content", "content": "".join(parts)}


def _settle(grant: Grant, usage: Usage | None, account: AccountModel) -> None:
    """Release the unused reservation, and check that the limiter gives back no more than was taken."""
    reserved = grant._reserved
    grant.close(TokenUsage(usage.prompt_tokens, usage.completion_tokens) if usage else None, None)
    account.tokens.give(reserved - grant._reserved)


def _finished(deltas: list[Delta]) -> bool:
    return bool(deltas) and deltas[-1].finish is not None


def _check_texts(request: SimulatedRequest, plan: Plan, choices: dict[int, list[Delta]]) -> None:
    """Check that each text is what the model generates alone, up to the stop string; of an unfinished one, a prefix."""
    for index, deltas in choices.items():
        prompt = plan.prompts[index // plan.n]
        text = "".join(delta.text for delta in deltas)
        expected = (prompt.text if plan.echo else "") + _expected_text(plan, index)
        complete = _finished(deltas)
        require(5, text == expected if complete else expected.startswith(text), f"{text!r} instead of {expected!r}")


def _expected_text(plan: Plan, index: int) -> str:
    job = plan.prompts[index // plan.n].job
    tokens = expected_tokens(job, index % plan.n)
    text = "".join(LETTERS[token] for token in tokens if token not in job.end_tokens)
    for end in range(len(text) + 1):
        found = [stop for stop in plan.stop.texts if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def key_text(index: int) -> str:
    """The secret text of an API key."""
    return f"key-{index}"


def key_digest(index: int) -> bytes:
    return digest(key_text(index))

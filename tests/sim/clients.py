"""Those who ask: what they want, how they behave, and what they must be told. Right of the HTTP, left of nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any

from afterword.completion.choice import Delta
from afterword.completion.plan import ClientIdentity, Plan, make_plan
from afterword.completion.request import parse
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import Usage, run, tokenize
from afterword.engine.protocol import Engine
from afterword.errors import AfterwordError
from afterword.keys.key import TokenUsage, digest
from afterword.keys.key_registry import Grant, KeyRegistry
from afterword.keys.rate_limiter import LimitExceeded

from .invariants import Account, Ledger, require, wanted
from .process import BOMB, CURSED, DEADLY, LETTERS

_PLAIN = LETTERS[:24]
_BEGINNINGS = ("", "", _PLAIN[:8], _PLAIN[:16])


@dataclass(frozen=True)
class Wish:
    """What is asked for and how its asker behaves: leaves after so many deltas, or reads only so fast."""

    body: dict[str, Any]
    deadly: bool
    leaves: int | None = None
    slow: float = 0.0
    line: str = ""


def wish(random: Random, crowd: bool, poison: float) -> Wish:
    """Something to ask."""
    texts = [random.choice(_BEGINNINGS) + _word(random, 1, 8) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    deadly = random.random() < poison
    if deadly:
        texts[0] = texts[0] + random.choice((DEADLY, BOMB, CURSED)) + _word(random, 0, 3)
    body: dict[str, Any] = {"prompt": texts, "max_tokens": random.randint(1, 12), "seed": random.getrandbits(31)}
    body["n"] = random.choice((1, 1, 1, 2, 3))
    if crowd:
        body |= {"prompt": texts[0][:12], "n": 1, "max_tokens": 8, "ignore_eos": True}
        return Wish(body, deadly)
    if random.random() < 0.3:
        body["stop"] = [_word(random, 1, 2) for _ in range(random.randint(1, 3))]
    if random.random() < 0.2 and not deadly:
        body |= {"echo": True, "logprobs": random.randint(0, 2)}
        body["max_tokens"] *= random.choice((0, 1))
    if random.random() < 0.2:
        body["cache_salt"] = "salt"
    body["temperature"] = random.choice((0, 0.7, 1))
    leaves = random.randint(0, 8) if random.random() < 0.15 else None
    return Wish(body, deadly, leaves, random.uniform(0.1, 3) if random.random() < 0.1 else 0.0)


def greedy_wish(random: Random) -> Wish:
    """Much from one key or from a batch, or a short request of another."""
    body: dict[str, Any] = {"prompt": _word(random, 1, 12), "seed": random.getrandbits(31), "ignore_eos": True}
    body["echo"] = random.random() < 0.2
    if body["echo"]:
        body["logprobs"] = 1
    line = "batch" if random.random() < 0.3 else ""
    if random.random() < 0.08:
        return Wish(body | {"max_tokens": 110, "n": random.randint(1, 5)}, deadly=False, line=line)
    return Wish(body | {"max_tokens": random.randint(1, 6)}, deadly=False, line=line)


def _word(random: Random, least: int, most: int) -> str:
    return "".join(random.choices(_PLAIN, k=random.randint(least, most)))


@dataclass
class Visit:
    """One request, from its arrival to its end. `outcome` is set once, at the end."""

    name: int
    key: str
    wish: Wish
    deaths: int  # of engines, before it came
    arrived: bool = False
    outcome: str | None = None


async def visit(visit: Visit, engine: Engine, key_registry: KeyRegistry, account: Account, ledger: Ledger) -> None:
    """Ask, as a request does: key, limits, tokens, plan, limits, answer."""
    visit.arrived = True
    ledger.note("arrives", visit.name, visit.key, json.dumps(visit.wish.body))
    found = key_registry.find(visit.key)
    assert found is not None
    grant = key_registry.enter(found)
    if isinstance(grant, LimitExceeded):
        end(visit, "limited", ledger)
        return
    account.entered(ledger.now)
    outcome, usage = "left", None
    try:
        outcome, usage = await _ask(visit, engine, grant, account, ledger)
    except AfterwordError as error:
        outcome = type(error).__name__
    finally:
        end(visit, outcome, ledger)
        account.inside -= 1
        _settle(grant, usage, account)


def end(visit: Visit, outcome: str, ledger: Ledger) -> None:
    """A request is over, once."""
    require(1, visit.outcome is None, f"request {visit.name} ended twice")
    visit.outcome = outcome
    ledger.outcomes[outcome] += 1
    ledger.note("ends", visit.name, outcome)


async def _ask(
    visit: Visit, engine: Engine, grant: Grant, account: Account, ledger: Ledger
) -> tuple[str, Usage | None]:
    request = parse(json.dumps(visit.wish.body).encode(), RequestLimits())
    plan = make_plan(
        request, engine.model_info, await tokenize(request, engine), 0, ClientIdentity(visit.key, line=visit.wish.line)
    )
    if grant.reserve(plan.most_tokens) is not None:
        return "limited", None
    account.tokens.take(plan.most_tokens, ledger.now)
    told: dict[int, list[Delta]] = {}
    used: list[Usage] = []
    count = 0
    try:
        async with aclosing(run(plan, engine, used.append)) as items:
            async for item in items:
                if isinstance(item, Delta):
                    require(4, not _finished(told.get(item.index, [])), "text for an answer that has ended")
                    told.setdefault(item.index, []).append(item)
                if visit.wish.leaves == count:
                    return "left", None
                count += 1
                await asyncio.sleep(visit.wish.slow)
    finally:
        _check_texts(visit, plan, told)
    require(5, all(_finished(deltas) for deltas in told.values()), "an answer has no end")
    require(5, len(told) == len(plan.prompts) * plan.n, "an answer is missing")
    return "finished", used[0]


def _settle(grant: Grant, usage: Usage | None, account: Account) -> None:
    """Give back what was not used, and see that the limiter gives back no more."""
    reserved = grant._reserved
    grant.close(TokenUsage(usage.prompt_tokens, usage.completion_tokens) if usage else None, None)
    account.tokens.give(reserved - grant._reserved)


def _finished(deltas: list[Delta]) -> bool:
    return bool(deltas) and deltas[-1].finish is not None


def _check_texts(visit: Visit, plan: Plan, told: dict[int, list[Delta]]) -> None:
    """The text is what the model says alone, without the stop string; of an answer that was cut, its beginning."""
    for index, deltas in told.items():
        prompt = plan.prompts[index // plan.n]
        text = "".join(delta.text for delta in deltas)
        expected = (prompt.text if plan.echo else "") + _said(plan, index)
        whole = _finished(deltas)
        require(5, text == expected if whole else expected.startswith(text), f"{text!r} instead of {expected!r}")


def _said(plan: Plan, index: int) -> str:
    job = plan.prompts[index // plan.n].job
    tokens = wanted(job, index % plan.n)
    text = "".join(LETTERS[token] for token in tokens if token not in job.end_tokens)
    for end in range(len(text) + 1):
        found = [stop for stop in plan.stop.texts if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def key_text(index: int) -> str:
    """The text of a key."""
    return f"key-{index}"


def key_digest(index: int) -> bytes:
    return digest(key_text(index))

"""G1: requests generated from the OpenAPI document: valid, invalid, and with mutated values and bytes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from afterword.completion import fields, request

from .client import PATIENCE, Caller, Reply, crowd
from .gate import Fault, Gate, Result, Trial
from .nasty import TEXTS
from .server import Server

AT_ONCE, LARGEST = 16, 2048  # visitors, bytes of an error's body
BY_SCHEMATHESIS = 0.25  # of all requests; the others are its bodies, mixed up: forty times as fast to make
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
FORM = "multipart/form-data"
WRONG = "negative_data_rejection"  # what the document calls wrong is refused
BROKEN = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1e-320,
    1e308,
    0.5,
    "",
    "5",
    [],
    {},
    [[]],
    [-1],
    [[1], "a"],
)


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "16", "--context", "128", scripted=True) as server:
        with server.http() as client:
            document = client.get("/openapi.json").json()
        notes = _Notes()
        count = int(trial.size * BY_SCHEMATHESIS)
        bodies = _by_schemathesis(server, document, count, trial, notes)
        mixtures = islice(_mixtures(bodies, trial), trial.size - notes.statuses.total())
        asyncio.run(_mixed_up(server, document, mixtures, notes))
        passed = not notes.problems and server.alive() and server.load()["status"] == "ready"
    first = {"first": notes.problems[0][:200]} if notes.problems else {}
    return Result(passed, {"problems": len(notes.problems), **notes.shown(), **first})


class _Notes:
    """What was seen: problems in words, answers by status, the slowest."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0

    def shown(self) -> dict[str, float]:
        kinds = Counter(f"{status // 100}xx" for status in self.statuses.elements())
        return {**{kind: kinds[kind] for kind in ("2xx", "4xx", "5xx")}, "slowest s": self.slowest}

    def take(self, status: int, body: bytes, seconds: float) -> None:
        """Note an answer."""
        self.statuses[status] += 1
        self.slowest = max(self.slowest, seconds)
        if status >= 500 or status == 0:
            self.problems.append(f"status {status}: {body[:200]!r}")
        if status >= 400 and len(body) > LARGEST:
            self.problems.append(f"an error of {len(body)} bytes")


def _by_schemathesis(server: Server, document: Any, count: int, trial: Trial, notes: _Notes) -> list[bytes]:
    """Ask what Schemathesis makes of the document and have it judge the answers. Returns the completions' bodies."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if "requestBody" in operation.definition.raw]
    kinds = [(operation, GenerationMode.POSITIVE, count // 40) for operation in operations]
    kinds += [(operation, GenerationMode.NEGATIVE, count // 16) for operation in posts]
    kinds += [(posts[0], GenerationMode.POSITIVE, count - sum(share for _, _, share in kinds))]
    bodies: list[bytes] = []
    with requests.Session() as session:
        session.trust_env = False
        for operation, mode, share in kinds:
            trial.say(f"G1 schemathesis, {operation.label}, {mode.value}")
            checks = CHECKS.get_by_names([*NAMES, *([WRONG] if mode is GenerationMode.NEGATIVE else [])])
            asking = _Asking(server.url, session, checks, notes, bodies)
            _generate(operation.as_strategy(generation_mode=mode), asking, max(1, share), trial.seed)
    return bodies


@dataclass(frozen=True, slots=True)
class _Asking:
    """How Schemathesis's cases are asked and judged."""

    url: str
    session: requests.Session
    checks: list[Any]
    notes: _Notes
    bodies: list[bytes]

    def ask(self, case: Any) -> None:
        start = time.monotonic()
        response = case.call(base_url=self.url, session=self.session, timeout=PATIENCE)
        self.notes.take(response.status_code, response.content, time.monotonic() - start)
        checks = [check for check in self.checks if check.__name__ != WRONG or _is_sent_whole(case)]
        try:
            case.validate_response(response, checks=checks)
        except (AssertionError, BaseExceptionGroup) as failure:
            told = failure.exceptions[0] if isinstance(failure, BaseExceptionGroup) else failure
            self.notes.problems.append(f"{case.method} {case.path}: {told}")
        if case.operation.path == "/v1/completions" and isinstance(case.body, dict):
            self.bodies.append(json.dumps(case.body).encode())


def _is_sent_whole(case: Any) -> bool:
    """Whether all that makes a case wrong reaches the server: a form's field without values is not sent at all."""
    return not isinstance(case.body, dict) or case.media_type != FORM or [] not in case.body.values()


def _generate(strategy: Any, asking: _Asking, count: int, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(strategy)
    def each(case: Any) -> None:
        asking.ask(case)

    each()


async def _mixed_up(server: Server, document: Any, bodies: Iterator[bytes], notes: _Notes) -> None:
    validators = _validators(document)

    async def visit(caller: Caller, body: bytes) -> None:
        start = time.monotonic()
        reply = await caller.ask(body)
        notes.take(reply.status, reply.body, time.monotonic() - start)
        notes.problems += _invalid(reply, validators) if reply.status else []

    await crowd(server, bodies, visit, AT_ONCE)


def _validators(document: Any) -> dict[str, Any]:
    schemas = {"components": document["components"]}
    names = ("Completion", "Chunk", "Error")
    return {name: jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}"} | schemas) for name in names}


def _invalid(reply: Reply, validators: dict[str, Any]) -> list[str]:
    """What of an answer is not as the document says."""
    if reply.body.startswith(b"data: "):
        events = reply.events()
        whole = events[-1] == "[DONE]"
        pairs = [(event, "Chunk") for event in events[:-1]]
        return [*([] if whole else ["a stream without its end"]), *_errors(pairs, validators)]
    return _errors([(reply.json(), "Completion" if reply.status == 200 else "Error")], validators)


def _errors(pairs: list[tuple[Any, str]], validators: dict[str, Any]) -> list[str]:
    return [f"{name}: {error.message}" for value, name in pairs for error in validators[name].iter_errors(value)][:1]


def _mixtures(bodies: list[bytes], trial: Trial) -> Iterator[bytes]:
    """Bodies with other fields' values, with values that break, with nasty texts, with bytes that are off."""
    random = Random(trial.seed)
    ways = (_answerable, _answerable, _other_value, _broken_value, _nasty_text, _flipped, _cut, _repeated)
    for number, body in enumerate(cycle(sorted(bodies))):
        if number % 100 == 0:
            trial.say(f"G1 mixed up, {number}")
        yield random.choice(ways)(body, random.choice(bodies), random)


def _answerable(body: bytes, _: bytes, random: Random) -> bytes:
    """What most often makes a right body too much for a small model is put right."""
    short = [text for text in TEXTS if len(text) < 60]
    changes = {"prompt": random.choice(short), "max_tokens": random.randint(1, 40), "min_tokens": 0, "logit_bias": None}
    return json.dumps(json.loads(body) | changes | {"model": None, "stop_token_ids": None}).encode()


def _with(body: bytes, random: Random, value: object) -> bytes:
    known = [*request.FIELDS, *request.EXTENSIONS]
    return json.dumps(json.loads(body) | {random.choice(known): value}).encode()


def _other_value(body: bytes, other: bytes, random: Random) -> bytes:
    return _with(body, random, random.choice([None, *json.loads(other).values()]))


def _broken_value(body: bytes, _: bytes, random: Random) -> bytes:
    return _with(body, random, random.choice(BROKEN))


def _nasty_text(body: bytes, _: bytes, random: Random) -> bytes:
    return _with(body, random, random.choice(TEXTS))


def _flipped(body: bytes, _: bytes, random: Random) -> bytes:
    changed = bytearray(body)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _cut(body: bytes, _: bytes, random: Random) -> bytes:
    return body[: random.randrange(len(body))]


def _repeated(body: bytes, other: bytes, random: Random) -> bytes:
    place = random.randrange(len(body))
    return body[:place] + other[: random.randrange(200)] * random.choice((1, 2, 50)) + body[place:]


def forget_to_check_types(patch: pytest.MonkeyPatch) -> None:
    unchecked = fields.Field(lambda name, value, limits: tuple(value), request.FIELDS["stop"].schema)
    patch.setitem(request.FIELDS, "stop", unchecked)


GATE = Gate(
    name="G1",
    goal="no 5xx, no hang, every response matches the OpenAPI document, errors of at most 2 KiB",
    unit="generated requests",
    commit=10_000,
    nightly=500_000,
    run=run,
    fault=Fault("a field whose type nobody checks", "server", forget_to_check_types),
    planted=400,
)

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

from .client import TIMEOUT, ClientConnection, Reply, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .nasty import TEXTS
from .server import Server

AT_ONCE, LARGEST = 16, 2048  # connections, bytes of an error's body
BY_SCHEMATHESIS = (
    0.25  # of all requests; the others are mutations of its bodies, which are generated forty times as fast
)
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
FORM = "multipart/form-data"
WRONG = "negative_data_rejection"  # values that the document forbids are refused
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
    """The results: problems, responses by status, the longest time in seconds."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0

    def shown(self) -> dict[str, float]:
        kinds = Counter(f"{status // 100}xx" for status in self.statuses.elements())
        return {**{kind: kinds[kind] for kind in ("2xx", "4xx", "5xx")}, "slowest s": self.slowest}

    def take(self, status: int, body: bytes, seconds: float) -> None:
        """Record a response."""
        self.statuses[status] += 1
        self.slowest = max(self.slowest, seconds)
        if status >= 500 or status == 0:
            self.problems.append(f"status {status}: {body[:200]!r}")
        if status >= 400 and len(body) > LARGEST:
            self.problems.append(f"an error of {len(body)} bytes")


def _by_schemathesis(server: Server, document: Any, count: int, trial: Trial, notes: _Notes) -> list[bytes]:
    """Send the requests that Schemathesis generates and let it check the responses. Returns the completions' bodies."""
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
    """Sends the cases of Schemathesis and checks the responses."""

    url: str
    session: requests.Session
    checks: list[Any]
    notes: _Notes
    bodies: list[bytes]

    def ask(self, case: Any) -> None:
        start = time.monotonic()
        response = case.call(base_url=self.url, session=self.session, timeout=TIMEOUT)
        self.notes.take(response.status_code, response.content, time.monotonic() - start)
        checks = [check for check in self.checks if check.__name__ != WRONG or _is_sent_whole(case)]
        try:
            case.validate_response(response, checks=checks)
        except (AssertionError, BaseExceptionGroup) as failure:
            error = failure.exceptions[0] if isinstance(failure, BaseExceptionGroup) else failure
            self.notes.problems.append(f"{case.method} {case.path}: {error}")
        if case.operation.path == "/v1/completions" and isinstance(case.body, dict):
            self.bodies.append(json.dumps(case.body).encode())


def _is_sent_whole(case: Any) -> bool:
    """Whether every invalid value of a case is sent: a form field without values is left out of the request."""
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

    async def send_item(connection: ClientConnection, body: bytes) -> None:
        start = time.monotonic()
        reply = await connection.ask(body)
        notes.take(reply.status, reply.body, time.monotonic() - start)
        notes.problems += _invalid(reply, validators) if reply.status else []

    await run_concurrently(server, bodies, send_item, AT_ONCE)


def _validators(document: Any) -> dict[str, Any]:
    schemas = {"components": document["components"]}
    names = ("Completion", "Chunk", "Error")
    return {name: jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}"} | schemas) for name in names}


def _invalid(reply: Reply, validators: dict[str, Any]) -> list[str]:
    """The deviations of a response from the OpenAPI document."""
    try:
        return _deviations(reply, validators)
    except json.JSONDecodeError:
        return [f"a response that is not JSON: {reply.status}, {reply.body[:80]!r}"]


def _deviations(reply: Reply, validators: dict[str, Any]) -> list[str]:
    if reply.body.startswith(b"data: "):
        events = reply.events()
        whole = events[-1] == "[DONE]"
        pairs = [(event, "Chunk") for event in events[:-1]]
        return [*([] if whole else ["a stream without its end"]), *_errors(pairs, validators)]
    return _errors([(reply.json(), "Completion" if reply.status == 200 else "Error")], validators)


def _errors(pairs: list[tuple[Any, str]], validators: dict[str, Any]) -> list[str]:
    return [f"{name}: {error.message}" for value, name in pairs for error in validators[name].iter_errors(value)][:1]


def _mixtures(bodies: list[bytes], trial: Trial) -> Iterator[bytes]:
    """Bodies with values of other fields, with invalid values, with malicious texts, and with changed bytes."""
    random = Random(trial.seed)
    ways = (_answerable, _answerable, _other_value, _broken_value, _nasty_text, _flipped, _cut, _repeated)
    for number, body in enumerate(cycle(sorted(bodies))):
        if number % 100 == 0:
            trial.say(f"G1 mixed up, {number}")
        yield random.choice(ways)(body, random.choice(bodies), random)


def _answerable(body: bytes, _: bytes, random: Random) -> bytes:
    """Reposition the fields that most often make a valid body too large for a small model."""
    short = [text for text in TEXTS if len(text) < 60]
    changes = {"prompt": random.choice(short), "max_tokens": random.randint(1, 40), "min_tokens": 0, "logit_bias": None}
    return json.dumps(_some(body, random) | changes | {"model": None, "stop_token_ids": None}).encode()


def _some(body: bytes, random: Random) -> dict[str, Any]:
    """The prompt and a random part of the other fields: of all of them two often exclude each other."""
    share = random.random()
    return {name: value for name, value in json.loads(body).items() if name == "prompt" or random.random() < share}


def _with(body: bytes, random: Random, value: object) -> bytes:
    known = [*request.FIELDS, *request.EXTENSIONS]
    return json.dumps(_some(body, random) | {random.choice(known): value}).encode()


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
    position = random.randrange(len(body))
    return body[:position] + other[: random.randrange(200)] * random.choice((1, 2, 50)) + body[position:]


def forget_to_check_types(patch: pytest.MonkeyPatch) -> None:
    for name in ("stop", "logit_bias", "temperature", "max_tokens", "n", "best_of"):
        unchecked = fields.Field(lambda name, value, limits: value, request.FIELDS[name].schema)
        patch.setitem(request.FIELDS, name, unchecked)


GATE = Gate(
    name="G1",
    goal="no 5xx, no hang, every response matches the OpenAPI document, errors of at most 2 KiB",
    unit="generated requests",
    commit=10_000,
    nightly=500_000,
    run=run,
    fault=Fault("the types of six fields are not checked", "server", forget_to_check_types),
    planted=1_000,
)

"""`POST /v1/completions`: a body to a plan, a plan's deltas to one answer or to a stream of chunks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterword.api import gate, wire
from afterword.api.service import Service
from afterword.api.visit import Visit, visit_of
from afterword.completion.choice import Delta, fold
from afterword.completion.fields import StreamOptions
from afterword.completion.plan import Caller, Plan, make_plan
from afterword.completion.request import Request, parse
from afterword.completion.run import Usage, run, tokenize
from afterword.engine.protocol import BATCH, Engine
from afterword.errors import AfterwordError

_LARGE = 2**12  # bytes of an event


async def create(http: HttpRequest) -> Response:
    """Everything that can be the caller's fault happens here; the answer only runs the plan."""
    service: Service = http.app.state.service
    created = int(time.time())
    service.check_room()
    request = parse(await gate.read_json(http), service.config.limits)
    visit = visit_of(http.scope)
    served = await service.enter(request.model, visit)
    visit.model = served.id
    tokens = await tokenize(request, served.engine, service.config.special_text)
    caller = Caller(visit.key, service.config.shared_cache, BATCH.strip() if visit.inside else "")
    plan = make_plan(request, served.engine.card, tokens, secrets.randbits(64), caller)
    visit.user = service.ring.pseudonym(request.user)
    gate.reserve(visit, plan.most_tokens)
    visit.promise(plan)
    head = wire.Head(wire.new_id(), created, served.id, served.engine.card.fingerprint)
    return Answer(request, plan, head, served.engine, visit)


class Answer(Response):
    """A response that owns the run it sends: when the client leaves, the work ends."""

    def __init__(self, request: Request, plan: Plan, head: wire.Head, engine: Engine, visit: Visit) -> None:
        super().__init__()
        self._request = request
        self._plan = plan
        self._head = head
        self._engine = engine
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; stop as soon as nobody is there to read it."""
        work = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled() and (problem := work.exception()) is not None:
            raise problem

    def _start(self, kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, object]:
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache, must-revalidate"), *more]
        headers.append((b"openai-model", gate.header_text(self._head.model)))
        if self._request.ignored:
            headers.append((b"x-afterword-ignored", gate.header_text(", ".join(self._request.ignored))))
        return {"type": "http.response.start", "status": 200, "headers": headers}

    async def _whole(self, send: Send) -> None:
        deltas: dict[int, list[Delta]] = {}
        usage = Usage(0, 0)
        async with aclosing(run(self._plan, self._engine, self._visit.use, self._visit.begin)) as items:
            async for item in items:
                if isinstance(item, Usage):
                    usage = item
                else:
                    self._visit.finished(item.index, item.finish)
                    deltas.setdefault(item.index, []).append(item)
        choices = [fold(deltas[index]) for index in sorted(deltas)]
        body = wire.completion(self._head, choices, usage)
        await send(self._start(b"application/json", (b"content-length", str(len(body)).encode())))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        async with aclosing(run(self._plan, self._engine, self._visit.use, self._visit.begin)) as items:
            first = await anext(items)  # an engine that cannot even begin is an HTTP error
            await send(self._start(b"text/event-stream"))
            try:
                await self._send_chunks(send, first, items)
            except AfterwordError as problem:
                self._visit.refuse(problem)
                await send(_body(wire.event(wire.error(problem))))  # and no [DONE]: the answer is not whole
        await send({"type": "http.response.body", "body": b""})

    async def _send_chunks(self, send: Send, first: Delta | Usage, rest: AsyncIterator[Delta | Usage]) -> None:
        options = self._request.stream_options or StreamOptions()
        written = 0
        item: Delta | Usage | None = first
        while item is not None:
            if isinstance(item, Delta):
                written += item.completion_tokens
                self._visit.finished(item.index, item.finish)
                usage: Usage | Literal["later", "never"] = "later" if options.include_usage else "never"
                if options.continuous_usage_stats:
                    usage = Usage(self._plan.prompt_tokens, written)
                event = wire.chunk(self._head, item, usage)
                await send(_body(event))
                if len(event) > _LARGE:
                    await asyncio.sleep(0)  # it took a while, and the reader may have left meanwhile
            elif options.include_usage:
                await send(_body(wire.usage_chunk(self._head, item)))
            item = await anext(rest, None)
        await send(_body(wire.DONE))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(data: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": True}

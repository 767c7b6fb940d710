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

from afterword.api import gate, pieces, wire
from afterword.api.presence import until_gone, while_present
from afterword.api.service import Service
from afterword.api.turns import Turns
from afterword.api.visit import Visit, visit_of
from afterword.completion.body import beside
from afterword.completion.choice import Delta
from afterword.completion.fields import StreamOptions
from afterword.completion.logprobs import SLICE
from afterword.completion.plan import Caller, Plan, Tokenized, make_plan
from afterword.completion.request import Request, parse
from afterword.completion.run import Usage, run, tokenize
from afterword.completion.size import check_size
from afterword.engine.protocol import Card, Engine
from afterword.errors import AfterwordError


async def create(http: HttpRequest) -> Response:
    """Everything that can be the caller's fault happens here; the answer only runs the plan."""
    service: Service = http.app.state.service
    created = int(time.time())
    service.check_room()
    limits = service.config.limits
    body = await gate.read_json(http)
    request = await beside(parse, body, limits)
    visit = visit_of(http.scope)
    served = await service.enter(request.model, visit)
    visit.model = served.id
    caller = Caller(visit.key, service.config.shared_cache, "batch" if visit.inside else "")
    texts = tokenize(request, served.engine, service.config.special_text, caller.queue)
    tokens = await while_present(http.receive, texts)
    plan = await beside(_planned, body, request, served.engine.card, tokens, caller)
    check_size(plan, limits.max_answer)
    visit.user = service.ring.pseudonym(request.user)
    gate.reserve(visit, plan.most_tokens)
    visit.promise(plan)
    head = wire.Head(wire.new_id(), created, served.id, plan.fingerprint)
    return Answer(request, plan, head, served.engine, visit)


def _planned(_: bytes, request: Request, card: Card, tokens: Tokenized, caller: Caller) -> Plan:
    return make_plan(request, card, tokens, secrets.randbits(64), caller)


class Answer(Response):
    """A response that owns the run it sends: when the client leaves, the work ends."""

    def __init__(self, request: Request, plan: Plan, head: wire.Head, engine: Engine, visit: Visit) -> None:
        super().__init__()
        self._request = request
        self._plan = plan
        self._head = head
        self._engine = engine
        self._visit = visit
        self._sharing = pieces.Sharing(plan.n)
        self._turns = Turns(SLICE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; stop as soon as nobody is there to read it."""
        work = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(send))
        gone = asyncio.create_task(until_gone(receive))
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
        body = pieces.Body(self._head, self._plan.n)
        usage = Usage(0, 0)
        async with aclosing(run(self._plan, self._engine, self._visit.use, self._visit.begin)) as items:
            async for item in items:
                if isinstance(item, Usage):
                    usage = item
                else:
                    self._visit.finished(item.index, item.finish)
                    for tokens in body.steps(item):
                        await self._turns.after(tokens)
        length = sum(map(len, body.fragments(usage)))
        await send(self._start(b"application/json", (b"content-length", str(length).encode())))
        await pieces.send_pieces(send, body.fragments(usage))

    async def _stream(self, send: Send) -> None:
        async with aclosing(run(self._plan, self._engine, self._visit.use, self._visit.begin)) as items:
            first = await anext(items)  # an engine that cannot even begin is an HTTP error
            await send(self._start(b"text/event-stream", (b"x-accel-buffering", b"no")))
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
                if options.include_usage and options.continuous_usage_stats:
                    usage = Usage(self._plan.prompt_tokens, written)
                await self._send_chunk(send, item, usage)
            elif options.include_usage:
                await send(_body(wire.usage_chunk(self._head, item)))
            item = await anext(rest, None)
        await send(_body(wire.DONE))

    async def _send_chunk(self, send: Send, delta: Delta, usage: Usage | Literal["later", "never"]) -> None:
        """One event. One with the prompt in it can be large: it is sent in pieces, and other tasks run between them."""
        if delta.echo is None:
            await send(_body(wire.chunk(self._head, delta, usage)))
            return
        choice = None
        for step in self._sharing.steps(delta):
            if isinstance(step, pieces.Shared):
                choice = pieces.Choice(delta.index, step)
            else:
                await self._turns.after(step)
        assert choice is not None
        for tokens in choice.steps(delta):
            await self._turns.after(tokens)
        for piece in pieces.cut(pieces.event(self._head, choice, usage)):
            await send(_body(piece))
            await asyncio.sleep(0)  # the reader may have left meanwhile


def _body(data: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": True}

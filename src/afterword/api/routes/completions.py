"""`POST /v1/completions`: turns the body into a plan, and the plan's deltas into a whole or a streamed response."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterword.api.middleware.quota import reserve
from afterword.api.requests.disconnect import cancel_on_disconnect
from afterword.api.requests.request_body import read_json
from afterword.api.requests.request_context import request_context_of
from afterword.api.requests.request_recorder import RequestRecorder
from afterword.api.responses import incremental, serialization
from afterword.api.responses.part_sender import PartSender
from afterword.api.responses.response_headers import header_text
from afterword.api.responses.time_slices import TimeSlices
from afterword.api.service import Service
from afterword.completion.choice import Delta
from afterword.completion.infill import InfillRules
from afterword.completion.json_body import run_in_thread_if_large
from afterword.completion.logprobs import SLICE_TOKENS
from afterword.completion.object_fields import StreamOptions
from afterword.completion.plan import ClientIdentity, Plan, Tokenized, check_candidates, make_plan
from afterword.completion.request import CompletionRequest, parse
from afterword.completion.rerank import run_plan
from afterword.completion.response_size import check_size
from afterword.completion.run import Usage, tokenize
from afterword.completion.step_queue import Reader
from afterword.completion.vocabulary_fields import with_all_alternatives
from afterword.engine.protocol import Engine, ModelInfo
from afterword.errors import AfterwordError


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A validated request with its plan, and what is needed to run it."""

    request: CompletionRequest
    plan: Plan
    head: serialization.ResponseHead
    engine: Engine
    recorder: RequestRecorder


async def create(http: HttpRequest) -> Response:
    """Validate the request completely and make its plan; the returned response only runs the plan."""
    service: Service = http.app.state.service
    service.check_capacity()
    body = await read_json(http)
    request = await run_in_thread_if_large(parse, body, service.config.limits, service.default_values)
    if service.config.bos_before_ids and request.add_special_tokens is None:
        request = replace(request, add_special_tokens=True)
    rules = InfillRules(trim=service.config.infill_trim, rerank=service.config.infill_rerank)
    prepared = await prepare(http, body, request, service.config.special_text, rules)
    return CompletionResponse(prepared)


async def prepare(
    http: HttpRequest, body: bytes, request: CompletionRequest, special: bool, rules: InfillRules
) -> PreparedRun:
    """Load the model if necessary, tokenize the texts, make the plan and charge it to the key.

    `special`: text that spells a special token becomes that token. The model stays loaded until the response has ended.
    """
    service: Service = http.app.state.service
    created = int(time.time())
    limits = service.config.limits
    request_context = request_context_of(http.scope)
    served = await request_context.enter(service.use_model(request.model))
    request_context.recorder.record_model(served.id)
    request = with_all_alternatives(request, served.engine.model_info, limits)
    identity = ClientIdentity(
        request_context.key,
        service.config.shared_cache,
        "batch" if request_context.in_process else "",
        request_context.cache_name,
    )
    texts = tokenize(request, served.engine, special, identity.job_client, rules)
    tokens = await cancel_on_disconnect(http.receive, texts)
    plan = await run_in_thread_if_large(_make_plan, body, request, served.engine.model_info, tokens, identity)
    check_candidates(plan, limits)
    check_size(plan, limits.most_bytes(request_context.in_process))
    request_context.recorder.record_user(service.key_registry.pseudonym(request.user))
    reserve(request_context, plan.max_total_tokens)
    request_context.recorder.record_plan(plan.n, len(plan.prompts))
    head = serialization.ResponseHead(
        serialization.new_id(), created, served.id, plan.fingerprint, null_scores=not limits.strict
    )
    return PreparedRun(request, plan, head, served.engine, request_context.recorder)


def _make_plan(
    _: bytes, request: CompletionRequest, model_info: ModelInfo, tokens: Tokenized, identity: ClientIdentity
) -> Plan:
    return make_plan(request, model_info, tokens, secrets.randbits(64), identity)


class CompletionResponse(Response):
    """A response that runs its plan while it is sent. If the client disconnects, the run ends."""

    def __init__(self, prepared: PreparedRun) -> None:
        super().__init__()
        self._request = prepared.request
        self._plan = prepared.plan
        self._head = prepared.head
        self._engine = prepared.engine
        self._recorder = prepared.recorder
        self._time_slices = TimeSlices(SLICE_TOKENS)

    @cached_property
    def _chunks(self) -> serialization.ChunkEncoder:
        return serialization.ChunkEncoder(self._head)

    @cached_property
    def _sharing(self) -> incremental.PromptEncoder:
        return incremental.PromptEncoder(self._plan.n)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the plan and send the response; cancel the run when the client disconnects."""
        work = self._send_stream(scope, send) if self._request.stream else self._send_whole(send)
        with suppress(ClientDisconnect):
            await cancel_on_disconnect(receive, work)

    async def _send_whole(self, send: Send) -> None:
        body = incremental.EncodedBody(self._head, self._plan.n)
        usage = Usage(0, 0)
        async with aclosing(self._run()) as items:
            async for item in items:
                if isinstance(item, Usage):
                    usage = item
                else:
                    self._recorder.record_choice(item.index, item.finish)
                    for tokens in body.encode(item):
                        await self._time_slices.yield_after(tokens)
        fragments = [*body.fragments(usage)]
        length = sum(map(len, fragments))
        await send(start(self._request, self._head, b"application/json", (b"content-length", str(length).encode())))
        await incremental.send_chunks(send, fragments)

    async def _send_stream(self, scope: Scope, send: Send) -> None:
        reader = Reader()
        sender = PartSender(scope, send, reader)
        async with aclosing(self._run(reader)) as items:
            first = await anext(items)  # an error before the first item is an HTTP error
            await send(start(self._request, self._head, *STREAM))
            try:
                await self._send_chunks(sender, first, items)
            except AfterwordError as problem:
                self._recorder.record_error(problem)
                # no [DONE] follows, since the response is incomplete
                await sender.send(serialization.event(serialization.error(problem)))
        await send({"type": "http.response.body", "body": b""})

    def _run(self, reader: Reader | None = None) -> AsyncGenerator[Delta | Usage]:
        recorder = self._recorder
        return run_plan(self._plan, self._engine, recorder.record_usage, recorder.record_compute_start, reader=reader)

    async def _send_chunks(self, sender: PartSender, first: Delta | Usage, rest: AsyncIterator[Delta | Usage]) -> None:
        options = self._request.stream_options or StreamOptions()
        written = 0
        item: Delta | Usage | None = first
        while item is not None:
            if isinstance(item, Delta):
                written += item.completion_tokens
                self._recorder.record_choice(item.index, item.finish)
                usage: Usage | Literal["later", "never"] = "later" if options.include_usage else "never"
                if options.include_usage and options.continuous_usage_stats:
                    usage = Usage(self._plan.prompt_tokens, written)
                await self._send_chunk(sender, item, usage)
            elif options.include_usage:
                await sender.send(serialization.usage_chunk(self._head, item))
            item = await anext(rest, None)
        await sender.send(serialization.DONE)

    async def _send_chunk(self, sender: PartSender, delta: Delta, usage: Usage | Literal["later", "never"]) -> None:
        """Send one event. One about the prompt or a whole vocabulary is large: other tasks run between its pieces."""
        if delta.echo is None and delta.prompt is None and not delta.has_rows:
            await sender.send(self._chunks.chunk(delta, usage))
            return
        choice = None
        for step in self._sharing.encode(delta):
            if isinstance(step, incremental.EncodedPrompt):
                choice = incremental.EncodedChoice(delta.index, step)
            else:
                await self._time_slices.yield_after(step)
        assert choice is not None
        for tokens in choice.encode(delta):
            await self._time_slices.yield_after(tokens)
        for piece in incremental.chunked(incremental.event(self._head, choice, usage)):
            await sender.send(piece)
            await asyncio.sleep(0)  # a disconnect of the client can cancel this task here


STREAM = (b"text/event-stream", (b"x-accel-buffering", b"no"))
"""The content type and the further header of a stream."""


def start(
    request: CompletionRequest, head: serialization.ResponseHead, kind: bytes, *more: tuple[bytes, bytes]
) -> dict[str, object]:
    """The message that starts a response with the content type `kind` and further headers."""
    headers = [(b"content-type", kind), (b"cache-control", b"no-cache, must-revalidate"), *more]
    headers.append((b"openai-model", header_text(head.model)))
    if request.ignored:
        headers.append((b"x-afterword-ignored", header_text(", ".join(request.ignored))))
    return {"type": "http.response.start", "status": 200, "headers": headers}

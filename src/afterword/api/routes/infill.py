"""`POST /infill`: llama-server's request and response for infill, which llama.vim and llama.vscode send and read.

The request becomes a plan and runs like a completion; only the fields and the form of the response differ.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterword.api.requests.disconnect import cancel_on_disconnect
from afterword.api.requests.request_body import read_json
from afterword.api.responses import infill_serialization, serialization
from afterword.api.responses.infill_serialization import InfillHead, InfillTimes
from afterword.api.responses.part_sender import PartSender
from afterword.api.routes.completions import STREAM, PreparedRun, prepare, start
from afterword.api.service import Service
from afterword.completion.infill import InfillRules
from afterword.completion.infill_request import InfillRequest, parse_infill
from afterword.completion.json_body import run_in_thread_if_large
from afterword.completion.middle import Middle, MiddlePart, StopType
from afterword.completion.rerank import run_plan
from afterword.completion.run import Usage
from afterword.completion.step_queue import Reader
from afterword.engine.protocol import FinishReason
from afterword.errors import AfterwordError

_FINISH: dict[StopType, FinishReason | None] = {"none": None, "eos": "stop", "word": "stop", "limit": "length"}
_RULES = InfillRules(always=True, snippets=True, fill_context=True)


async def create(http: HttpRequest) -> Response:
    """Validate the request and make its plan; the returned response only runs it. Names of special tokens are text."""
    service: Service = http.app.state.service
    service.check_capacity()
    body = await read_json(http)
    infill = await run_in_thread_if_large(parse_infill, body, service.config.limits, service.default_values)
    request = infill.completion
    if not infill.shares_cache:
        request = replace(request, cache_salt=secrets.token_hex(16))
    rules = replace(
        _RULES,
        most_tokens=service.config.limits.max_request_tokens,
        trim=service.config.infill_trim,
        rerank=service.config.infill_rerank,
        ends_texts=bool(infill.indent or infill.predict_ms),
    )
    prepared = await prepare(http, body, request, False, rules)
    return InfillResponse(infill, prepared)


class InfillResponse(Response):
    """A response that runs its plan while it is sent. If the client disconnects, the run ends."""

    def __init__(self, infill: InfillRequest, prepared: PreparedRun) -> None:
        super().__init__()
        self._infill = infill
        self._prepared = prepared
        job = prepared.plan.prompts[0].job
        self._head = InfillHead(prepared.head.model, prepared.engine.model_info.context, len(job.prompt), infill)
        fewer = job.max_tokens < infill.completion.max_tokens
        self._middles = [Middle(prepared.plan, infill.indent, self._is_late, fewer) for _ in range(prepared.plan.n)]
        self._started_at = time.monotonic()
        self._first_token_at: float | None = None
        self._usage = Usage(0, 0)
        self._reader = Reader(self._has_ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the plan and send the response; cancel the run when the client disconnects."""
        work = self._send_stream(scope, send) if self._prepared.request.stream else self._send_whole(send)
        with suppress(ClientDisconnect):
            await cancel_on_disconnect(receive, work)

    async def _send_whole(self, send: Send) -> None:
        async with aclosing(self._parts()) as parts:
            async for _ in parts:
                pass
        found = self._finals(streamed=False)
        data = serialization.encode(found if len(found) > 1 else found[0])
        length = (b"content-length", str(len(data)).encode())
        await send(start(self._prepared.request, self._prepared.head, b"application/json", length))
        await send({"type": "http.response.body", "body": data})

    async def _send_stream(self, scope: Scope, send: Send) -> None:
        sender = PartSender(scope, send, self._reader)
        async with aclosing(self._parts()) as parts:
            part = await anext(parts, None)  # an error before the first part is an HTTP error
            await send(start(self._prepared.request, self._prepared.head, *STREAM))
            try:
                while part is not None:
                    if part.text or (part.tokens and part.stop == "none"):
                        await self._send_part(sender, part)
                    part = await anext(parts, None)
                for final in self._finals(streamed=True):
                    await sender.send(serialization.event(final))
            except AfterwordError as problem:
                self._prepared.recorder.record_error(problem)
                await sender.send(serialization.event(serialization.error(problem)))
        await send({"type": "http.response.body", "body": b""})

    async def _send_part(self, sender: PartSender, part: MiddlePart) -> None:
        predicted = self._middles[part.index].length
        await sender.send(serialization.event(infill_serialization.part_object(self._head, part, predicted)))

    async def _parts(self) -> AsyncGenerator[MiddlePart]:
        """The parts of all middles as they are generated. The run ends when all middles have ended."""
        prepared, recorder = self._prepared, self._prepared.recorder
        started = recorder.record_compute_start
        async with aclosing(
            run_plan(prepared.plan, prepared.engine, self._record_usage, started, self._reader)
        ) as items:
            async for item in items:
                if isinstance(item, Usage):
                    continue
                if item.token_ids and self._first_token_at is None:
                    self._first_token_at = time.monotonic()
                part = self._middles[item.index].add(item)
                if part is not None:
                    recorder.record_choice(part.index, _FINISH[part.stop])
                    yield part
                if all(middle.stop != "none" for middle in self._middles):
                    return

    def _has_ended(self, index: int) -> bool:
        return self._middles[index].stop != "none"

    def _finals(self, streamed: bool) -> list[dict[str, Any]]:
        """The whole middles, or the last events of streamed ones. Called after the run has ended."""
        now = time.monotonic()
        first = now if self._first_token_at is None else self._first_token_at
        times = InfillTimes(
            prompt_ms=(first - self._started_at) * 1000,
            predicted_ms=(now - first) * 1000,
            prompt=self._head.prompt_tokens,
            cached=self._usage.cached_tokens,
            predicted=sum(len(middle.tokens) for middle in self._middles),
        )
        return [
            infill_serialization.final_object(self._head, index, middle, times, streamed)
            for index, middle in enumerate(self._middles)
        ]

    def _record_usage(self, usage: Usage) -> None:
        self._usage = usage
        self._prepared.recorder.record_usage(usage)

    def _is_late(self) -> bool:
        """Whether the time for generation is over."""
        if not self._infill.predict_ms or self._first_token_at is None:
            return False
        return (time.monotonic() - self._first_token_at) * 1000 > self._infill.predict_ms

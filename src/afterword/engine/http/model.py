"""Runs the samples of jobs on the upstream: sends a request for each, and again where it has brought nothing.

A request is sent again when the upstream answers again and still serves the same model. If it broke off the same
request `MOST_BROKEN` times, the request may be the reason, and fails. A refusal that another model can explain is the
occasion to look at the model too. The event loop's thread owns all state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from afterword.engine.http.failures import Broken, Malformed, Refused, SeveralModels, Unavailable, UpstreamFailure
from afterword.engine.http.identity import Identity, find_identity
from afterword.engine.http.upstream import GENERATE, Upstream
from afterword.engine.http.wire import Part, most_bytes, read_part, request_body
from afterword.engine.messages import LoadUpstream
from afterword.engine.protocol import ModelInfo
from afterword.engine.vllm.jobs import SampleLate, SampleLost
from afterword.engine.vllm.requests import PromptScore, SampleOutput, SampleRequest
from afterword.engine.vllm.tokenizer import FolderTokenizer
from afterword.system.tasks import end_process

MOST_BROKEN = 3
"""How many times the same request is sent to an upstream that takes it and then breaks it off."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between two attempts
_END_SECONDS = 1.0  # for the end of a stream after its last token
_OF_MODEL = (401, 403, 404)  # statuses of an upstream that has restarted with another key, flags or model
_ENDED = ("stop", "length")  # vLLM's reasons of a sample that has ended by itself


class SampleRefused(Exception):
    """The upstream refuses the request, or its response is not vLLM's."""


_log = logging.getLogger("afterword")


@dataclass(slots=True)
class _Attempts:
    """The attempts of one request. `deadline`: the loop's time after which it is not sent again; None: never."""

    deadline: float | None
    broken: int = 0
    pause: float = _FIRST_PAUSE

    def left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()


class UpstreamModel:
    """A model of the upstream.

    If the upstream serves another model after a failure, the worker ends. The supervisor starts another worker, which
    looks at the model anew.
    """

    def __init__(
        self,
        upstream: Upstream,
        identity: Identity,
        model_info: ModelInfo,
        tokenizer: FolderTokenizer,
        settings: LoadUpstream,
    ) -> None:
        self.model_info = model_info
        self.tokenizer = tokenizer
        self._upstream = upstream
        self._identity = identity
        self._patience = settings.patience
        self._verbose = settings.verbose
        self._vocabulary = len(model_info.pieces)
        self._waiting: asyncio.Task[None] | None = None  # from a failure until the upstream answers again

    async def close(self) -> None:
        """Close the connections."""
        await self._upstream.close()

    async def generate(self, request: SampleRequest) -> AsyncGenerator[SampleOutput]:
        """Run a request; see `jobs.Generate`."""
        now = asyncio.get_running_loop().time()
        attempts = _Attempts(now + self._patience if self._patience else None)
        while True:
            begun = False
            try:
                async with aclosing(self._run(request)) as outputs:
                    async for output in outputs:
                        begun = True
                        yield output
                return
            except (Unavailable, Broken) as problem:
                attempts.broken += isinstance(problem, Broken)
                if begun or attempts.broken >= MOST_BROKEN:
                    raise SampleLost(self._told(problem)) from None
                _log.warning("The upstream failed before the first token of %s: %s", request.name, self._told(problem))
            except UpstreamFailure as problem:
                if isinstance(problem, Refused) and problem.status in _OF_MODEL:
                    await self._look_at_model()
                raise SampleRefused(self._told(problem)) from None
            await self._wait(attempts)

    async def _run(self, request: SampleRequest) -> AsyncGenerator[SampleOutput]:
        """Run a request once. A stream has no scores of the prompt, so a whole response with one token comes first."""
        scores: tuple[PromptScore, ...] = ()
        if request.fields["prompt_logprobs"] is not None:
            body = request_body(self._identity.model, request, self._vocabulary, stream=False)
            data = await self._upstream.post(GENERATE, body, most_bytes(request, stream=False))
            part = _completed(read_part(data, request, self._vocabulary, stream=False))
            if request.fields["max_tokens"] == 1:
                yield part.output
                return
            scores = part.output.scores
        body = request_body(self._identity.model, request, self._vocabulary, stream=True)
        async with aclosing(self._upstream.events(GENERATE, body, most_bytes(request, stream=True))) as events:
            count = 0
            async for data in events:
                part = _completed(read_part(data, request, self._vocabulary, stream=True))
                count += len(part.output.ids)
                if count > request.fields["max_tokens"]:
                    raise Malformed("there are more tokens than were requested")
                if part.reason:
                    await _read_end(events)
                yield msgspec.structs.replace(part.output, scores=scores)
                scores = ()
                if part.reason:
                    return
        raise Broken("the stream has ended early")

    def _told(self, problem: UpstreamFailure) -> str:
        """What the operator is told. What the upstream says may contain the prompt: only with `--verbose`."""
        return problem.detailed if self._verbose else str(problem)

    # ---- waiting for the upstream

    async def _wait(self, attempts: _Attempts) -> None:
        """Return when the request may be sent again. Raises `SampleLate`, and what has ended the common wait."""
        if self._waiting is None or self._waiting.done():
            self._waiting = asyncio.create_task(self._wait_for_answers())
        waiting = self._waiting
        try:
            async with asyncio.timeout(attempts.left()):
                await asyncio.sleep(attempts.pause)
                await asyncio.shield(waiting)
        except TimeoutError:
            raise SampleLate from None
        attempts.pause = min(2 * attempts.pause, _LONGEST_PAUSE)

    async def _wait_for_answers(self) -> None:
        """Ask the upstream for its model until it answers. Each reason why it does not is logged once in a row."""
        pause, told = _FIRST_PAUSE, ""
        while problem := await self._check_model():
            if self._told(problem) != told:
                told = self._told(problem)
                _log.warning("The upstream does not say which model it serves: %s", told)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _look_at_model(self) -> None:
        """Ask the upstream for its model once."""
        if problem := await self._check_model():
            _log.warning("The upstream does not say which model it serves: %s", self._told(problem))

    async def _check_model(self) -> UpstreamFailure | None:
        """End the worker if the upstream serves another model, or several others. Returns why it does not say it."""
        try:
            identity = await find_identity(self._upstream, self._identity.model)
        except SeveralModels as problem:  # the next worker chooses one of them, or says at its start that it cannot
            _log.error("The upstream serves other models than %s: %s", self._identity.model, problem)
            end_process()
        except UpstreamFailure as problem:
            return problem
        if identity != self._identity:
            _log.error("The upstream serves another model: %s, before %s.", identity, self._identity)
            end_process()
        return None


async def _read_end(events: AsyncGenerator[bytes]) -> None:
    """Read a stream to its end, which follows the last token at once, so that the connection can be used again."""
    with contextlib.suppress(UpstreamFailure, TimeoutError):
        async with asyncio.timeout(_END_SECONDS):
            async for _ in events:
                pass


def _completed(part: Part) -> Part:
    """The part. Raises `Broken` if vLLM has ended the sample for a reason of its own, such as its own end."""
    if part.reason and part.reason not in _ENDED:
        raise Broken("it ended the sample for a reason of its own", part.reason)
    return part

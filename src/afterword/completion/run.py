"""A plan carried out over an engine: jobs in, deltas and a usage out. Nothing here waits for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from afterword.completion.choice import ChoiceBuilder, Delta, DeltaFolder
from afterword.completion.logprobs import make_echo, make_report
from afterword.completion.plan import Plan, PromptPlan, Tokenized, check_lengths, too_long
from afterword.completion.request import CompletionRequest
from afterword.engine.protocol import Engine, JobHandle, ModelInfo, Step, Token
from afterword.errors import ModelReplaced, ReaderTooSlow

MAX_UNREAD_BYTES = 16 * 2**20
"""Bytes of steps that may wait for the reader of an answer; beyond it the engine is paused for that request. What was
on its way from the engine's process (some megabytes at most) still comes on top."""

READER_SECONDS = 60.0
"""How long the engine may be paused before the reader is given up: what has been computed takes memory meanwhile."""

_MAX_CONCURRENT_TEXTS = 32  # prompts that are handed to the engine in one step


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request. Every prompt counts once; every candidate that was generated counts.

    `completion_tokens` are those of the texts in an answer's usage, and all that were generated in an account.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


async def tokenize(request: CompletionRequest, engine: Engine, special: bool = True, client: str = "") -> Tokenized:
    """The tokens of all texts in a request. `special`: text that spells a special token becomes that token.

    Raises `ModelReplaced` if they are not all of the model whose card the engine has now.
    """
    fingerprint = engine.model_info.fingerprint
    check_lengths(request, engine.model_info)
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    wanted = [text for text in (*texts, request.suffix or "") if text]
    work = [asyncio.ensure_future(engine.tokenize(text, special, client)) for text in wanted]
    try:
        ready = iter([_fitting(ids, request, engine.model_info) for ids in await asyncio.gather(*work)])
    finally:
        for each in work:
            each.cancel()  # one of them has failed, or the client has left
    _check_model(fingerprint, engine)
    prompts = [prompt if isinstance(prompt, tuple) else next(ready) if prompt else () for prompt in request.prompt]
    return Tokenized(tuple(prompts), next(ready) if request.suffix else ())


def _fitting(ids: Sequence[int], request: CompletionRequest, model_info: ModelInfo) -> tuple[int, ...]:
    """The tokens of a text. Raises `RequestError` if it has more than the context alone."""
    if len(ids) > model_info.context:
        raise too_long(model_info, len(ids), request.max_tokens)
    return tuple(ids)


async def run(
    plan: Plan,
    engine: Engine,
    account: Callable[[Usage], None] = lambda _: None,
    begun: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Delta | Usage]:
    """Carry out a plan. Yields deltas as they come, then one usage. Closing the iterator ends the work.

    `account` is told what was computed, however it ended: every generated token counts there, also those that a stop
    string or an end token kept out of the text. `begun` is told that a prompt has begun to be computed, for each.

    Raises `Overloaded` before the first delta, `EngineError` at any time.
    """
    growing = [_PromptProgress(plan, index, prompt, begun) for index, prompt in enumerate(plan.prompts)]
    runs: list[JobHandle] = []
    try:
        for count, prompt in enumerate(plan.prompts):
            if count and count % _MAX_CONCURRENT_TEXTS == 0:
                await asyncio.sleep(0)
            _check_model(plan.fingerprint, engine)  # it may have been replaced while other tasks ran
            runs.append(engine.start(prompt.job))
        async with aclosing(_merge_steps(runs, growing)) as steps:
            async for index, step in steps:
                for delta in growing[index].take(step, runs[index]):
                    yield delta
                if plan.best_of > plan.n:
                    await asyncio.sleep(0)  # no delta comes before all candidates are whole
    finally:
        for each in runs:
            each.close()
        read = sum(prompt.prompt_tokens for prompt in growing)
        cached = sum(prompt.cached_tokens for prompt in growing)
        account(Usage(read, sum(prompt.generated for prompt in growing), cached))
    yield Usage(read, sum(prompt.completion_tokens for prompt in growing), cached)


def _check_model(fingerprint: str, engine: Engine) -> None:
    """Raise `ModelReplaced` if the engine has another model than what was made for it supposes."""
    if engine.model_info.fingerprint != fingerprint:
        raise ModelReplaced()


class _PromptProgress:
    """The choices of one prompt while they grow. Until the prompt is scored there are none."""

    def __init__(self, plan: Plan, index: int, prompt: PromptPlan, begun: Callable[[], None]) -> None:
        self._plan = plan
        self._prompt = prompt
        self._tell_begun = begun
        self._first = index * plan.n
        self._scored: list[Token] = []
        self._choices: list[ChoiceBuilder] = []
        self._held: list[DeltaFolder] = []  # candidates, until all are whole
        self._cached = 0
        self._begun = False
        self.generated = 0  # tokens, in the text or not

    @property
    def prompt_tokens(self) -> int:
        """The caller's own tokens in the prompt, once anything of it has been computed."""
        return self._prompt.billed_tokens if self._begun else 0

    @property
    def cached_tokens(self) -> int:
        """How many of the caller's own tokens in the prompt had been computed before."""
        return max(0, min(self._cached - self._prompt.hidden_tokens, self._prompt.billed_tokens))

    @property
    def completion_tokens(self) -> int:
        """The generated tokens that are in the texts of all candidates."""
        return sum(choice.completion_tokens for choice in self._choices)

    def count(self, step: Step) -> None:
        """A step was computed, though perhaps nobody will take it any more."""
        if not self._begun:
            self._begun = True
            self._tell_begun()
        self.generated += len(step.sampled)

    def take(self, step: Step, run: JobHandle) -> Iterator[Delta]:
        """Deltas that a step brings, each made when it is asked for. Samples whose text is complete are dropped from
        the run."""
        self._scored.extend(step.scored)
        self._cached += step.cached
        if not self._choices and (step.sampled or step.ended):
            echo = make_echo(self._plan, self._prompt, self._scored)
            report = make_report(self._plan, self._prompt, self._scored)
            self._choices = [ChoiceBuilder(self._plan, self._prompt, echo, report) for _ in range(self._plan.best_of)]
            self._held = [DeltaFolder() for _ in self._choices]
            self._scored.clear()
        growing = {sample for sample, choice in enumerate(self._choices) if choice.finish is None}
        for sample, token in step.sampled:
            if sample in growing:
                self._choices[sample].add(token)
        for sample, reason in step.ended:
            self._choices[sample].end(reason)
        for sample in growing:
            if self._choices[sample].finish:
                run.drop(sample)
        ranked = self._plan.best_of > self._plan.n
        for sample in sorted(growing):
            deltas = self._choices[sample].deltas(self._first + sample)
            if ranked:
                self._held[sample].add(deltas)
            else:
                yield from deltas
        if ranked and growing and all(choice.finish for choice in self._choices):
            yield from self._best()

    def _best(self) -> Iterator[Delta]:
        """The `n` candidates with the highest mean log probability, best first, whole."""
        ranked = sorted(range(len(self._choices)), key=lambda sample: -self._choices[sample].score)
        for place, sample in enumerate(ranked[: self._plan.n]):
            yield replace(self._held[sample].result, index=self._first + place)


async def _merge_steps(
    runs: Sequence[JobHandle], growing: Sequence[_PromptProgress]
) -> AsyncGenerator[tuple[int, Step]]:
    """Steps of all runs as they come, each with the index of its run. The first failure ends it."""
    unread = _StepQueue(runs)

    async def follow(index: int, run: JobHandle) -> None:
        try:
            async for step in run:
                growing[index].count(step)
                unread.put(index, step)
            unread.end(None)
        except Exception as error:
            unread.end(error)

    tasks = [asyncio.create_task(follow(index, run)) for index, run in enumerate(runs)]
    try:
        open_runs = len(tasks)
        while open_runs:
            item = await unread.get()
            if item is None:
                open_runs -= 1
            else:
                yield item
    finally:
        unread.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _StepQueue:
    """Steps of a request that its reader has not taken yet. The engine is paused while they take too much memory.

    A reader that leaves the engine paused for `READER_SECONDS` gets what has been computed and then an error.
    """

    def __init__(self, runs: Sequence[JobHandle]) -> None:
        self._runs = runs
        self._items: asyncio.Queue[tuple[int, Step] | Exception | None] = asyncio.Queue()
        self._size = 0
        self._patience: asyncio.TimerHandle | None = None  # while the engine is paused

    def put(self, index: int, step: Step) -> None:
        """Add a step of a run."""
        self._items.put_nowait((index, step))
        self._size += step.size
        if self._size > MAX_UNREAD_BYTES and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(READER_SECONDS, self._give_up)
            for run in self._runs:
                run.pause()

    def end(self, error: Exception | None) -> None:
        """A run has ended, perhaps with an error."""
        self._items.put_nowait(error)

    async def get(self) -> tuple[int, Step] | None:
        """The next step with the index of its run, None at the end of a run. Raises the error of a run that failed."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        if item is not None:
            self._size -= item[1].size
            if self._patience is not None and self._size <= MAX_UNREAD_BYTES // 2:
                self.close()
                for run in self._runs:
                    run.resume()
        return item

    def close(self) -> None:
        """Stop waiting for the reader."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        for run in self._runs:
            run.close()
        self.end(ReaderTooSlow())

"""A plan carried out over an engine: jobs in, deltas and a usage out. Nothing here waits for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from afterword.completion.choice import Choice, Delta, Folded
from afterword.completion.logprobs import make_echo, make_report
from afterword.completion.plan import Plan, PromptPlan, Tokenized, check_lengths
from afterword.completion.request import Request
from afterword.engine.protocol import Engine, Run, Step, Token
from afterword.errors import ReaderTooSlow

MOST_AHEAD = 2**17
"""Tokens, with the alternatives beside them, that the engine may be ahead of whoever reads the answer: it waits for
nobody, so this bounds what is kept for a slow reader (to some tens of megabytes)."""

_TOGETHER = 32  # prompts that are handed to the engine in one step


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request. Every prompt counts once; every candidate that was generated counts."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


async def tokenize(request: Request, engine: Engine, special: bool = True) -> Tokenized:
    """The tokens of all texts in a request. `special`: text that spells a special token becomes that token."""
    check_lengths(request, engine.card)
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    tokens = await asyncio.gather(*(engine.tokenize(text, special) for text in (*texts, request.suffix or "") if text))
    ready = iter(tokens)
    prompts = [prompt if isinstance(prompt, tuple) else next(ready) if prompt else () for prompt in request.prompt]
    return Tokenized(tuple(prompts), next(ready) if request.suffix else ())


async def run(
    plan: Plan,
    engine: Engine,
    account: Callable[[Usage], None] = lambda _: None,
    begun: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Delta | Usage]:
    """Carry out a plan. Yields deltas as they come, then one usage. Closing the iterator ends the work.

    `account` is told what was computed, however it ended; `begun` that a prompt has begun to be computed, for each.

    Raises `Overloaded` before the first delta, `EngineError` at any time.
    """
    growing = [_Growing(plan, index, prompt, begun) for index, prompt in enumerate(plan.prompts)]
    runs: list[Run] = []
    whole = False
    try:
        for count, prompt in enumerate(plan.prompts, 1):
            runs.append(engine.start(prompt.job))
            if count % _TOGETHER == 0:
                await asyncio.sleep(0)
        async with aclosing(_merged(runs, growing)) as steps:
            async for index, step in steps:
                for delta in growing[index].take(step, runs[index]):
                    yield delta
                if plan.best_of > plan.n:
                    await asyncio.sleep(0)  # no delta comes before all candidates are whole
        whole = True
    finally:
        for each in runs:
            each.close()
        usage = Usage(
            sum(prompt.prompt_tokens for prompt in growing),
            sum(prompt.completion_tokens(whole) for prompt in growing),
            sum(prompt.cached_tokens for prompt in growing),
        )
        account(usage)
    yield usage


class _Growing:
    """The choices of one prompt while they grow. Until the prompt is scored there are none."""

    def __init__(self, plan: Plan, index: int, prompt: PromptPlan, begun: Callable[[], None]) -> None:
        self._plan = plan
        self._prompt = prompt
        self._tell_begun = begun
        self._first = index * plan.n
        self._scored: list[Token] = []
        self._choices: list[Choice] = []
        self._held: list[Folded] = []  # candidates, until all are whole
        self._cached = 0
        self._begun = False
        self._generated = 0

    @property
    def prompt_tokens(self) -> int:
        """The caller's own tokens in the prompt, once anything of it has been computed."""
        return self._prompt.billed if self._begun else 0

    @property
    def cached_tokens(self) -> int:
        """How many of the caller's own tokens in the prompt had been computed before."""
        return max(0, min(self._cached - self._prompt.hidden, self._prompt.billed))

    def completion_tokens(self, whole: bool) -> int:
        """Of a whole answer those in its text; else all that were generated, taken or not."""
        return sum(choice.completion_tokens for choice in self._choices) if whole else self._generated

    def count(self, step: Step) -> None:
        """A step was computed, though perhaps nobody will take it any more."""
        if not self._begun:
            self._begun = True
            self._tell_begun()
        self._generated += len(step.sampled)

    def take(self, step: Step, run: Run) -> Iterator[Delta]:
        """Deltas that a step brings, each made when it is asked for. Samples whose text is complete are dropped from
        the run."""
        self._scored.extend(step.scored)
        self._cached += step.cached
        if not self._choices and (step.sampled or step.ended):
            echo = make_echo(self._plan, self._prompt, self._scored)
            report = make_report(self._plan, self._prompt, self._scored)
            self._choices = [Choice(self._plan, self._prompt, echo, report) for _ in range(self._plan.best_of)]
            self._held = [Folded() for _ in self._choices]
            self._scored.clear()
        growing = {sample for sample, choice in enumerate(self._choices) if choice.finish is None}
        for sample, token in step.sampled:
            if sample in growing:
                self._choices[sample].take(token)
        for sample, reason in step.ended:
            self._choices[sample].end(reason)
        for sample in growing:
            if self._choices[sample].finish:
                run.drop(sample)
        ranked = self._plan.best_of > self._plan.n
        for sample in sorted(growing):
            deltas = self._choices[sample].deltas(self._first + sample)
            if ranked:
                self._held[sample].take(deltas)
            else:
                yield from deltas
        if ranked and growing and all(choice.finish for choice in self._choices):
            yield from self._best()

    def _best(self) -> Iterator[Delta]:
        """The `n` candidates with the highest mean log probability, best first, whole."""
        ranked = sorted(range(len(self._choices)), key=lambda sample: -self._choices[sample].score)
        for place, sample in enumerate(ranked[: self._plan.n]):
            yield replace(self._held[sample].whole, index=self._first + place)


async def _merged(runs: Sequence[Run], growing: Sequence[_Growing]) -> AsyncGenerator[tuple[int, Step]]:
    """Steps of all runs as they come, each with the index of its run. The first failure ends it."""
    steps: asyncio.Queue[tuple[int, Step] | Exception | None] = asyncio.Queue()

    ahead = 0

    async def follow(index: int, run: Run) -> None:
        nonlocal ahead
        try:
            async for step in run:
                growing[index].count(step)
                ahead += _weight(step)
                if ahead > MOST_AHEAD:
                    for each in runs:
                        each.close()  # what nobody reads is not computed any further
                    raise ReaderTooSlow()
                steps.put_nowait((index, step))
            steps.put_nowait(None)
        except Exception as error:
            steps.put_nowait(error)

    tasks = [asyncio.create_task(follow(index, run)) for index, run in enumerate(runs)]
    try:
        open_runs = len(tasks)
        while open_runs:
            item = await steps.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_runs -= 1
            else:
                ahead -= _weight(item[1])
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _weight(step: Step) -> int:
    """How much memory a step takes: its tokens, and the alternatives beside them."""
    if len(step.sampled) == 1 and not step.scored:
        return 1 + len(step.sampled[0][1].top)
    return sum(1 + len(token.top) for _, token in step.sampled) + sum(1 + len(token.top) for token in step.scored)

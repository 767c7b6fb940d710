"""A plan carried out over an engine: jobs in, deltas and a usage out. Nothing here waits for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from afterword.completion.choice import Choice, Delta, fold
from afterword.completion.logprobs import make_echo, make_report
from afterword.completion.plan import Plan, PromptPlan, Tokenized, check_lengths
from afterword.completion.request import Request
from afterword.engine.protocol import Engine, Run, Step, Token


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


async def run(plan: Plan, engine: Engine) -> AsyncGenerator[Delta | Usage]:
    """Carry out a plan. Yields deltas as they come, then one usage. Closing the iterator ends the work.

    Raises `Overloaded` before the first delta, `EngineError` at any time.
    """
    growing = [_Growing(plan, index, prompt) for index, prompt in enumerate(plan.prompts)]
    runs: list[Run] = []
    try:
        for prompt in plan.prompts:
            runs.append(engine.start(prompt.job))
        async with aclosing(_merged(runs)) as steps:
            async for index, step in steps:
                for delta in growing[index].take(step, runs[index]):
                    yield delta
    finally:
        for each in runs:
            each.close()
    yield Usage(
        plan.prompt_tokens,
        sum(prompt.completion_tokens for prompt in growing),
        sum(prompt.cached_tokens for prompt in growing),
    )


class _Growing:
    """The choices of one prompt while they grow. Until the prompt is scored there are none."""

    def __init__(self, plan: Plan, index: int, prompt: PromptPlan) -> None:
        self._plan = plan
        self._prompt = prompt
        self._first = index * plan.n
        self._scored: list[Token] = []
        self._choices: list[Choice] = []
        self._cached = 0

    @property
    def cached_tokens(self) -> int:
        """How many of the caller's own tokens in the prompt had been computed before."""
        return max(0, min(self._cached - self._prompt.hidden, self._prompt.billed))

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    def take(self, step: Step, run: Run) -> list[Delta]:
        """Deltas that a step brings. Samples whose text is complete are dropped from the run."""
        self._scored.extend(step.scored)
        self._cached += step.cached
        if not self._choices and (step.sampled or step.ended):
            echo = make_echo(self._plan, self._prompt, self._scored)
            report = make_report(self._plan, self._prompt, self._scored)
            self._choices = [Choice(self._plan, self._prompt, echo, report) for _ in range(self._plan.best_of)]
        growing = {sample for sample, choice in enumerate(self._choices) if choice.finish is None}
        for sample, token in step.sampled:
            if sample in growing:
                self._choices[sample].take(token)
        for sample, reason in step.ended:
            self._choices[sample].end(reason)
        for sample in growing:
            if self._choices[sample].finish:
                run.drop(sample)
        if self._plan.best_of > self._plan.n:
            return self._best() if growing and all(choice.finish for choice in self._choices) else []
        return [delta for sample in sorted(growing) for delta in self._choices[sample].deltas(self._first + sample)]

    def _best(self) -> list[Delta]:
        """The `n` candidates with the highest mean log probability, best first, whole."""
        ranked = sorted(self._choices, key=lambda choice: -choice.score)
        answers = [fold(choice.deltas(self._first + place)) for place, choice in enumerate(ranked)]
        return answers[: self._plan.n]


async def _merged(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Step]]:
    """Steps of all runs as they come, each with the index of its run. The first failure ends it."""
    steps: asyncio.Queue[tuple[int, Step] | Exception | None] = asyncio.Queue()

    async def follow(index: int, run: Run) -> None:
        try:
            async for step in run:
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
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

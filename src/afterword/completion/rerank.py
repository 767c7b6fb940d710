"""Fills gaps with models without infill tokens: samples several middles and returns those that fit the suffix best.

The model reads only the prefix when it samples. Then it scores the suffix after each middle: the middle under which the
suffix has the highest log probability is the first choice. Everything runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from msgspec import structs

from afterword.completion.choice import Delta, DeltaFolder
from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.run import Usage, check_model, run
from afterword.completion.step_queue import Reader
from afterword.engine.protocol import Engine, Job, JobHandle

_AT_ONCE = 8
"""Candidates that are scored at the same time: the steps for each have the scores of the whole prompt."""


def run_plan(
    plan: Plan,
    engine: Engine,
    record_usage: Callable[[Usage], None] = lambda _: None,
    on_prompt_started: Callable[[], None] = lambda: None,
    reader: Reader | None = None,
) -> AsyncGenerator[Delta | Usage]:
    """Run a plan of any kind, like `run`. With a suffix to rank by, each choice is one delta at the end."""
    if plan.reranks:
        return _run_and_rank(plan, engine, record_usage, on_prompt_started)
    return run(plan, engine, record_usage, on_prompt_started, reader)


async def _run_and_rank(
    plan: Plan, engine: Engine, record_usage: Callable[[Usage], None], on_prompt_started: Callable[[], None]
) -> AsyncGenerator[Delta | Usage]:
    whole = Usage(0, 0)
    computed = Usage(0, 0)
    scored = 0

    def keep(usage: Usage) -> None:
        nonlocal computed
        computed = usage

    try:
        candidates = [DeltaFolder() for _ in range(len(plan.prompts) * plan.best_of)]
        every = replace(plan, n=plan.best_of, return_token_ids=True)
        async with aclosing(run(every, engine, keep, on_prompt_started)) as items:
            async for item in items:
                if isinstance(item, Usage):
                    whole = item
                else:
                    candidates[item.index].add([item])
        for index, prompt in enumerate(plan.prompts):
            first = index * plan.best_of
            middles = [folder.result for folder in candidates[first : first + plan.best_of]]
            scored += prompt.scored_tokens
            order = await _ranking(plan, prompt, middles, engine)
            for rank, best in enumerate(order[: plan.n]):
                yield structs.replace(_requested(middles[best], plan), index=index * plan.n + rank)
    finally:
        record_usage(replace(computed, prompt_tokens=computed.prompt_tokens + scored))
    yield replace(whole, prompt_tokens=whole.prompt_tokens + scored)


def _requested(middle: Delta, plan: Plan) -> Delta:
    """The middle without the token ids that only the ranking needs."""
    if plan.return_token_ids:
        return middle
    report = None if middle.prompt is None or plan.prompt_logprobs is None else replace(middle.prompt, token_ids=None)
    return structs.replace(middle, token_ids=None, prompt=report)


async def _ranking(plan: Plan, prompt: PromptPlan, middles: list[Delta], engine: Engine) -> list[int]:
    """The indexes of the middles, the one first under which the suffix is most likely. Of equal ones the first."""
    scores: list[float] = []
    for start in range(0, len(middles), _AT_ONCE):
        check_model(plan.fingerprint, engine)
        scores += await _scores(prompt, middles[start : start + _AT_ONCE], engine)
    return sorted(range(len(middles)), key=lambda index: -scores[index])


async def _scores(prompt: PromptPlan, middles: list[Delta], engine: Engine) -> list[float]:
    """The log probability of the suffix after each middle."""
    handles: list[JobHandle] = []
    try:
        for middle in middles:
            text = (middle.token_ids or ())[: middle.completion_tokens]  # without an end token or a stop string
            handles.append(engine.start(_scoring(prompt.job, text + prompt.suffix)))
        return [await _score(handle, len(prompt.suffix)) for handle in handles]
    finally:
        for handle in handles:
            handle.close()


def _scoring(job: Job, more: tuple[int, ...]) -> Job:
    """The job that scores the prompt of `job` with these further tokens, and generates nothing."""
    return structs.replace(
        job,
        prompt=job.prompt + more,
        samples=1,
        max_tokens=0,
        min_tokens=0,
        alternatives=None,
        prompt_alternatives=0,
        prediction=(),
        reported=(),
        reported_at=None,
    )


async def _score(handle: JobHandle, count: int) -> float:
    """The sum of the log probabilities of the last `count` tokens of a job's prompt."""
    scores = [token.logprob or 0.0 async for step in handle for token in step.scored]
    return sum(scores[len(scores) - count :])

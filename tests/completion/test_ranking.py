"""`rerank.run_plan`: how the middles of a model without infill tokens are scored."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from afterword.completion.choice import Delta
from afterword.completion.infill import InfillRules
from afterword.completion.plan import check_candidates, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.completion.rerank import run_plan
from afterword.completion.run import tokenize
from afterword.engine.protocol import Job
from afterword.errors import RequestError
from scripted_engine import MODEL_INFO, ScriptedEngine, ScriptedJob, text_script


@dataclass
class CountingEngine(ScriptedEngine):
    """`most`: the most jobs that were open at the same time."""

    most: int = 0

    def start(self, job: Job) -> ScriptedJob:
        started = super().start(job)
        self.most = max(self.most, sum(bool(each.live) for each in self.jobs))
        return started


async def middles(engine: ScriptedEngine, request: CompletionRequest, rules: InfillRules) -> list[Delta]:
    plan = make_plan(request, engine.model_info, await tokenize(request, engine, rules=rules), 0)
    return [item async for item in run_plan(plan, engine) if isinstance(item, Delta)]


def test_few_middles_are_scored_at_the_same_time_and_without_the_prediction() -> None:
    """The steps for each have the scores of the whole prompt, and wait in memory until they are read."""
    model_info = replace(MODEL_INFO, verifies_drafts=True)
    engine = CountingEngine(text_script(*(" cat",) * 20), model_info=model_info)
    request = CompletionRequest(prompt=("a",), suffix=" sat", n=17, prediction=" cat")
    assert len(asyncio.run(middles(engine, request, InfillRules(rerank=True)))) == 17
    sampling, *scoring = engine.jobs
    assert (len(scoring), engine.most) == (20, 8)
    assert sampling.job.prediction
    assert not any(each.job.prediction for each in scoring)


@pytest.mark.parametrize(
    ("limits", "param"), [(RequestLimits(max_completions=3), "n"), (RequestLimits(max_request_tokens=39), "max_tokens")]
)
def test_the_candidates_of_middles_count_against_the_limits(limits: RequestLimits, param: str) -> None:
    engine = ScriptedEngine(text_script())
    request = CompletionRequest(prompt=("a",), suffix="z", max_tokens=10)
    tokens = asyncio.run(tokenize(request, engine, rules=InfillRules(rerank=True)))
    plan = make_plan(request, engine.model_info, tokens, 0)
    check_candidates(plan, RequestLimits(max_completions=4, max_request_tokens=40))
    with pytest.raises(RequestError) as caught:
        check_candidates(plan, limits)
    assert caught.value.param == param


def test_middles_that_fill_the_context_stay_within_the_limit() -> None:
    engine = ScriptedEngine(text_script())
    rules = InfillRules(always=True, fill_context=True, most_tokens=40, rerank=True)
    request = CompletionRequest(prompt=("a",), suffix="z", max_tokens=1000)
    plan = make_plan(request, engine.model_info, asyncio.run(tokenize(request, engine, rules=rules)), 0)
    assert (plan.best_of, plan.max_generated_tokens) == (4, 40)


def test_a_suffix_that_is_left_out_of_one_prompt_ranks_the_middles_of_the_other() -> None:
    engine = ScriptedEngine(text_script(*(" cat",) * 9))
    request = CompletionRequest(prompt=("a", "b" * 50), suffix="z", max_tokens=62)
    found = asyncio.run(middles(engine, request, InfillRules(rerank=True, trim=True)))
    assert [(delta.index, delta.text) for delta in found] == [(0, " cat"), (1, " cat")]

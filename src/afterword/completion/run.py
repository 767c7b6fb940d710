"""Runs a plan: starts its jobs on an engine, drops samples that end early, and yields deltas and then the usage.

`run` owns the job handles and closes them, however it ends. Everything runs on the event loop's thread. Nothing here
waits for anything but the engine and the reader of the deltas.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from msgspec import structs

from afterword.completion.choice import ChoiceBuilder, Delta, DeltaFolder, Shared
from afterword.completion.dry_breakers import Breakers, find_breakers
from afterword.completion.infill import NO_RULES, InfillRules, before_suffix, file_text, layout_of, suffix_tokens
from afterword.completion.logprobs import make_echo, make_report
from afterword.completion.plan import Plan, PromptPlan, Tokenized, check_lengths, too_long
from afterword.completion.predicted import PredictedTokens, predicted_text, predicted_tokens
from afterword.completion.prompt_rows import PromptRows, empty_columns
from afterword.completion.request import CompletionRequest
from afterword.completion.sampler_fields import uses_dry
from afterword.completion.step_queue import Reader, StepQueue
from afterword.completion.token_healing import first_tokens
from afterword.engine.draft import PredictedText
from afterword.engine.protocol import MAX_TAIL, Engine, JobHandle, ModelInfo, Step, Token
from afterword.errors import ModelReplaced, RequestError

_STARTS_PER_TURN = 32  # jobs that are started before other tasks of the event loop run


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a whole request. Each prompt counts once, each generated candidate counts.

    `completion_tokens`: in a response, the tokens of the texts; for an account, all generated tokens,
    also those that were taken back.
    `cached_tokens`: the tokens of the prompts that came from the prefix cache. `predicted`: the tokens of the
    prediction that are in the texts, and those that were verified and are not.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    predicted: PredictedTokens = field(default_factory=PredictedTokens)


async def tokenize(
    request: CompletionRequest, engine: Engine, special: bool = True, client: str = "", rules: InfillRules = NO_RULES
) -> Tokenized:
    """Tokenize all texts of a request. `special`: text that spells a special token becomes that token.

    In suffixes and files such text stays text, because they may be about tokenizers. It would break the layout.

    Raises `RequestError` if a text is too long or the model cannot fill gaps, `ModelReplaced` if the engine's model
    changed meanwhile.
    """
    model_info = engine.model_info
    trims = (rules.trim and rules.apply_to(request)) or request.truncate_prompt_tokens is not None
    if not trims:
        check_lengths(request, model_info)
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    suffix, files = _infill_texts(request, model_info, rules)
    prediction = predicted_text(request, model_info)
    breakers = await _breakers(request, model_info)
    mark = before_suffix(model_info)
    wanted = [
        *(("prompt", text, special) for text in texts),
        ("suffix", suffix, False),
        *(("input_extra", text, False) for text in files),
        *(("dry_sequence_breakers", mark + rest, False) for rest in breakers.rests),
        ("prediction", prediction, special),
    ]
    found = await _tokenize_all([each for each in wanted if each[1]], engine, client)
    check_model(model_info.fingerprint, engine)
    predicted = predicted_tokens(found.pop(), model_info) if prediction else ()
    ready = iter([_checked(ids, request, model_info, trims) for ids in found])
    prompts = [prompt if isinstance(prompt, tuple) else next(ready) if prompt else () for prompt in request.prompt]
    others = [suffix_tokens(next(ready), model_info) if text else () for text in (suffix, *files)]
    rests = {rest: suffix_tokens(next(ready), model_info) for rest in breakers.rests}
    first = await asyncio.to_thread(first_tokens, request, model_info, prompts) if request.token_healing else {}
    return Tokenized(
        tuple(prompts),
        others[0],
        tuple(others[1:]),
        predicted,
        rules,
        inside=breakers.inside,
        sequences=breakers.sequences(rests, MAX_TAIL),
        first=first,
    )


async def _tokenize_all(texts: Sequence[tuple[str, str, bool]], engine: Engine, client: str) -> list[tuple[int, ...]]:
    """The tokens of each text, which are given as for `_tokenize_field`.

    If one fails, or the client disconnects, the others are cancelled.
    """
    if len(texts) == 1:  # nearly always
        return [await _tokenize_field(*texts[0], engine, client)]
    work = [asyncio.ensure_future(_tokenize_field(*each, engine, client)) for each in texts]
    try:
        return await asyncio.gather(*work)
    finally:
        for each in work:
            each.cancel()


async def _tokenize_field(name: str, text: str, special: bool, engine: Engine, client: str) -> tuple[int, ...]:
    """The tokens of a text of the field `name`. Raises `RequestError` that names it."""
    try:
        ids = await engine.tokenize(text, special, client)
        return tuple(ids)  # here, when the text is ready: those of thousands at once would delay other requests
    except RequestError as error:
        if error.param == "prompt" != name:  # the tokenizer knows no other field
            raise RequestError(f"Invalid '{name}': {error.message}", param=name) from error
        raise


async def _breakers(request: CompletionRequest, model_info: ModelInfo) -> Breakers:
    """The breakers of DRY. Raises `RequestError`."""
    if not uses_dry(request):
        return Breakers()
    found = await asyncio.to_thread(find_breakers, model_info.pieces, request.dry_sequence_breakers)
    found.check(len(request.prompt))
    return found


def _infill_texts(request: CompletionRequest, model_info: ModelInfo, rules: InfillRules) -> tuple[str, list[str]]:
    """The suffix and the files of an infill prompt, as they are tokenized. Empty for other prompts."""
    if not rules.apply_to(request):
        return "", []
    layout, mark = layout_of(request, model_info, rules), before_suffix(model_info)
    suffix = mark + request.suffix if request.suffix else ""
    return suffix, [mark + file_text(file, layout) for file in request.input_extra]


def _checked(ids: tuple[int, ...], request: CompletionRequest, model_info: ModelInfo, trims: bool) -> tuple[int, ...]:
    """The tokens of a text. Raises `RequestError` if this text alone is longer than the context, unless it `trims`."""
    if len(ids) > model_info.context and not trims:
        raise too_long(model_info, len(ids), request.max_tokens)
    return ids


async def run(
    plan: Plan,
    engine: Engine,
    record_usage: Callable[[Usage], None] = lambda _: None,
    on_prompt_started: Callable[[], None] = lambda: None,
    reader: Reader | None = None,
) -> AsyncGenerator[Delta | Usage]:
    """Run a plan. Yields deltas when they are ready, then one `Usage`. Closing the iterator closes the jobs.

    `record_usage` is called once at the end, also after an error or a close. Its `Usage` counts every generated token,
    also those that a stop string or an end token keeps out of the text. `on_prompt_started` is called once for each
    prompt, at its first step. The engine stops computing a choice of which the `reader` needs no more; a few more
    deltas may follow, and none that ends it. Without a `reader` nothing waits for a client.

    Raises `Overloaded` or `ModelReplaced` before the first delta, `EngineError` or `ReaderTooSlow` at any time,
    `RequestError` if too many rows are held back.
    """
    reader = reader or Reader()
    prediction = plan.prompts[0].job.prediction  # all prompts have the same
    shared = Shared(PredictedText(prediction) if prediction else None)
    progress = [
        _PromptProgress(plan, index, prompt, on_prompt_started, shared) for index, prompt in enumerate(plan.prompts)
    ]
    handles: list[JobHandle] = []
    try:
        for count, prompt in enumerate(plan.prompts):
            if count and count % _STARTS_PER_TURN == 0:
                await asyncio.sleep(0)
            check_model(plan.fingerprint, engine)  # the model can be replaced while other tasks run
            handles.append(engine.start(prompt.job))
        with closing(StepQueue(handles, [prompt.count for prompt in progress], reader)) as steps:
            while item := await steps.next():
                index, step = item
                for delta in progress[index].take(step, handles[index]):
                    yield delta
                    if reader.needs_no_more(delta.index):
                        handles[index].drop(delta.index - index * plan.n)
                if plan.best_of > plan.n:
                    await asyncio.sleep(0)  # no delta is yielded before all candidates are complete
    finally:
        for each in handles:
            each.close()
        read = sum(prompt.prompt_tokens for prompt in progress)
        cached = sum(prompt.cached_tokens for prompt in progress)
        predicted = sum((prompt.predicted for prompt in progress), PredictedTokens())
        record_usage(Usage(read, sum(prompt.generated for prompt in progress), cached, predicted))
    yield Usage(read, sum(prompt.completion_tokens for prompt in progress), cached, predicted)


def check_model(fingerprint: str, engine: Engine) -> None:
    """Raise `ModelReplaced` if the engine has another model than the one with this fingerprint."""
    if engine.model_info.fingerprint != fingerprint:
        raise ModelReplaced()


class _PromptProgress:
    """The choices of one prompt while they are generated. They are made at the first sampled token or ended sample.

    Before that, all scores of the prompt have arrived.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        prompt: PromptPlan,
        on_started: Callable[[], None],
        shared: Shared,
    ) -> None:
        self._plan = plan
        self._shared = shared
        self._prompt = prompt
        self._on_started = on_started
        self._first = index * plan.n
        self._scored: list[Token] = []
        self._choices: list[ChoiceBuilder] = []
        self._candidates: list[DeltaFolder] = []  # held back until all are complete
        self._rows: PromptRows | None = None
        self._cached = 0
        self._started = False
        self.generated = 0  # tokens, in a text or not

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompt that the client sent; 0 before the first step."""
        return self._prompt.billed_tokens if self._started else 0

    @property
    def cached_tokens(self) -> int:
        """How many of the tokens that the client sent came from the prefix cache."""
        return self._prompt.billed_within(self._cached)

    @property
    def completion_tokens(self) -> int:
        """The generated tokens that the texts of all candidates were made from."""
        return sum(choice.completion_tokens for choice in self._choices)

    @property
    def predicted(self) -> PredictedTokens:
        """The tokens of the prediction in the texts of all candidates, and the rejected ones."""
        return sum((choice.predicted for choice in self._choices), PredictedTokens())

    def count(self, step: Step) -> None:
        """Count a computed step for the account, also if `take` is never called with it."""
        if not self._started:
            self._started = True
            self._on_started()
        self.generated += len(step.sampled) + step.taken_back

    def take(self, step: Step, handle: JobHandle) -> Iterator[Delta]:
        """The deltas of a step, each made on demand. Samples whose text is complete are dropped from the job.

        A verified draft is several tokens of one sample in one step. They are taken one by one, as if computed so, and
        those after the end of the text count for nothing. The tokens of a whole response become one delta: nothing but
        the engine ends its texts.
        """
        if len(step.sampled) <= 1 or self._prompt.job.whole:
            return self._take(step, handle)
        return self._take_parts(step, handle)

    def _take_parts(self, step: Step, handle: JobHandle) -> Iterator[Delta]:
        for index, part in enumerate(split_by_sample(step)):
            if index:
                self.generated -= sum(self._choices[sample].finish is not None for sample, _ in part.sampled)
            yield from self._take(part, handle)

    def _take(self, step: Step, handle: JobHandle) -> Iterator[Delta]:
        self._cached += step.cached
        if not self._choices and self._plan.prompt_by_row:
            yield from self._rows_of_prompt(step)
        else:
            self._scored.extend(step.scored)
        if not self._choices and (step.sampled or step.ended):
            known = None if self._plan.prompt_by_row else self._scored
            echo = make_echo(self._plan, self._prompt, known)
            report = None if known is None else make_report(self._plan, self._prompt, known)
            self._choices = [
                ChoiceBuilder(self._plan, self._prompt, echo, report, self._shared) for _ in range(self._plan.best_of)
            ]
            self._candidates = [DeltaFolder() for _ in self._choices]
            self._scored.clear()
        unfinished = [sample for sample, choice in enumerate(self._choices) if choice.finish is None]
        for sample, token in step.sampled:
            if self._choices[sample].finish is None:
                self._choices[sample].add(token)
        for sample, reason in step.ended:
            self._choices[sample].end(reason)
        for sample in unfinished:
            if self._choices[sample].finish:
                handle.drop(sample)
        ranked = self._plan.best_of > self._plan.n
        for sample in unfinished:
            deltas = self._choices[sample].deltas(self._first + sample)
            if ranked:
                self._candidates[sample].add(deltas)
            else:
                yield from deltas
        if ranked and unfinished and all(choice.finish for choice in self._choices):
            yield from self._best_candidates()

    def _rows_of_prompt(self, step: Step) -> Iterator[Delta]:
        if self._rows is None:
            self._rows = PromptRows(self._plan, self._prompt, make_echo(self._plan, self._prompt, None))
        columns = empty_columns(self._plan)
        for echo, report in self._rows.take(step.scored, bool(step.sampled or step.ended)):
            for sample in range(self._plan.n):
                yield Delta(self._first + sample, "", columns, None, prompt=report, echo=echo)

    def _best_candidates(self) -> Iterator[Delta]:
        """The `n` candidates with the highest mean log probability, best first, each as one delta."""
        ranked = sorted(range(len(self._choices)), key=lambda sample: -self._choices[sample].mean_logprob)
        for rank, sample in enumerate(ranked[: self._plan.n]):
            yield structs.replace(self._candidates[sample].result, index=self._first + rank)


def split_by_sample(step: Step) -> list[Step]:
    """Split a step into steps with at most one token of each sample. A sample ends in that of its last token."""
    found: Counter[int] = Counter()
    parts: list[list[tuple[int, Token]]] = [[]]
    for sample, token in step.sampled:
        if found[sample] == len(parts):
            parts.append([])
        parts[found[sample]].append((sample, token))
        found[sample] += 1
    if len(parts) == 1:
        return [step]
    ended = [tuple(end for end in step.ended if max(found[end[0]], 1) == count + 1) for count in range(len(parts))]
    first = Step(step.scored, tuple(parts[0]), ended[0], step.cached)
    return [first, *(Step((), tuple(part), ends) for part, ends in zip(parts[1:], ended[1:], strict=True))]

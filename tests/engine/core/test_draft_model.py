"""Tests of a draft model in `EngineLoop`: it changes no token and no float, and what fails in it stops no request."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from history_runner import VOCABULARY, HistoryRunner, alone
from test_verification import Result, Samples, make_job, recorded, without

from afterword.engine.core.draft_model import READ_PER_TOKEN, DraftModel
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits
from afterword.engine.core.pass_costs import PassCosts
from afterword.engine.core.sequence import JobState, Sequence
from afterword.engine.core.slot import PrefixQuery, Slot
from afterword.engine.core.verification import VerificationTurns, WantedDraft
from afterword.engine.draft import MODEL_LENGTHS, Draft, ModelDraft, PredictedText, Prediction, prediction_draft
from afterword.engine.protocol import Job, Sampling
from afterword.errors import EngineError

GREEDY = Sampling(temperature=0.0)


class Wrong(HistoryRunner):
    """A draft model whose most likely token is never the other model's."""

    def run(self, batch: ForwardBatch) -> Logits:
        return -super().run(batch)


class NotFinite(HistoryRunner):
    """A draft model whose logits are not finite where it drafts for slot 0."""

    def run(self, batch: ForwardBatch) -> Logits:
        logits = super().run(batch)
        slots = [entry.slot for entry in batch.entries for _ in range(entry.outputs)]
        logits[[slot == 0 for slot in slots]] = np.nan
        return logits


class Failing(HistoryRunner):
    """A draft model whose library fails in pass number 9."""

    def run(self, batch: ForwardBatch) -> Logits:
        if len(self.batches) == 9:
            raise EngineError("the library has failed")
        return super().run(batch)


def make_loop(
    runner: HistoryRunner,
    draft: HistoryRunner,
    *,
    ngrams: bool = False,
    context: int = 300,
    vocabulary: int = VOCABULARY,
) -> tuple[EngineLoop, list[str]]:
    """A loop with a draft model, and the lines that it reports. The clock stands still, so every draft pays."""
    loop, lines = EngineLoop(runner, clock=lambda: 0.0), []
    if ngrams:
        loop.draft_ngrams()
    loop.use_draft_model(DraftModel(draft, context, vocabulary, lambda: 0.0), lines.append)
    return loop, lines


def job(prompt: tuple[int, ...] = (1, 2, 3), most: int = 60, sampling: Sampling = GREEDY, key: int = 7) -> Job:
    return Job(prompt, 1, most, sampling, (), bytes([key] * 16))


@pytest.mark.parametrize("kind", [HistoryRunner, Wrong, NotFinite])
@pytest.mark.parametrize("slots", [2, 16])
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_gets_the_same_tokens_and_floats(seed: int, slots: int, kind: type[HistoryRunner]) -> None:
    rng = random.Random(seed)
    jobs = [make_job(rng, number) for number in range(8)]
    plain = Result(EngineLoop(HistoryRunner(slots, 64), clock=lambda: 0.0), without(jobs))
    for given, ngrams in ((without(jobs), False), (without(jobs), True), (jobs, True)):
        loop, lines = make_loop(HistoryRunner(slots, 64), kind(slots, 64), ngrams=ngrams)
        found = Result(loop, given)
        assert (found.samples, found.ended, lines) == (plain.samples, plain.ended, [])
        assert found.drafted >= found.accepted
        assert found.accepted > 0 or kind is not HistoryRunner


def test_an_equal_model_saves_most_passes() -> None:
    loop, _ = make_loop(HistoryRunner(2, 64), HistoryRunner(2, 64))
    result = Result(loop, [job(most=200)])
    assert [token.id for token in result.samples[0, 0]] == alone(job(most=200), 0)
    assert result.drafted == result.accepted
    assert result.passes < 30


def test_sequences_are_drafted_for_in_one_pass_and_verified_in_turns() -> None:
    draft = HistoryRunner(4, 64)
    loop, _ = make_loop(HistoryRunner(4, 64), draft)
    jobs = [job((number, 2, 3), 240, key=number) for number in range(1, 5)]
    result = Result(loop, jobs)
    assert result.drafted == result.accepted
    sizes = [len(batch.entries) for batch in draft.batches if batch.entries]
    assert sizes.count(4) > len(sizes) // 2


def test_a_model_that_is_never_right_is_dropped() -> None:
    loop, _ = make_loop(HistoryRunner(2, 64), Wrong(2, 64))
    result = Result(loop, [job(most=150)])
    assert (result.drafted, result.accepted) == (4 * MODEL_LENGTHS[0], 0)


def test_a_long_prompt_is_read_only_for_a_long_completion() -> None:
    prompt = tuple(1 + number % 20 for number in range(100))
    for most, reads in ((10, False), (40, True)):
        draft = HistoryRunner(2, 64)
        loop, _ = make_loop(HistoryRunner(2, 64), draft)
        Result(loop, [job(prompt, most)])
        assert any(batch.entries for batch in draft.batches) == reads
        assert READ_PER_TOKEN * 10 < len(prompt) < READ_PER_TOKEN * 40


def test_a_prompt_that_another_sample_had_is_not_read_again() -> None:
    prompt = tuple(1 + number % 20 for number in range(60))
    draft = HistoryRunner(4, 64)
    loop, _ = make_loop(HistoryRunner(4, 64), draft)
    Result(loop, [job(prompt, 40)])
    read = draft.computed
    Result(loop, [msgspec.structs.replace(job(prompt, 40, Sampling()), samples=3)])
    assert draft.computed - read < 3 * (40 + 2 * 16) + 16


def test_a_prediction_goes_before_the_model() -> None:
    predicting = msgspec.structs.replace(job(most=150), prediction=tuple(alone(job(most=150), 0)))
    draft = HistoryRunner(2, 64)
    loop, _ = make_loop(HistoryRunner(2, 64), draft)
    result = Result(loop, [predicting])
    assert result.drafted == result.accepted
    assert result.passes < 12
    assert draft.computed < 20, "the model drafts only before the prediction is followed"


def test_a_failing_draft_model_stops_no_request() -> None:
    draft = Failing(2, 64)
    loop, lines = make_loop(HistoryRunner(2, 64), draft)
    result = Result(loop, [job(most=150)])
    assert [token.id for token in result.samples[0, 0]] == alone(job(most=150), 0)
    assert 0 < result.accepted < 100
    assert lines == ["The draft model has failed and drafts no more; all requests go on. the library has failed"]
    again = Result(loop, [job(most=20)])
    assert again.drafted == 0


def test_tokens_that_the_model_does_not_have_end_its_drafts() -> None:
    """The draft model of this test could compute them, so it is checked that it gets none."""
    draft = HistoryRunner(2, 64)
    loop, _ = make_loop(HistoryRunner(2, 64), draft, vocabulary=VOCABULARY - 2)
    for key in range(6):
        drawn = job(sampling=Sampling(temperature=2.0), key=key)
        result = Result(loop, [drawn])
        assert [token.id for token in result.samples[0, 0]] == alone(drawn, 0)
    given = [token for batch in draft.batches for entry in batch.entries for token in entry.tokens]
    assert given
    assert max(given) < VOCABULARY - 2


def test_a_model_with_a_shorter_context_drafts_up_to_it() -> None:
    draft = HistoryRunner(2, 64)
    loop, _ = make_loop(HistoryRunner(2, 64), draft, context=50)
    result = Result(loop, [job(most=150)])
    assert [token.id for token in result.samples[0, 0]] == alone(job(most=150), 0)
    assert 20 < result.accepted < 50
    assert max(len(entry.tokens) + entry.position for batch in draft.batches for entry in batch.entries) <= 50


def test_the_model_holds_no_more_tokens_than_the_slots() -> None:
    capacity = 150
    draft = HistoryRunner(8, 64, capacity=capacity)
    loop, _ = make_loop(HistoryRunner(8, 64, capacity=capacity), draft)
    for number in range(12):
        rng = random.Random(number)
        Result(loop, without([make_job(rng, index) for index in range(4)]))
    assert draft.computed
    loop._slots._most_tokens = 20
    loop._slots.limit(0)
    loop.give_back_memory()
    assert sum(map(len, draft.state)) <= 20


def test_recurrent_models_and_those_whose_numbers_depend_on_passes_have_no_drafts() -> None:
    for runner in (HistoryRunner(2, 64, grid=3), HistoryRunner(2, 64, can_truncate=False)):
        draft = HistoryRunner(2, 64)
        loop, _ = make_loop(runner, draft)
        assert (Result(loop, [job()]).drafted, draft.computed) == (0, 0)


def test_samples_can_be_dropped_and_jobs_closed_paused_and_resumed() -> None:
    rng = random.Random(1)
    jobs = [msgspec.structs.replace(make_job(rng, number), max_tokens=100, prediction=()) for number in range(6)]
    loop, _ = make_loop(HistoryRunner(4, 64), HistoryRunner(4, 64))
    found: Samples = {}
    for number, each in enumerate(jobs):
        loop.start(number, each)
    for turn in range(400):
        for number, step in (loop.step() or {}).items():
            for sample, token in step.sampled:
                found.setdefault((number, sample), []).append(token)
        if turn % 7 == 3:
            loop.drop(rng.randrange(6), rng.randrange(3))
        if turn % 5 == 2:
            rng.choice([loop.pause, loop.resume])(rng.randrange(6))
        if turn == 60:
            loop.close(2)
    for number in range(6):
        loop.resume(number)
    while loop.step() is not None:
        pass
    loop.check()
    for (number, sample), tokens in found.items():
        assert [token.id for token in tokens] == alone(jobs[number], sample)[: len(tokens)]


# ---- which drafts are computed


class Source:
    """A draft model for `VerificationTurns`. `able`: whether it can draft. `follows`: whether it has read enough."""

    def __init__(
        self,
        seconds: float = 0.1,
        *,
        able: Callable[[WantedDraft], bool] = lambda _: True,
        follows: Callable[[WantedDraft], bool] = lambda _: True,
    ) -> None:
        self.costs = PassCosts()
        self.costs.record(1, seconds)
        self.costs.record(2, 2 * seconds)
        self.can_draft, self.follows = able, follows


def drafting(*, slot: int = 0, accepted: tuple[int, ...] = (), others: tuple[Draft, ...] = ()) -> Sequence:
    """A sequence with one generated token and drafts of a model, of which so many tokens each were accepted."""
    given = Job((1,), 1, 500, Sampling(), (), b"k" * 16)
    draft = ModelDraft(500)
    for count in accepted:
        draft.propose((1,) * draft.wanted)
        for token in (1,) * count + (0,) * (draft.rest != (1,) * count):
            draft.append(token)
    query = PrefixQuery(b"", "", np.array(given.prompt, np.int32), 0, None)
    sequence = Sequence(JobState(0, given, query), 0, [5], drafts=(*others, draft))
    holder = Slot(slot, 1)
    holder.append((1,), 1)
    sequence.assign_slot(holder, chunk_generated=True)
    return sequence


def confirm(sequence: Sequence) -> None:
    """Record the verification of a draft of three tokens that are accepted."""
    assert sequence.slot is not None
    sequence.slot.append((*sequence.slice(sequence.computed, sequence.length), 1, 1, 1), 1)
    for token in (1, 1, 1, 6):
        sequence.append(token)


def counts(turns: VerificationTurns, sequences: list[Sequence], source: Source) -> list[int]:
    return [each.count for each in turns.wanted_drafts(sequences, source)]


def test_lengths_follow_acceptance() -> None:
    def wanted(*accepted: int) -> int:
        draft = drafting(accepted=accepted).drafts[0]
        assert isinstance(draft, ModelDraft)
        return draft.wanted

    assert [wanted(), wanted(3), wanted(3, 7), wanted(3, 7, 15)] == [3, 7, 15, 15]
    assert [wanted(3, 7, 8), wanted(3, 7, 2), wanted(0, 0, 0), wanted(0, 0, 0, 0)] == [7, 3, 3, 0]


def test_a_model_drafts_only_where_drafting_and_verifying_is_faster_than_decoding() -> None:
    turns, one = VerificationTurns(64), drafting()
    assert counts(turns, [one], Source()) == [], "no decode was measured"
    recorded(turns, 1, 1.0)
    assert counts(turns, [one], Source()) == [3], "no verification was measured"
    recorded(turns, 4, 4.0)
    assert counts(turns, [one], Source()) == [], "4 tokens one by one take 4 seconds"
    recorded(turns, 4, 2.0)
    assert counts(turns, [one], Source()) == [3]
    assert counts(turns, [one], Source(0.5)) == [], "a draft takes 1.5 seconds"
    assert counts(turns, [drafting(accepted=(0,))], Source()) == [], "fewer tokens will be accepted"


def test_while_the_cost_is_unknown_one_sequence_drafts() -> None:
    turns, sequences = VerificationTurns(64), [drafting(slot=slot) for slot in range(3)]
    recorded(turns, 1, 3.0, sequences=3)
    assert counts(turns, sequences, Source(0.0)) == [3]
    recorded(turns, 4, 2.0)
    assert counts(turns, sequences, Source(0.0)) == [3, 3, 3]


def test_all_drafts_of_a_round_are_verified_before_the_next() -> None:
    turns, sequences = VerificationTurns(64), [drafting(slot=slot) for slot in range(3)]
    recorded(turns, 1, 3.0, sequences=3)
    recorded(turns, 4, 0.5)
    recorded(turns, 8, 0.5)
    for each in turns.wanted_drafts(sequences, Source(0.0)):
        each.draft.propose((1,) * each.count)
    verified: list[BatchEntry | None] = []
    for _ in range(3):
        assert turns.wanted_drafts(sequences, Source(0.0)) == []
        verified.append(turns.next_entry(sequences))
        sequence = sequences[len(verified) - 1]
        confirm(sequence)
    assert [entry and entry.slot for entry in verified] == [0, 1, 2]
    assert counts(turns, sequences, Source(0.0)) == [7, 7, 7]


def test_no_draft_is_computed_before_a_decode_that_would_use_it_up() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 1, 2.0, sequences=2)
    recorded(turns, 4, 0.5)
    recorded(turns, 8, 0.5)
    sequences = [drafting(), drafting(slot=1, accepted=(0, 0, 0, 0))]
    (wanted,) = turns.wanted_drafts(sequences, Source(0.0))
    wanted.draft.propose((1, 1, 1))
    assert turns.next_entry(sequences) is not None
    confirm(sequences[0])
    assert counts(turns, sequences, Source(0.0)) == []
    assert counts(turns, sequences, Source(0.0, follows=lambda _: False)) == [7], "it reads meanwhile"
    assert turns.next_entry(sequences) is None
    assert counts(turns, sequences, Source(0.0)) == [7]


def test_a_sequence_that_follows_its_prediction_wants_no_other_draft() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 1, 1.0)
    prediction = prediction_draft(Prediction(PredictedText((7, 8, 9, *range(10, 60)))), 500)
    for token in (7, 8, 9):
        prediction.append(token)
    assert counts(turns, [drafting(others=(prediction,))], Source()) == []
    assert counts(turns, [drafting()], Source(able=lambda _: False)) == []

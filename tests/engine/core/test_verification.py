"""Tests of drafts in `EngineLoop`: they change no token and no float, and save passes.

The clock stands still. So every pass costs the same, and every draft is worth its pass.
"""

from __future__ import annotations

import random
from collections import defaultdict

import msgspec
import numpy as np
import pytest
from history_runner import HistoryRunner, alone

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits
from afterword.engine.core.pass_costs import PassCosts
from afterword.engine.core.sequence import JobState, Sequence
from afterword.engine.core.slot import PrefixQuery, Slot
from afterword.engine.core.verification import DraftMaker, VerificationTurns
from afterword.engine.draft import PredictedText, Prediction, prediction_draft
from afterword.engine.protocol import Dry, Job, SamplerChain, Sampling, Token

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(top_k=5, repetition_penalty=1.2),
    Sampling(temperature=0.0, logit_bias=((3, 2.0), (4, -100.0))),
    Sampling(0.8, chain=SamplerChain(("dry", "temperature"), dry=Dry(1.5, 1.5, 1, 40, bytes([2]), (((5,), (6,)),)))),
    Sampling(chain=SamplerChain(("temperature",), mirostat=1, mirostat_tau=2.0)),
    Sampling(chain=SamplerChain(("temperature",), adaptive_target=0.2, adaptive_decay=0.6)),
    Sampling(presence_penalty=1.0, repetition_penalty=1.5, chain=SamplerChain(("penalties",), last_n=5)),
    Sampling(frequency_penalty=1.0, chain=SamplerChain(("penalties",), last_n=-1, min_keep=2)),
    Sampling(
        repetition_penalty=1.1,
        chain=SamplerChain(("penalties", "dry"), dry=Dry(0.8, 1.75, 2, -1), mirostat=2, mirostat_tau=3.0),
    ),
    Sampling(chain=SamplerChain(("typ_p", "xtc"), typical_p=0.95, xtc_probability=0.5, xtc_threshold=0.1)),
)
Samples = dict[tuple[int, int], list[Token]]


def make_job(rng: random.Random, number: int) -> Job:
    job = Job(
        tuple(rng.randrange(1, 24) for _ in range(rng.randrange(1, 9))),
        rng.choice([1, 1, 3]),
        rng.randrange(1, 120),
        rng.choice(SAMPLINGS),
        (0,) if rng.random() < 0.3 else (),
        number.to_bytes(16, "big"),
        alternatives=rng.choice([None, 0, 2]),
        min_tokens=rng.choice([0, 0, 20]),
        client=rng.choice(["", "other"]),
    )
    return msgspec.structs.replace(job, prediction=predict(alone(job, 0), rng))


def predict(tokens: list[int], rng: random.Random) -> tuple[int, ...]:
    """A right, wrong or partly right prediction of these tokens."""
    kind = rng.choice(["right", "wrong", "changed", "cut"])
    if kind == "wrong":
        return tuple(rng.randrange(24) for _ in tokens)
    if kind == "cut":
        return (*tokens[: len(tokens) // 3], *tokens[len(tokens) // 2 :])
    changed = [rng.randrange(24) if kind == "changed" and rng.random() < 0.05 else token for token in tokens]
    return tuple(changed)


def without(jobs: list[Job]) -> list[Job]:
    return [msgspec.structs.replace(job, prediction=()) for job in jobs]


class Result:
    """`passes`: their number. `drafted`, `accepted`: tokens of drafts that were verified."""

    def __init__(self, loop: EngineLoop, jobs: list[Job]) -> None:
        self.samples: Samples = defaultdict(list)
        self.ended: dict[tuple[int, int], str] = {}
        self.passes = self.drafted = self.accepted = 0
        for number, job in enumerate(jobs):
            loop.start(number, job)
        while (steps := loop.step()) is not None:
            stats = loop.pass_stats()
            self.passes += bool(stats.tokens)
            self.drafted += stats.drafted_tokens
            self.accepted += stats.accepted_tokens
            for number, step in steps.items():
                assert not step.failed
                for sample, token in step.sampled:
                    self.samples[number, sample].append(token)
                self.ended |= {(number, sample): reason for sample, reason in step.ended}
        loop.check()


def make_loop(runner: HistoryRunner, ngrams: bool = False) -> EngineLoop:
    loop = EngineLoop(runner, clock=lambda: 0.0)
    if ngrams:
        loop.draft_ngrams()
    return loop


@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("slots", [2, 16])
@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_with_predictions_gets_the_same_tokens_and_floats(seed: int, slots: int, ngrams: bool) -> None:
    rng = random.Random(seed)
    jobs = [make_job(rng, number) for number in range(8)]
    plain = Result(make_loop(HistoryRunner(slots, 64)), without(jobs))
    drafted = Result(make_loop(HistoryRunner(slots, 64), ngrams), jobs)
    assert drafted.samples == plain.samples
    assert drafted.ended == plain.ended
    assert drafted.accepted > 0


def repetitive_job(rng: random.Random, number: int) -> Job:
    """Its text consists of two tokens, of which one is rare."""
    sampling = Sampling(rng.choice([0.0, 0.5]), logit_bias=((3, 14.0), (5, 9.0)), presence_penalty=rng.choice([0, 0.5]))
    prompt = tuple(rng.randrange(1, 24) for _ in range(rng.randrange(1, 9)))
    key = number.to_bytes(16, "big")
    return Job(prompt, rng.choice([1, 3]), 120, sampling, (), key, alternatives=rng.choice([None, 2]))


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("seed", range(3))
def test_accepted_and_rejected_drafts_from_texts_change_no_token_and_no_float(seed: int, slots: int) -> None:
    rng = random.Random(seed)
    jobs = [repetitive_job(rng, number) for number in range(4)]
    plain = Result(make_loop(HistoryRunner(slots, 64)), jobs)
    drafted = Result(make_loop(HistoryRunner(slots, 64), ngrams=True), jobs)
    assert drafted.samples == plain.samples
    assert drafted.ended == plain.ended
    assert 0 < drafted.accepted < drafted.drafted
    assert drafted.passes < plain.passes or slots > 1


def test_a_right_prediction_saves_most_passes() -> None:
    job = Job((1, 2, 3), 1, 200, Sampling(), (), b"k" * 16)
    job = msgspec.structs.replace(job, prediction=tuple(alone(job, 0)))
    result = Result(make_loop(HistoryRunner(2, 64)), [job])
    assert [token.id for token in result.samples[0, 0]] == alone(job, 0)
    assert result.passes < 16
    assert result.drafted == result.accepted


def test_the_last_token_of_a_sample_is_never_drafted_too_far() -> None:
    """The slot must not hold more than the prompt and `max_tokens` tokens."""
    for most in range(1, 40):
        job = Job((1, 2, 3), 1, most, Sampling(), (), b"k" * 16)
        expected = alone(msgspec.structs.replace(job, max_tokens=90), 0)
        runner = HistoryRunner(1, 64, capacity=3 + most + 64)
        result = Result(make_loop(runner), [msgspec.structs.replace(job, prediction=tuple(expected))])
        assert [token.id for token in result.samples[0, 0]] == expected[:most]
        longest = max(entry.position + len(entry.tokens) for batch in runner.batches for entry in batch.entries)
        assert longest <= 3 + most


def loop_over(text: list[int], seconds: dict[int, float]) -> tuple[int, int]:
    """Verifications and rejected tokens of a text that is drafted from itself, with passes of a given duration."""
    turns = VerificationTurns(64)
    for tokens, each in seconds.items():
        recorded(turns, tokens, each)
    job = Job((1,), 1, len(text) + 1, Sampling(), (), b"k" * 16)
    state = JobState(0, job, PrefixQuery(b"", "", np.array(job.prompt, np.int32), 0, None))
    (drafts,) = ((draft,) for draft in DraftMaker(job, ngrams=True, model=False).drafts())
    sequence = Sequence(state, 0, drafts=drafts)
    slot = Slot(0, 1)
    slot.append((1,), 1)
    sequence.append(text[0])
    sequence.assign_slot(slot, chunk_generated=True)
    verifications = rejected = 0
    while len(sequence.generated) < len(text):
        drafted = entry.tokens[1:] if (entry := turns.next_entry([sequence])) else ()
        verifications += bool(drafted)
        coming = text[len(sequence.generated) : len(sequence.generated) + 1 + len(drafted)]
        agreed = 0
        while agreed < min(len(drafted), len(coming)) and drafted[agreed] == coming[agreed]:
            agreed += 1
        rejected += len(drafted) - agreed
        for token in coming[: agreed + 1]:
            slot.append((sequence.generated[-1],), 1)
            sequence.append(token)
    return verifications, rejected


COSTS = {1: 1.0, 9: 1.5, 17: 2.0, 33: 4.0, 64: 8.0}


@pytest.mark.parametrize("repeated", [3, 4, 6, 7, 9])
def test_a_text_whose_repetitions_mislead_is_never_verified(repeated: int) -> None:
    text = [token for line in range(40) for token in (*range(50, 50 + repeated), *range(1000 * line, 1000 * line + 12))]
    assert loop_over(text, COSTS) == (0, 0)


def test_a_text_that_repeats_itself_is_verified() -> None:
    text = [*range(50, 80)] * 12
    verifications, rejected = loop_over(text, COSTS)
    assert 6 <= verifications < 20
    assert rejected == 0


def test_completions_too_short_for_a_draft_look_for_no_repetitions() -> None:
    short, long = (Job((1, 2, 3), 1, most, Sampling(), (), b"k" * 16) for most in (15, 16))
    assert DraftMaker(short, ngrams=True, model=False).drafts() == ()
    assert len(DraftMaker(long, ngrams=True, model=False).drafts()) == 1


def test_rejected_tokens_do_not_stay_in_the_prefix_cache() -> None:
    job = Job((1, 2, 3), 1, 60, Sampling(temperature=0.0), (), b"k" * 16)
    tokens = alone(job, 0)
    wrong = (*tokens[:20], *((token + 1) % 24 for token in tokens[20:]))
    runner = HistoryRunner(1, 64)
    loop = make_loop(runner)
    result = Result(loop, [msgspec.structs.replace(job, prediction=wrong)])
    assert result.drafted > result.accepted
    loop.give_back_memory()
    assert runner.state[0] == [1, 2, 3, *tokens[:-1]]


def test_a_runner_whose_numbers_depend_on_passes_verifies_nothing() -> None:
    job = Job((1, 2, 3), 1, 60, Sampling(), (), b"k" * 16)
    job = msgspec.structs.replace(job, prediction=tuple(alone(job, 0)))
    for runner in (HistoryRunner(2, 64, grid=3), HistoryRunner(2, 64, can_truncate=False)):
        result = Result(make_loop(runner, ngrams=True), [job])
        assert (result.drafted, result.passes) == (0, 60)


class NotFinite(HistoryRunner):
    """A runner whose logits are not finite after the token 23."""

    def run(self, batch: ForwardBatch) -> Logits:
        logits = super().run(batch)
        tokens = [token for entry in batch.entries for token in entry.tokens[len(entry.tokens) - entry.outputs :]]
        logits[[token == 23 for token in tokens]] = np.nan
        return logits


def test_rows_of_rejected_tokens_may_be_not_finite() -> None:
    job = Job((1, 2, 3), 1, 40, Sampling(logit_bias=((23, -100.0),)), (), b"k" * 16)
    tokens = alone(job, 0)
    wrong = (*tokens[:6], *(23 for _ in tokens[6:]))
    result = Result(make_loop(NotFinite(2, 64)), [msgspec.structs.replace(job, prediction=wrong)])
    assert [token.id for token in result.samples[0, 0]] == tokens
    assert result.drafted > result.accepted


def test_samples_can_be_dropped_and_jobs_closed_while_drafts_are_verified() -> None:
    rng = random.Random(1)
    jobs = [msgspec.structs.replace(make_job(rng, number), max_tokens=100) for number in range(6)]
    jobs = [msgspec.structs.replace(job, prediction=tuple(alone(job, 0))) for job in jobs]
    loop = make_loop(HistoryRunner(4, 64), ngrams=True)
    found: Samples = defaultdict(list)
    for number, job in enumerate(jobs):
        loop.start(number, job)
    for turn in range(400):
        for number, step in (loop.step() or {}).items():
            for sample, token in step.sampled:
                found[number, sample].append(token)
        if turn % 7 == 3:
            loop.drop(rng.randrange(6), rng.randrange(3))
        if turn == 60:
            loop.close(2)
    while loop.step() is not None:
        pass
    loop.check()
    for (number, sample), tokens in found.items():
        assert [token.id for token in tokens] == alone(jobs[number], sample)[: len(tokens)]


# ---- which draft is verified


def running(tokens: int, agreed: int) -> Sequence:
    """A sequence that has followed a prediction for `agreed` tokens, with `tokens` of a prediction in all."""
    job = Job((1,), 1, 500, Sampling(), (), b"k" * 16, prediction=tuple(range(tokens)))
    state = JobState(0, job, PrefixQuery(b"", "", np.array(job.prompt, np.int32), 0, None))
    drafts = (prediction_draft(Prediction(PredictedText(job.prediction)), 500),)
    sequence = Sequence(state, 0, drafts=drafts)
    for token in range(agreed):
        sequence.append(token)
    slot = Slot(0, 1)
    slot.append((1, *range(agreed - 1)), 1)
    sequence.assign_slot(slot, chunk_generated=True)
    return sequence


def repeating() -> Sequence:
    """A sequence with an unproven draft from its own text."""
    job = Job(tuple(range(50)), 1, 500, Sampling(), (), b"k" * 16)
    state = JobState(0, job, PrefixQuery(b"", "", np.array(job.prompt, np.int32), 0, None))
    sequence = Sequence(state, 0, drafts=DraftMaker(job, ngrams=True, model=True).drafts())
    for token in range(10, 16):
        sequence.append(token)
    slot = Slot(0, 1)
    slot.append((*job.prompt, *range(10, 15)), 1)
    sequence.assign_slot(slot, chunk_generated=True)
    assert len(sequence.drafts[0].rest) == 8
    return sequence


class AnyModel:
    """A draft model that can draft for every sequence and costs nothing."""

    def __init__(self) -> None:
        self.costs = PassCosts()

    def can_draft(self, wanted: object) -> bool:
        return True

    def follows(self, wanted: object) -> bool:
        return True


def test_a_draft_that_is_not_proven_keeps_no_sequence_from_the_draft_model() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 1, 1.0)
    recorded(turns, 4, 1.0)
    sequence = repeating()
    assert turns.next_entry([sequence]) is None
    (wanted,) = turns.wanted_drafts([sequence], AnyModel())
    assert wanted.sequence is sequence


def test_a_draft_that_is_not_proven_does_not_lower_measured_costs() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 1, 1.0)
    recorded(turns, 9, 20.0)
    sequence = repeating()
    for _ in range(3_000):
        assert turns.next_entry([sequence]) is None
    assert turns.next_entry([running(tokens=300, agreed=3)]) is None, "9 tokens still seem to take 20 seconds"


def recorded(turns: VerificationTurns, tokens: int, seconds: float, sequences: int = 1) -> None:
    """Record a pass of `sequences` entries with `tokens` tokens each."""
    entries = tuple(BatchEntry(slot, 0, (0,) * tokens, tokens) for slot in range(sequences))
    turns.record_pass(ForwardBatch((), entries), seconds)


def test_a_draft_is_verified_only_where_that_is_faster_than_decoding() -> None:
    turns = VerificationTurns(64)
    one = running(tokens=300, agreed=3)
    assert turns.next_entry([one]) is None, "no decode was measured"
    recorded(turns, 1, 1.0)
    assert turns.next_entry([one]) is not None, "no verification was measured"
    recorded(turns, 9, 20.0)
    assert turns.next_entry([one]) is None, "9 tokens one by one take 9 seconds"
    recorded(turns, 9, 3.0)
    entry = turns.next_entry([one])
    assert entry is not None
    assert (entry.tokens, entry.outputs) == (tuple(range(2, 11)), 9)


def test_a_crowd_decodes_where_a_pass_of_many_tokens_costs_as_much_for_each() -> None:
    turns = VerificationTurns(64)
    crowd = [running(tokens=300, agreed=130) for _ in range(16)]
    recorded(turns, 1, 2.0, sequences=16)
    recorded(turns, 60, 8.0)
    assert turns.next_entry(crowd) is None
    recorded(turns, 60, 4.0)
    assert turns.next_entry(crowd) is not None


def test_sequences_without_drafts_decode_between_verifications() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 1, 1.0)
    recorded(turns, 2, 1.0)
    sequences = [running(tokens=300, agreed=130), running(tokens=2, agreed=130)]
    found = [turns.next_entry(sequences) is not None for _ in range(40)]
    assert found[0]
    assert 2 <= sum(found) <= 5


def test_sequences_with_drafts_take_turns() -> None:
    turns = VerificationTurns(64)
    recorded(turns, 2, 1.0)
    sequences = [running(tokens=300, agreed=130) for _ in range(3)]
    for slot, sequence in enumerate(sequences):
        assert sequence.slot is not None
        sequence.slot.index = slot
    found = [turns.next_entry(sequences) for _ in range(6)]
    assert [entry and entry.slot for entry in found] == [0, 1, 2, 0, 1, 2]


def test_costs_fall_at_once_and_rise_slowly() -> None:
    costs = PassCosts()
    assert costs.of(5) is None
    costs.record(4, 4.0)
    costs.record(7, 700.0)
    assert costs.of(5) == pytest.approx(1.1)
    costs.record(6, 3.0)
    assert costs.of(5) == 0.5
    for _ in range(10_000):
        costs.fade(5)
    assert (costs.of(5) or 1) < 0.01, "the cost is measured again after a while"
    costs.record(6, 3.0)
    assert costs.of(5) == 0.5

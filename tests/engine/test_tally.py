"""What an engine's numbers count, step by step, on a clock that only the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from afterword.engine.protocol import Job, Meter, Sampling, Step, Token
from afterword.engine.tally import Course, Tally
from afterword.histogram import Histogram

TOKEN = Token(1)


@dataclass
class Told:
    """One job that is accepted at 100 s."""

    samples: int = 1
    tally: Tally = field(default_factory=Tally)
    now: float = 100.0

    def __post_init__(self) -> None:
        job = Job((1, 2, 3), self.samples, 10, Sampling(), (), bytes(16))
        self.course = Course(self.tally, job, self.now, lambda: self.now)

    def at(self, now: float, *samples: int, cached: int = 0) -> Told:
        """A step brings a token of each of these samples."""
        self.now = now
        self.course.took(Step(sampled=tuple((sample, TOKEN) for sample in samples), cached=cached))
        return self


def test_a_number_is_in_the_first_bucket_that_it_does_not_exceed():
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 2.0, 2.5, 100.0):
        histogram.add(number)
    assert histogram.counts == [2, 2, 2]
    assert histogram.sum == 107.5


def test_a_job_goes_from_the_queue_to_its_last_token():
    told = Told().at(103).at(105, 0).at(105.5, 0).at(107, 0)
    told.course.ended()
    tally = told.tally
    assert (tally.queued.sum, tally.prefill.sum, tally.decode.sum, tally.gaps.sum) == (3, 2, 2, 2)
    assert [sum(each.counts) for each in (tally.queued, tally.prefill, tally.decode, tally.gaps)] == [1, 1, 1, 2]
    assert (tally.prompt_tokens, tally.cached_tokens, tally.generated_tokens) == (3, 0, 3)


def test_samples_have_gaps_of_their_own():
    told = Told(samples=2).at(101, cached=2).at(102, 0, 1).at(103, 0).at(109, 0, 1)
    assert told.tally.gaps.sum == (103 - 102) + (109 - 103) + (109 - 102)
    assert told.tally.generated_tokens == 5
    assert told.tally.cached_tokens == 2


def test_what_generates_nothing_has_no_decode_time():
    told = Told().at(104)
    told.now = 106
    told.course.ended()
    assert told.tally.prefill.sum == 2
    assert sum(told.tally.decode.counts) == 0


def test_who_leaves_before_anything_began_was_never_there():
    tally = Told().tally
    assert sum(tally.queued.counts) == tally.prompt_tokens == 0


def test_passes_are_counted_by_kind_and_news_without_a_pass_is_none():
    tally = Tally()
    for meter in (Meter(held=5), Meter(True, 64, 0.25), Meter(False, 3, 0.5), Meter(False, 4, 0.5)):
        tally.passed(meter)
    assert (tally.prompts.tokens.sum, tally.prompts.seconds.sum) == (64, 0.25)
    assert (tally.generation.tokens.sum, tally.generation.seconds.sum) == (7, 1.0)
    assert sum(tally.generation.tokens.counts) == 2

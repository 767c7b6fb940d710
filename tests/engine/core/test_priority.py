"""Tests of `Job.priority`: the order of one client's own waiting jobs, and of nothing else."""

from __future__ import annotations

from random import Random

from history_runner import HistoryRunner

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.sequence import JobState
from afterword.engine.core.waiting_jobs import WaitingJobs
from afterword.engine.protocol import Job, Sampling


def job(number: int, priority: int = 0, client: str = "ann", prompt: tuple[int, ...] = ()) -> Job:
    return Job((*prompt, number, 1), 1, 3, Sampling(), (), b"k" * 16, client=client, priority=priority)


def order(loop: EngineLoop, *wanted: Job) -> list[int]:
    """The numbers of the jobs in the order in which they end."""
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
    ended = []
    while (passed := loop.step()) is not None:
        ended += [job_id for job_id, step in passed.items() if step.ended]
    loop.check()
    return ended


def test_the_lowest_priority_number_of_a_client_is_first() -> None:
    wanted = [job(number, priority) for number, priority in enumerate((0, 5, -1, 0, 5, -7, 0))]
    assert order(EngineLoop(HistoryRunner(1, 4)), *wanted) == [5, 2, 0, 3, 6, 1, 4]


def test_a_cached_prefix_counts_only_among_equal_priorities() -> None:
    """A job with a cached prefix overtakes others of the same number only."""
    prefix = tuple(range(8))
    for priority, expected in ((0, [1, 0]), (-1, [0, 1])):
        loop = EngineLoop(HistoryRunner(1, 4))
        order(loop, job(9, prompt=prefix))
        assert order(loop, job(1, priority), job(2, prompt=prefix)) == expected


def test_priorities_change_nothing_for_other_clients() -> None:
    """Clients are served in the same order whatever the numbers of one of them are."""

    def clients(priority: int) -> list[str]:
        names = ["ann"] * 4 + ["ben"] * 3 + ["ann"] * 2
        wanted = [job(number, priority if name == "ann" else 0, name) for number, name in enumerate(names)]
        return [names[number] for number in order(EngineLoop(HistoryRunner(1, 4)), *wanted)]

    assert clients(-100) == clients(0) == clients(100)


def test_jobs_are_added_and_removed_by_priority() -> None:
    """Against a sorted list, with jobs of few and of many priorities."""
    random = Random(5)
    for most in (2, 50):
        waiting, expected = WaitingJobs(), []
        for number in range(300):
            state = JobState(number, job(number, random.randrange(most)), None)  # type: ignore[arg-type]
            waiting.add(state)
            expected.append(state)
            if random.random() < 0.4:
                removed = random.choice(expected)
                expected.remove(removed)
                assert waiting.discard(removed) == bool(expected)
                waiting.discard(removed)  # without an effect
            assert list(waiting) == sorted(expected, key=lambda each: each.job.priority)
            assert bool(waiting) == bool(expected)

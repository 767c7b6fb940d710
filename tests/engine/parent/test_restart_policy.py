"""Tests of the restart policy, with simulated time."""

from __future__ import annotations

from afterword.engine.parent.restart_policy import RestartPolicy


def test_pauses_grow_from_zero_and_a_finished_job_resets_them():
    restart_policy = RestartPolicy()
    assert [restart_policy.next_delay(0) for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restart_policy.is_failing(0)
    restart_policy.record_success()
    assert (restart_policy.next_delay(1), restart_policy.is_failing(1)) == (0, False)


def test_five_crashes_in_five_minutes_are_failing():
    restart_policy = RestartPolicy()
    seen = []
    for minute in range(10):
        restart_policy.next_delay(minute * 70.0)
        seen.append(restart_policy.is_failing(minute * 70.0))
    assert seen == [False, False, False, False, True, True, True, True, True, True]
    assert not restart_policy.is_failing(9 * 70 + 301)

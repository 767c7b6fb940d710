"""When an engine hangs, when it is started again, and what is not tried again: pure rules, time is an argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from afterword.engine import frames
from afterword.engine.protocol import Job, Load, Sampling
from afterword.engine.quarantine import SECONDS, Quarantine
from afterword.engine.supervisor import Policy
from afterword.engine.watch import TICK, Restarts, Watch
from afterword.errors import SettingError

PASS = frames.Pass({}, Load())


def hangs_after(
    watch: Watch,
    *messages: frames.FromEngine | Callable[[int], frames.FromEngine],
    jobs: bool = True,
    texts: tuple[int, int] = (0, 0),
) -> float | None:
    """Seconds until it is said to hang while these come every second; None: not in an hour."""
    for look in range(round(3600 / TICK)):
        if look * TICK == int(look * TICK):
            for message in messages:
                watch.heard(message(int(look * TICK)) if callable(message) else message)
        if watch.hangs(TICK, jobs, texts):
            return (look + 1) * TICK
    return None


def pulse(passes: int = 0, tokens: int = 0, largest: int = 0, slowest: float = 0.0) -> frames.Pulse:
    return frames.Pulse(passes, tokens, largest, slowest)


def test_silence_is_a_hang_working_or_not():
    for jobs in (True, False):
        assert hangs_after(Watch(15), jobs=jobs) == pytest.approx(15, abs=1)


def test_a_pulse_is_enough_where_there_is_no_work():
    assert hangs_after(Watch(15), pulse(), jobs=False) is None


def test_work_that_does_not_progress_is_a_hang():
    assert hangs_after(Watch(15), pulse(3)) == pytest.approx(15, abs=1)
    assert hangs_after(Watch(15), PASS) is None


def test_a_pass_may_take_five_times_as_long_as_the_longest():
    assert hangs_after(Watch(15), pulse(9, tokens=256, largest=256, slowest=20)) == pytest.approx(100, abs=1)
    assert hangs_after(Watch(15), pulse(9, tokens=512, largest=256, slowest=20)) == pytest.approx(200, abs=1)
    assert hangs_after(Watch(15), pulse(9, tokens=1, largest=256, slowest=0.5)) == pytest.approx(15, abs=1)


def test_what_is_known_of_passes_outlives_an_engine():
    watch = Watch(15)
    assert hangs_after(watch, pulse(tokens=256)) == pytest.approx(600, abs=1), "the first pass"
    watch.heard(pulse(1, largest=256, slowest=10))
    watch.started()
    assert hangs_after(watch, pulse(tokens=256)) == pytest.approx(50, abs=1)


def test_a_text_is_given_four_times_the_limit():
    assert hangs_after(Watch(15), pulse(), jobs=False, texts=(1, 0)) == pytest.approx(60, abs=1)
    assert hangs_after(Watch(15), pulse(), frames.Tokens.of(0, ()), jobs=False, texts=(1, 0)) is None


def test_a_long_text_is_given_longer():
    assert hangs_after(Watch(15), pulse(), jobs=False, texts=(0, 2**20)) == pytest.approx(300, abs=1)


def parts(short: int = 0, long: int = 0) -> frames.Pulse:
    return frames.Pulse(0, 0, 0, 0.0, parts=(short, long))


def test_a_text_of_which_parts_are_done_does_not_hang_however_long_it_takes():
    assert hangs_after(Watch(15), lambda second: parts(long=second // 50), jobs=False, texts=(0, 9000)) is None
    assert hangs_after(Watch(15), lambda second: parts(short=second // 50), jobs=False, texts=(5, 0)) is None


@pytest.mark.parametrize("texts", [(5, 9000), (5, 0)])
def test_texts_that_hang_are_noticed_beside_others_that_do_not(texts: tuple[int, int]):
    assert hangs_after(Watch(15), lambda second: parts(long=second), jobs=False, texts=texts) == pytest.approx(
        60, abs=1
    )
    answers = (frames.Tokens.of(0, (), True), pulse())
    assert hangs_after(Watch(15), *answers, jobs=False, texts=texts) == pytest.approx(60, abs=1)


def test_a_look_that_comes_late_counts_as_a_short_one():
    watch = Watch(15)
    assert not any(watch.hangs(3600, True, (1, 1)) for _ in range(10))


def test_pauses_grow_from_none_and_end_with_a_finished_job():
    restarts = Restarts()
    assert [restarts.crashed(0) for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restarts.failing(0)
    restarts.served()
    assert (restarts.crashed(1), restarts.failing(1)) == (0, False)


def test_five_deaths_in_five_minutes_are_too_many():
    restarts = Restarts()
    seen = []
    for minute in range(10):
        restarts.crashed(minute * 70.0)
        seen.append(restarts.failing(minute * 70.0))
    assert seen == [False, False, False, False, True, True, True, True, True, True]
    assert not restarts.failing(9 * 70 + 301)


def test_what_is_quarantined_is_known_by_what_is_computed_and_for_an_hour():
    quarantine = Quarantine()
    job = Job((1, 2), 1, 5, Sampling(), (), b"k" * 16, client="one")
    other = Job((1, 2), 1, 5, Sampling(), (), b"x" * 16, client="another", namespace="n")
    assert not quarantine.holds(job, 0)
    quarantine.add(job, 0)
    assert quarantine.holds(other, SECONDS - 1)
    assert not quarantine.holds(Job((1, 3), 1, 5, Sampling(), (), b"k" * 16), 1)
    assert not quarantine.holds(other, SECONDS)


def test_a_quarantine_has_an_end():
    quarantine = Quarantine()
    for number in range(2000):
        quarantine.add(str(number), 0)
    assert not quarantine.holds("0", 1)
    assert quarantine.holds("1999", 1)


def test_less_than_three_seconds_are_no_silence():
    with pytest.raises(SettingError):
        Policy(hang_seconds=2)

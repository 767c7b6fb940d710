"""Tests of the watchdog, with simulated time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from afterword.engine import messages as frames
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.watchdog import TICK_SECONDS, Watchdog
from afterword.engine.protocol import Load
from afterword.errors import SettingError

PASS = frames.PassDone({}, Load())


def hangs_after(
    watchdog: Watchdog,
    *messages: frames.ServerMessage | Callable[[int], frames.ServerMessage],
    jobs: bool = True,
    texts: tuple[int, int] = (0, 0),
) -> float | None:
    """Seconds until the watchdog reports a hang while `messages` arrive every second; None: not within an hour."""
    for tick in range(round(3600 / TICK_SECONDS)):
        if tick * TICK_SECONDS == int(tick * TICK_SECONDS):
            for message in messages:
                watchdog.record_message(message(int(tick * TICK_SECONDS)) if callable(message) else message)
        if watchdog.is_hanging(TICK_SECONDS, jobs, texts):
            return (tick + 1) * TICK_SECONDS
    return None


def heartbeat(passes: int = 0, tokens: int = 0, largest: int = 0, slowest: float = 0.0) -> frames.Heartbeat:
    return frames.Heartbeat(passes, tokens, largest, slowest)


def test_missing_messages_are_a_hang_with_and_without_jobs():
    for jobs in (True, False):
        assert hangs_after(Watchdog(15), jobs=jobs) == pytest.approx(15, abs=1)


def test_heartbeats_without_jobs_are_no_hang():
    assert hangs_after(Watchdog(15), heartbeat(), jobs=False) is None


def test_jobs_without_a_finished_pass_are_a_hang():
    assert hangs_after(Watchdog(15), heartbeat(3)) == pytest.approx(15, abs=1)
    assert hangs_after(Watchdog(15), PASS) is None


def test_a_pass_may_take_five_times_as_long_as_the_longest():
    assert hangs_after(Watchdog(15), heartbeat(9, tokens=256, largest=256, slowest=20)) == pytest.approx(100, abs=1)
    assert hangs_after(Watchdog(15), heartbeat(9, tokens=512, largest=256, slowest=20)) == pytest.approx(200, abs=1)
    assert hangs_after(Watchdog(15), heartbeat(9, tokens=1, largest=256, slowest=0.5)) == pytest.approx(15, abs=1)


def test_measured_passes_survive_a_restart():
    watchdog = Watchdog(15)
    assert hangs_after(watchdog, heartbeat(tokens=256)) == pytest.approx(600, abs=1), "the first pass"
    watchdog.record_message(heartbeat(1, largest=256, slowest=10))
    watchdog.reset()
    assert hangs_after(watchdog, heartbeat(tokens=256)) == pytest.approx(50, abs=1)


def test_a_short_text_may_take_four_times_the_limit():
    assert hangs_after(Watchdog(15), heartbeat(), jobs=False, texts=(1, 0)) == pytest.approx(60, abs=1)
    assert hangs_after(Watchdog(15), heartbeat(), frames.TextTokens.of(0, ()), jobs=False, texts=(1, 0)) is None


def test_a_long_text_may_take_longer():
    assert hangs_after(Watchdog(15), heartbeat(), jobs=False, texts=(0, 2**20)) == pytest.approx(300, abs=1)


def parts(short: int = 0, long: int = 0) -> frames.Heartbeat:
    return frames.Heartbeat(0, 0, 0, 0.0, parts=(short, long))


def test_a_text_whose_parts_are_finished_does_not_hang():
    assert hangs_after(Watchdog(15), lambda second: parts(long=second // 50), jobs=False, texts=(0, 9000)) is None
    assert hangs_after(Watchdog(15), lambda second: parts(short=second // 50), jobs=False, texts=(5, 0)) is None


@pytest.mark.parametrize("texts", [(5, 9000), (5, 0)])
def test_a_hanging_text_is_detected_beside_texts_with_progress(texts: tuple[int, int]):
    assert hangs_after(Watchdog(15), lambda second: parts(long=second), jobs=False, texts=texts) == pytest.approx(
        60, abs=1
    )
    answers = (frames.TextTokens.of(0, (), True), heartbeat())
    assert hangs_after(Watchdog(15), *answers, jobs=False, texts=texts) == pytest.approx(60, abs=1)


def test_a_late_tick_counts_as_a_short_tick():
    watchdog = Watchdog(15)
    assert not any(watchdog.is_hanging(3600, True, (1, 1)) for _ in range(10))


def test_a_hang_limit_below_three_seconds_is_refused():
    with pytest.raises(SettingError):
        QueuePolicy(hang_seconds=2)

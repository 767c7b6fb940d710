"""G16: text and stop strings are the same for every division of bytes into tokens, compared with a simple reference."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from afterword.completion.text_stream import StopMatcher
from completion.test_text_stream import before_stop, read

from .gate import Fault, Gate, Result, Trial

LETTERS = ("a", "a", "b", " ", "é", "漢", "😀", "\ufffd", "e\u0301", "\u0301", "\u200d", "\x00")
"""Few characters, so that stop strings occur often."""
BROKEN = (b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5")


def run(trial: Trial) -> Result:
    random = Random(trial.seed)
    different, stopped = 0, 0
    for number in range(trial.size):
        if number % 1000 == 0:
            trial.say(f"G16 {number}")
        data, stops = _bytes(random), _stops(random)
        whole = data.decode("utf-8", "replace")
        expected = before_stop(whole, stops)
        stopped += expected != whole
        different += read(*_cut(data, random), stops=stops).text != expected
    return Result(different == 0, {"different": different, "stopped": stopped})


def _bytes(random: Random) -> bytes:
    length = random.randint(0, 24)
    return b"".join(
        random.choice(BROKEN) if random.random() < 0.15 else random.choice(LETTERS).encode() for _ in range(length)
    )


def _stops(random: Random) -> list[str]:
    return ["".join(random.choices(LETTERS, k=random.randint(1, 4))) for _ in range(random.randint(0, 4))]


def _cut(data: bytes, random: Random) -> list[bytes]:
    """The same bytes as tokens, none of them empty."""
    inner = sorted(random.sample(range(1, len(data)), random.randint(0, len(data) - 1))) if len(data) > 1 else []
    return [data[start:end] for start, end in pairwise([0, *inner, len(data)]) if start < end]


def hold_nothing_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StopMatcher, "held", property(lambda _: 0))


GATE = Gate(
    name="G16",
    goal="the text is exactly the part before the first stop string, for every division into tokens",
    unit="texts",
    commit=20_000,
    nightly=1_000_000,
    run=run,
    fault=Fault("the beginning of a stop string is not held back", "gate", hold_nothing_back),
    planted=1_000,
)

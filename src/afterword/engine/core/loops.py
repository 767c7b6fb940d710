"""Finds loops in the tokens of a sample, for `Job.repetition_detection`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from afterword.engine.protocol import RepetitionDetection

_FIRST_COMPARED = 8  # tokens


def ends_in_loop(tokens: Sequence[int], detection: RepetitionDetection) -> bool:
    """Whether the last tokens are one pattern several times in a row."""
    most = min(detection.max_size, len(tokens) // detection.min_count)
    return any(
        _repeats(tokens, size, detection.min_count)
        for size in range(detection.min_size, most + 1)
        if tokens[-1] == tokens[-1 - size]
    )


def _repeats(tokens: Sequence[int], size: int, count: int) -> bool:
    """Whether each of the last tokens is equal to that one pattern before it.

    The last tokens are compared first, and more of them each time: most sizes differ in few tokens.
    """
    end, first, part = len(tokens), len(tokens) - size * (count - 1), _FIRST_COMPARED
    while end > first:
        start = max(end - part, first)
        if tokens[start:end] != tokens[start - size : end - size]:
            return False
        end, part = start, part * 4
    return True

"""Leaves out parts of infill prompts that are too long for the context: what is far from the cursor.

Other files are left out first, the first of the list before the last. Then the prefix loses its beginning and the
suffix its end, both at line ends where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SUFFIX_SHARE = 4  # the suffix may fill one fourth of the room, more only if the prefix is short
_STEPS = 8  # the prefix loses a multiple of one eighth of the room


@dataclass(frozen=True, slots=True)
class InfillTexts:
    """The tokens of an infill prompt's texts: prefix, suffix and other files."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()
    files: tuple[tuple[int, ...], ...] = ()


def trim(texts: InfillTexts, room: int, separators: int, pieces: Sequence[bytes]) -> InfillTexts:
    """The texts with at most `room` tokens, if `room` is positive. Texts that fit are unchanged.

    `separators`: how many further tokens each file needs. `pieces`: the bytes of each token.

    The prefix is cut at a multiple of a step, so that the cut stays where it is while the user types: the prompts of
    consecutive requests then begin with the same tokens, which the prefix cache has.
    """
    room = max(room, 0)
    prefix, suffix = texts.prefix, texts.suffix
    if len(prefix) + len(suffix) > room:
        suffix = _first_lines(suffix, max(room // _SUFFIX_SHARE, room - len(prefix)), pieces)
        return InfillTexts(_last_lines(prefix, room - len(suffix), max(1, room // _STEPS), pieces), suffix)
    left = room - len(prefix) - len(suffix)
    files: list[tuple[int, ...]] = []
    for file in reversed(texts.files):
        left -= len(file) + separators
        if left < 0:
            break
        files.append(file)
    return InfillTexts(prefix, suffix, tuple(reversed(files)))


def _first_lines(tokens: tuple[int, ...], most: int, pieces: Sequence[bytes]) -> tuple[int, ...]:
    """At most `most` of the first tokens: up to their last line end, or all of them if they have none."""
    if len(tokens) <= most:
        return tokens
    kept = tokens[:most]
    for end in range(len(kept), 0, -1):
        if pieces[kept[end - 1]].endswith(b"\n"):
            return kept[:end]
    return kept


def _last_lines(tokens: tuple[int, ...], most: int, step: int, pieces: Sequence[bytes]) -> tuple[int, ...]:
    """At most `most` of the last tokens. They begin after a line end if one is among the first `step` of them."""
    if len(tokens) <= most:
        return tokens
    start = min(-(-(len(tokens) - most) // step) * step, len(tokens))
    for end in range(start, min(start + step, len(tokens))):
        if pieces[tokens[end]].endswith(b"\n"):
            return tokens[end + 1 :]
    return tokens[start:]

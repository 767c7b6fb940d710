"""Ends the text of an infill where its indentation ends, or after a time: what `/infill` has beside stop strings."""

from __future__ import annotations

from collections.abc import Callable


class MiddleEnd:
    """Reads the text of one choice, and releases the part of it that belongs to the middle.

    `indent`: a line that begins with fewer spaces and tabs ends the text, also an empty line. `is_late`: whether the
    next line end ends the text. In both cases the line end is not part of it. As in llama-server, the first line may
    have any indentation, because it continues the prefix.
    """

    def __init__(self, indent: int, is_late: Callable[[], bool]) -> None:
        self._indent = indent
        self._is_late = is_late
        self._held = ""  # a line end and the blanks after it, while they may be too few
        self.ended = False

    def feed(self, text: str) -> str:
        """Add text. Returns the text that may be shown now; "" after the end."""
        shown = []
        for character in text:
            if self.ended:
                break
            shown.append(self._next(character))
        return "".join(shown)

    def finish(self) -> str:
        """The text that was held, at the end of the choice."""
        held, self._held = self._held, ""
        return "" if self.ended else held

    def _next(self, character: str) -> str:
        if self._held and character in " \t":
            self._held += character
            return ""
        held, self._held = self._held, ""
        if held and len(held) - 1 < self._indent:
            self.ended = True
            return ""
        if character != "\n":
            return held + character
        if self._is_late():
            self.ended = True
            return held
        if self._indent:
            self._held = character
            return held
        return held + character

"""Collects the deltas of `/infill`: the text of each middle until it ends, and why it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from afterword.completion.choice import Delta
from afterword.completion.middle_end import MiddleEnd
from afterword.completion.plan import Plan

StopType = Literal["none", "eos", "word", "limit"]
"""llama-server's reasons for the end of a text: none yet, an end token, a stop string, a limit."""


@dataclass(frozen=True, slots=True)
class MiddlePart:
    """The new text and tokens of a middle. `stop`: "none" in all parts but the last."""

    index: int
    text: str
    tokens: tuple[int, ...]
    stop: StopType


class Middle:
    """One middle while it is generated. `indent`, `is_late`: see `MiddleEnd`.

    `truncated`: the end of the context has ended the text. `fewer`: the context holds fewer tokens than the request
    asks for.
    """

    def __init__(self, plan: Plan, indent: int, is_late: Callable[[], bool], fewer: bool = False) -> None:
        self._plan = plan
        self._fewer = fewer
        self._end = MiddleEnd(indent, is_late)
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self.stop: StopType = "none"
        self.stop_word = ""
        self.truncated = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of all generated tokens, also those that the text leaves out."""
        return tuple(self._tokens)

    @property
    def length(self) -> int:
        """The number of `tokens`."""
        return len(self._tokens)

    def add(self, delta: Delta) -> MiddlePart | None:
        """Add a delta. None if there is nothing new to show, which includes every delta after the end."""
        if self.stop != "none":
            return None
        tokens = delta.token_ids or ()
        self._tokens += tokens
        text = self._end.feed(delta.own_text)
        if self._end.ended:
            self.stop = "limit"
        elif delta.finish is not None:
            text += self._end.finish()
            self._texts.append(text)
            self._finish(delta.finish == "length")
            return MiddlePart(delta.index, text, tokens, self.stop)
        self._texts.append(text)
        return MiddlePart(delta.index, text, tokens, self.stop) if text or tokens or self._end.ended else None

    def _finish(self, limited: bool) -> None:
        job = self._plan.prompts[0].job
        if limited:
            self.stop = "limit"
            self.truncated = self._fewer
        elif self._tokens and self._tokens[-1] in job.end_tokens:
            self.stop = "eos"
        else:
            self.stop = "word"
            self.stop_word = self._matched_stop()

    def _matched_stop(self) -> str:
        """The stop string that follows the text in the generated tokens."""
        spelled = b"".join(self._plan.pieces[token] for token in self._tokens).decode("utf-8", "replace")
        rest = spelled[len(self.text) :]
        return max((text for text in self._plan.stop.texts if rest.startswith(text)), key=len, default="")

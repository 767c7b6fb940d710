"""Streams the log probabilities of a prompt token by token where each has the whole vocabulary.

The rows of a long prompt do not fit into memory. So each token of the prompt has events of its own, one for each
choice, before the events of generated text. Together they have the columns and the report of a single event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afterword.completion.logprobs import Echo, EchoPart, Logprobs, PromptReport, placed_columns
from afterword.completion.plan import Plan, PromptPlan
from afterword.engine.protocol import Token


class PromptRows:
    """Makes the parts of one prompt in order. `echo`: the echoed prompt without scores; None without `echo`."""

    def __init__(self, plan: Plan, prompt: PromptPlan, echo: Echo | None) -> None:
        self._plan = plan
        self._prompt = prompt
        self._text = ""
        self._places: Iterator[tuple[bytes, int]] = iter(())
        if echo is not None and echo.tokens is not None:
            self._text, self._places = echo.text, echo.places()
        self._next: tuple[bytes, int] | None = next(self._places, None)
        self._sent = 0  # characters of the text
        self._position = 0  # of the next token in the prompt

    def take(self, scored: Sequence[Token], is_last: bool) -> Iterator[tuple[EchoPart | None, PromptReport | None]]:
        """The parts for the next scores. `is_last`: no score follows, so all text is sent."""
        if not self._position and (scored or is_last):
            yield from self._part(None, is_last and not scored)
        for index, token in enumerate(scored, 1):
            yield from self._part(token, is_last and index == len(scored))
        if is_last and self._sent < len(self._text):  # the scores have come before
            yield EchoPart(self._text[self._sent :], None), None
            self._sent = len(self._text)

    def _part(self, score: Token | None, is_last: bool) -> Iterator[tuple[EchoPart | None, PromptReport | None]]:
        """The part about the next token of the prompt, unless there is nothing to say about it."""
        position, self._position = self._position, self._position + 1
        hidden = self._prompt.hidden_tokens
        echo = None
        if position >= hidden and self._next is not None:
            place, self._next = self._next, next(self._places, None)
            # The first echoed token has no log probability, even if a token that the server added precedes it.
            known = score if position > hidden else None
            token = self._prompt.job.prompt[position]
            columns = placed_columns(self._plan, token, place, known)
            echo = EchoPart(self._next_text(is_last), columns)
        report = self._report(position, score)
        if echo or report:
            yield echo, report

    def _next_text(self, is_last: bool) -> str:
        """The text up to the next token's offset, or to the end."""
        more = self._next is not None and not is_last
        end = max(self._sent, self._next[1]) if more and self._next else len(self._text)
        text, self._sent = self._text[self._sent : end], end
        return text

    def _report(self, position: int, score: Token | None) -> PromptReport | None:
        ids = self._prompt.job.prompt if self._plan.return_token_ids and not position else None
        if self._plan.prompt_logprobs is None:
            return None if ids is None else PromptReport(ids, None, self._plan)
        return PromptReport(ids, (score,) if score else (), self._plan, begins=not position)


def empty_columns(plan: Plan) -> Logprobs | None:
    """The columns of a choice without generated tokens; None without `logprobs`."""
    return None if plan.logprobs is None else Logprobs((), (), () if plan.logprobs else None, ())

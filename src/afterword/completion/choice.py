"""One sample's tokens to one choice's answer, a delta at a time. The whole answer is the sum of its deltas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from afterword.completion.logprobs import SLICE_TOKENS, Echo, Logprobs, PromptReport, generated_columns, join_columns
from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.text_stream import ReleasedText, TextStream, TokenAtOffset
from afterword.engine.protocol import FinishReason, Token


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice. `finish` is set in its last delta only, `echo` and `prompt` in its first.

    `own_text` and `own_logprobs` are of generated tokens. `completion_tokens` counts the tokens of the text.
    `token_ids` are those that were generated, shown in the text or not; None unless they are asked for.
    """

    index: int
    own_text: str
    own_logprobs: Logprobs | None
    finish: FinishReason | None
    completion_tokens: int = 0
    token_ids: tuple[int, ...] | None = None
    prompt: PromptReport | None = None
    echo: Echo | None = None

    @property
    def text(self) -> str:
        """The text, the echoed prompt included."""
        return self.own_text if self.echo is None else self.echo.text + self.own_text

    @property
    def logprobs(self) -> Logprobs | None:
        """The columns, those of the echoed prompt included."""
        if self.echo is None or self.own_logprobs is None:
            return self.own_logprobs
        return join_columns((*self.echo.columns(), self.own_logprobs))


class ChoiceBuilder:
    """A growing answer. Owner of one sample's text and counts."""

    def __init__(self, plan: Plan, prompt: PromptPlan, echo: Echo | None, report: PromptReport | None) -> None:
        self._plan = plan
        self._echo = echo
        self._stream: TextStream[Token] = TextStream(plan.stop, *_beginning(prompt, echo))
        self._ends = prompt.job.end_tokens
        self._min_tokens = prompt.job.min_tokens
        self._ids: list[int] = []  # generated and not yet told
        self._report = report
        self._end_token: Token | None = None
        self._logprob = 0.0
        self._tokens = 0
        self.completion_tokens = 0
        self.finish: FinishReason | None = None

    @property
    def score(self) -> float:
        """Mean log probability of the generated tokens, the one that ended them included."""
        return self._logprob / self._tokens if self._tokens else 0.0

    def add(self, token: Token) -> None:
        """Take the sample's next token."""
        self._tokens += 1
        self._logprob += token.logprob or 0.0
        self._ids.append(token.id)
        if token.id in self._ends:
            self._end_token = token
            return
        self._stream.push(token, self._plan.pieces[token.id], self._tokens > self._min_tokens)
        if self._stream.stopped:
            self.finish = "stop"

    def end(self, reason: FinishReason) -> None:
        """The engine ended the sample. A stop string that came first decides."""
        self.finish = self.finish or reason

    def deltas(self, index: int) -> list[Delta]:
        """What is new since the last call; at the end, with the last delta."""
        deltas = self._text_deltas(index)
        if deltas and self._plan.return_token_ids:
            deltas = [replace(delta, token_ids=()) for delta in deltas]
            deltas[-1] = replace(deltas[-1], token_ids=tuple(self._ids))
            self._ids.clear()
        if deltas and self._report is not None:
            deltas[0], self._report = replace(deltas[0], prompt=self._report), None
        return deltas

    def _text_deltas(self, index: int) -> list[Delta]:
        """A stop is told in a delta of its own, without text; a length in the last token's."""
        if self.finish is None:
            delta = self._delta(index, self._stream.release())
            return [delta] if _has_content(delta) else []
        last = self._delta(index, self._stream.finish())
        if self._stream.stopped:  # the bytes that were left could complete a stop string
            self.finish = "stop"
        if self.finish == "length":
            return [replace(last, finish="length")]
        ending = Delta(index, "", self._ending(), "stop")
        return [last, ending] if _has_content(last) else [ending]

    def _delta(self, index: int, released: ReleasedText[Token]) -> Delta:
        self.completion_tokens += len(released.tokens)
        columns = None if self._plan.logprobs is None else generated_columns(released.tokens, self._plan)
        delta = Delta(index, released.text, columns, None, len(released.tokens))
        if self._echo is None or not (released.tokens or self.finish):
            return delta
        echo, self._echo = self._echo, None
        return replace(delta, echo=echo)

    def _ending(self) -> Logprobs | None:
        """Columns of the last delta: the end token counts as an entry only where the prompt is echoed.

        Clients that score a text ask for one more token than they need and cut it off by position.
        """
        if self._plan.logprobs is None:
            return None
        shown = self._end_token if self._plan.echo else None
        return generated_columns([TokenAtOffset(shown, self._stream.end)] if shown else [], self._plan)


def fold(deltas: Iterable[Delta]) -> Delta:
    """The whole answer from its deltas, of which there is at least one."""
    deltas = tuple(deltas)
    first, last = deltas[0], deltas[-1]
    columns = [delta.own_logprobs for delta in deltas if delta.own_logprobs is not None]
    ids = chain.from_iterable(delta.token_ids or () for delta in deltas)
    return Delta(
        index=first.index,
        own_text="".join(delta.own_text for delta in deltas),
        own_logprobs=join_columns(columns) if columns else None,
        finish=last.finish,
        completion_tokens=sum(delta.completion_tokens for delta in deltas),
        token_ids=None if first.token_ids is None else tuple(ids),
        prompt=first.prompt,
        echo=first.echo,
    )


class DeltaFolder:
    """The deltas of one choice, folded as they come: many small objects are slow to collect."""

    def __init__(self) -> None:
        self._blocks: list[Delta] = []
        self._deltas: list[Delta] = []

    def add(self, deltas: Iterable[Delta]) -> None:
        """Add the next deltas."""
        self._deltas += deltas
        if len(self._deltas) >= SLICE_TOKENS:
            self._blocks.append(fold(self._deltas))
            self._deltas = []

    @property
    def result(self) -> Delta:
        """The whole answer."""
        return fold((*self._blocks, *self._deltas))


def _beginning(prompt: PromptPlan, echo: Echo | None) -> tuple[int, bytes]:
    """The offset of a completion's first character, and its bytes that are in the prompt, if the prompt is shown."""
    return (len(prompt.text), b"") if echo is None else (len(echo.text), echo.pending_bytes)


def _has_content(delta: Delta) -> bool:
    columns, echo = delta.own_logprobs, delta.echo
    return bool(delta.own_text or (columns and columns.tokens) or (echo and (echo.text or echo.tokens)))

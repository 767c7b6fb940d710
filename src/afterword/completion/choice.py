"""Turns the tokens of one sample into the deltas of one choice. A whole choice is the fold of its deltas.

Each `ChoiceBuilder` owns the text, the token counts and the finish reason of one choice. It does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import msgspec
from msgspec.structs import replace

from afterword.completion.logprobs import (
    SLICE_TOKENS,
    Echo,
    EchoPart,
    Logprobs,
    PromptReport,
    count_characters,
    generated_columns,
    join_columns,
)
from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.predicted import PredictedTokens, PredictionCounter
from afterword.completion.text_stream import ReleasedText, TextStream, TokenAtOffset
from afterword.engine.draft import PredictedText
from afterword.engine.protocol import FinishReason, Token
from afterword.engine.token_row import MAX_HELD_BYTES, is_packed
from afterword.errors import RequestError


class Delta(msgspec.Struct, frozen=True):
    """The new text and tokens of one choice since its last delta.

    `finish` is set in the last delta of a choice only, `prompt` in the first, `echo` in the first with text or tokens.
    `own_text` and `own_logprobs` belong to generated tokens, without the echoed prompt. `completion_tokens` counts the
    tokens that the text was made from. `token_ids` are all generated tokens, also those that the text leaves out; None
    unless the request has `return_token_ids`.
    """

    index: int
    own_text: str
    own_logprobs: Logprobs | None
    finish: FinishReason | None
    completion_tokens: int = 0
    token_ids: tuple[int, ...] | None = None
    prompt: PromptReport | None = None
    echo: Echo | EchoPart | None = None

    @property
    def has_rows(self) -> bool:
        """Whether generated tokens have entries that are made in parts."""
        return self.own_logprobs is not None and self.own_logprobs.has_rows

    @property
    def text(self) -> str:
        """The text, including the echoed prompt."""
        return self.own_text if self.echo is None else self.echo.text + self.own_text

    @property
    def logprobs(self) -> Logprobs | None:
        """The columns, including those of the echoed prompt."""
        if self.echo is None or self.own_logprobs is None:
            return self.own_logprobs
        return join_columns((*self.echo.columns(), self.own_logprobs))


class HeldRows:
    """Counts the bytes of rows that the choices of a request hold back.

    `response_size.check_size` refuses texts that are too long. But tokens without bytes are held too, in any number.
    """

    def __init__(self) -> None:
        self._size = 0

    def add(self, size: int) -> None:
        """Change the sum by `size` bytes. Raises `RequestError` if it is then too large."""
        self._size += size
        if size > 0 and self._size > MAX_HELD_BYTES:
            raise RequestError(
                f"The log probabilities of tokens whose text is not decided yet take more than {MAX_HELD_BYTES} bytes, "
                "so the response ends here. (HINT: lower 'logprobs', request fewer choices at a time, or leave out "
                "'stop'.)",
                param="logprobs",
                code="answer_too_large",
            )


@dataclass(frozen=True, slots=True)
class Shared:
    """What all choices of a request share. `predicted`: its index takes 0.2 KiB for each token of the prediction."""

    predicted: PredictedText | None = None
    held_rows: HeldRows = field(default_factory=HeldRows)


class ChoiceBuilder:
    """Builds one choice while its sample is generated. It owns the text and the token counts of the sample."""

    def __init__(
        self,
        plan: Plan,
        prompt: PromptPlan,
        echo: Echo | None,
        report: PromptReport | None,
        shared: Shared | None = None,
    ) -> None:
        shared = shared or Shared()
        self._plan = plan
        self._by_row = plan.streams and is_packed(plan.logprobs, plan.reports_ids)
        self._held_rows = shared.held_rows
        self._added = self._counted = 0  # bytes of rows in `_stream`: now, and in `_held_rows`
        self._counter = PredictionCounter(prompt.job, shared.predicted) if shared.predicted else None
        self._echo = None if plan.prompt_by_row and plan.logprobs is not None else echo  # was sent
        self._stream: TextStream[Token] = TextStream(plan.stop, *_text_start(prompt, echo))
        self._healed = prompt.job.healed
        self._characters_before = _healed_characters(prompt.job.healed, echo)
        self._end_tokens = prompt.job.end_tokens
        self._min_tokens = prompt.job.min_tokens
        self._ids: list[int] = []  # generated, and in no delta yet
        self._report = report
        self._end_token: Token | None = None
        self._logprob = 0.0
        self._tokens = 0
        self.completion_tokens = 0
        self.finish: FinishReason | None = None

    @property
    def mean_logprob(self) -> float:
        """The mean log probability of the generated tokens, including an end token. 0 without tokens."""
        return self._logprob / self._tokens if self._tokens else 0.0

    @property
    def predicted(self) -> PredictedTokens:
        """The tokens of the prediction that are in the text so far, and the rejected ones."""
        return self._counter.predicted if self._counter else PredictedTokens()

    def add(self, token: Token) -> None:
        """Add the next token of the sample."""
        self._tokens += 1
        self._logprob += token.logprob or 0.0
        self._ids.append(token.id)
        if token.id in self._end_tokens and token.id not in self._plan.shown_ends:
            self._end_token = token
            return
        piece = b"" if token.id in self._plan.silent else self._plan.pieces[token.id]
        if self._tokens == 1:
            piece = piece[len(self._healed) :]  # these bytes are in the prompt's text
        if token.row:
            self._added += token.row.size
        self._stream.push(token, piece, self._tokens > self._min_tokens)
        if self._stream.stopped:
            self.finish = "stop"

    def end(self, reason: FinishReason) -> None:
        """Note that the engine has ended the sample. A stop string that was found before decides the finish reason."""
        self.finish = self.finish or reason

    def deltas(self, index: int) -> list[Delta]:
        """The deltas since the last call: none while nothing may be shown, two where a stop follows text."""
        deltas = self._text_deltas(index)
        self._added = 0 if self.finish else self._added
        if self._added != self._counted:
            change, self._counted = self._added - self._counted, self._added
            self._held_rows.add(change)
        if deltas and self._plan.return_token_ids:
            deltas = [replace(delta, token_ids=()) for delta in deltas]
            deltas[-1] = replace(deltas[-1], token_ids=tuple(self._ids))
            self._ids.clear()
        if deltas and self._report is not None:
            deltas[0], self._report = replace(deltas[0], prompt=self._report), None
        return deltas

    def _text_deltas(self, index: int) -> list[Delta]:
        """`"stop"` gets a delta of its own, without text; other reasons are in the delta of the last token."""
        if self.finish is None:
            found = [self._delta(index, part) for part in self._parts(self._stream.release())]
            return [delta for delta in found if _has_content(delta)]
        *others, last = [self._delta(index, part) for part in self._parts(self._stream.finish())]
        if self._stream.stopped:  # `finish` decoded the last bytes, which can complete a stop string
            self.finish = "stop"
        if self.finish != "stop":
            return [*others, replace(last, finish=self.finish)]
        ending = Delta(index, "", self._final_columns(), "stop")
        return [*(delta for delta in (*others, last) if _has_content(delta)), ending]

    def _parts(self, released: ReleasedText[Token]) -> list[ReleasedText[Token]]:
        """The text as it is sent: in streams each token with a row has an event of its own, because it is large."""
        if not self._by_row or not released.tokens:
            return [released]
        start = self._stream.start - len(released.text)
        cuts = [max(0, placed.offset - start) for placed in released.tokens[1:]]
        bounds = pairwise((0, *cuts, len(released.text)))
        return [
            ReleasedText(released.text[begin:end], (placed,))
            for placed, (begin, end) in zip(released.tokens, bounds, strict=True)
        ]

    def _delta(self, index: int, released: ReleasedText[Token]) -> Delta:
        self.completion_tokens += len(released.tokens)
        if self._added:
            self._added -= sum(each.token.row.size for each in released.tokens if each.token.row)
        if self._counter:
            for each in released.tokens:
                self._counter.add(each.token.id)
        columns = None if self._plan.logprobs is None else generated_columns(self._placed(released.tokens), self._plan)
        delta = Delta(index, released.text, columns, None, len(released.tokens))
        if self._echo is None or not (released.tokens or self.finish):
            return delta
        echo, self._echo = self._echo, None
        return replace(delta, echo=echo)

    def _placed(self, tokens: Sequence[TokenAtOffset[Token]]) -> Sequence[TokenAtOffset[Token]]:
        """The tokens with their offsets. A first token that begins with `Job.healed` begins inside the prompt."""
        if not self._characters_before or not tokens:
            return tokens
        begun, self._characters_before = self._characters_before, 0
        return (replace(tokens[0], offset=max(0, tokens[0].offset - begun)), *tokens[1:])

    def _final_columns(self) -> Logprobs | None:
        """The columns of the delta with `"stop"`: an entry for the end token where the prompt is echoed, else none.

        Clients that score a text request one token more than they need and cut it off by position. So they need an
        entry for each generated token.
        """
        if self._plan.logprobs is None:
            return None
        shown = self._end_token if self._plan.echo else None
        return generated_columns([TokenAtOffset(shown, self._stream.end)] if shown else [], self._plan)


def fold(deltas: Iterable[Delta]) -> Delta:
    """The whole choice from all its deltas, at least one."""
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
    """Folds the deltas of one choice while they arrive.

    The garbage collector takes long for many small objects, so every `SLICE_TOKENS` deltas become one.
    """

    def __init__(self) -> None:
        self._blocks: list[Delta] = []
        self._deltas: list[Delta] = []

    def add(self, deltas: Iterable[Delta]) -> None:
        self._deltas += deltas
        if len(self._deltas) >= SLICE_TOKENS:
            self._blocks.append(fold(self._deltas))
            self._deltas = []

    @property
    def result(self) -> Delta:
        """The whole choice so far."""
        return fold((*self._blocks, *self._deltas))


def _text_start(prompt: PromptPlan, echo: Echo | None) -> tuple[int, bytes]:
    """The offset of a completion's first character, in code points, and the bytes of it that end the echoed prompt."""
    return (len(prompt.text), b"") if echo is None else (len(echo.text), echo.pending_bytes)


def _healed_characters(healed: bytes, echo: Echo | None) -> int:
    """The characters of `Job.healed` that count in the offset of a completion's first character."""
    pending = len(echo.pending_bytes) if echo else 0  # the start of a character, which is not in the echoed text
    return count_characters(healed) - (0 < pending <= len(healed))


def _has_content(delta: Delta) -> bool:
    columns, echo = delta.own_logprobs, delta.echo
    return bool(delta.own_text or (columns and columns.tokens) or (echo and (echo.text or echo.tokens)))

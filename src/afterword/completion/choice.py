"""One sample's tokens to one choice's answer, a delta at a time. The whole answer is the sum of its deltas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.text import Placed, Released, TextStream
from afterword.engine.protocol import End, Token

TopLogprobs = tuple[dict[str, float] | None, ...]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Four parallel columns, an entry a token. `top_logprobs` is None when no alternatives were asked for."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: TopLogprobs | None
    text_offset: tuple[int, ...]

    def __add__(self, other: Logprobs) -> Logprobs:
        top = None
        if self.top_logprobs is not None and other.top_logprobs is not None:
            top = self.top_logprobs + other.top_logprobs
        return Logprobs(
            self.tokens + other.tokens,
            self.token_logprobs + other.token_logprobs,
            top,
            self.text_offset + other.text_offset,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice. `finish` is set in its last delta only."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish: End | None

    def __add__(self, other: Delta) -> Delta:
        columns = self.logprobs
        if columns is not None and other.logprobs is not None:
            columns = columns + other.logprobs
        return Delta(self.index, self.text + other.text, columns, other.finish)


@dataclass(frozen=True, slots=True)
class Echo:
    """What comes before the completion when the prompt is echoed."""

    text: str
    logprobs: Logprobs | None


class Choice:
    """A growing answer. Owner of one sample's text and counts."""

    def __init__(self, plan: Plan, prompt: PromptPlan, echo: Echo | None) -> None:
        self._plan = plan
        self._echo = echo
        self._stream: TextStream[Token] = TextStream(plan.stop, len(prompt.text))
        self._ends = prompt.job.ends
        self._end_token: Token | None = None
        self._logprob = 0.0
        self._tokens = 0
        self.completion_tokens = 0
        self.finish: End | None = None

    @property
    def score(self) -> float:
        """Mean log probability of the generated tokens, the one that ended them included."""
        return self._logprob / self._tokens if self._tokens else 0.0

    def take(self, token: Token) -> None:
        """Take the sample's next token."""
        self._tokens += 1
        self._logprob += token.logprob or 0.0
        if token.id in self._ends:
            self._end_token = token
            return
        self._stream.push(token, self._plan.pieces[token.id])
        if self._stream.stopped:
            self.finish = "stop"

    def end(self, reason: End) -> None:
        """The engine ended the sample. A stop string that came first decides."""
        self.finish = self.finish or reason

    def deltas(self, index: int) -> list[Delta]:
        """What is new since the last call; at the end, with the last delta.

        A stop is told in a delta of its own, without text; a length in the last token's.
        """
        if self.finish is None:
            delta = self._delta(index, self._stream.release())
            return [delta] if delta.text or (delta.logprobs and delta.logprobs.tokens) else []
        last = self._delta(index, self._stream.finish())
        if self._stream.stopped:  # the bytes that were left could complete a stop string
            self.finish = "stop"
        if self.finish == "length":
            return [Delta(index, last.text, last.logprobs, "length")]
        ending = Delta(index, "", self._ending(), "stop")
        return [last, ending] if last.text or (last.logprobs and last.logprobs.tokens) else [ending]

    def _delta(self, index: int, released: Released[Token]) -> Delta:
        self.completion_tokens += len(released.tokens)
        columns = None if self._plan.logprobs is None else generated_columns(released.tokens, self._plan)
        delta = Delta(index, released.text, columns, None)
        if self._echo is None or not (released.tokens or self.finish):
            return delta
        echo, self._echo = self._echo, None
        return Delta(index, echo.text, echo.logprobs, None) + delta

    def _ending(self) -> Logprobs | None:
        """Columns of the last delta: the end token counts as an entry only where the prompt is echoed.

        Clients that score a text ask for one more token than they need and cut it off by position.
        """
        if self._plan.logprobs is None:
            return None
        shown = self._end_token if self._plan.echo else None
        return generated_columns([Placed(shown, self._stream.end)] if shown else [], self._plan)


def fold(deltas: Iterable[Delta]) -> Delta:
    """The whole answer from its deltas, of which there is at least one."""
    return reduce(add, deltas)


def generated_columns(tokens: Iterable[Placed[Token]], plan: Plan) -> Logprobs:
    """Columns of generated tokens."""
    tokens = tuple(tokens)
    return Logprobs(
        tuple(spelled(plan.pieces[placed.token.id]) for placed in tokens),
        tuple(placed.token.logprob for placed in tokens),
        tuple(top_map(placed.token, plan.pieces) for placed in tokens) if plan.logprobs else None,
        tuple(placed.offset for placed in tokens),
    )


def make_echo(plan: Plan, prompt: PromptPlan, scored: Sequence[Token]) -> Echo | None:
    """The echoed prompt, if it is to be echoed.

    `scored` are its tokens from the second on; empty where no log probabilities are wanted.
    """
    if not plan.echo:
        return None
    if plan.logprobs is None:
        return Echo(prompt.text, None)
    ids = prompt.job.prompt[prompt.hidden :]
    pieces = [plan.pieces[token] for token in ids]
    if plan.strip_space and b"".join(pieces).decode("utf-8", "replace") != prompt.text:
        pieces = list(_without_added_spaces(pieces, prompt.text.encode()))
    stream: TextStream[int] = TextStream((), 0)
    for position, piece in enumerate(pieces):
        stream.push(position, piece)
    offsets = tuple(placed.offset for placed in stream.finish().tokens)
    known: list[Token | None] = [None, *scored[prompt.hidden :]] if ids else []  # nothing precedes the first token
    top = tuple(None if t is None else top_map(t, plan.pieces) for t in known) if plan.logprobs else None
    columns = Logprobs(
        tuple(map(spelled, pieces)), tuple(None if t is None else t.logprob for t in known), top, offsets
    )
    return Echo(prompt.text, columns)


def _without_added_spaces(pieces: Iterable[bytes], text: bytes) -> Iterator[bytes]:
    """The pieces as they are in the text: SentencePiece puts spaces before it and after its special tokens."""
    for piece in pieces:
        shown = piece if text.startswith(piece) else piece.removeprefix(b" ")
        yield shown
        text = text[len(shown) :]


def top_map(token: Token, pieces: Sequence[bytes]) -> dict[str, float]:
    """The token itself, then the likeliest others, best first. Of equal spellings the first stays."""
    entries = {} if token.logprob is None else {spelled(pieces[token.id]): token.logprob}
    for other, logprob in token.top:
        entries.setdefault(spelled(pieces[other]), logprob)
    return entries


def spelled(piece: bytes) -> str:
    r"""A token as a string: its text, or `bytes:` and escapes where its bytes are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in piece)

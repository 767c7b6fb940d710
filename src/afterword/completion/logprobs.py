"""Log probabilities as callers read them: columns of generated and echoed tokens, and reports about the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.text import Placed, TextStream
from afterword.engine.protocol import Token

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
class Echo:
    """What comes before the completion when the prompt is echoed."""

    text: str
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A token of the prompt as vLLM reports it; `rank` is 1 for the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What was asked about the tokens that the model read; None where nothing was."""

    token_ids: tuple[int, ...] | None
    logprobs: tuple[dict[str, Ranked] | None, ...] | None


def generated_columns(tokens: Iterable[Placed[Token]], plan: Plan) -> Logprobs:
    """Columns of generated tokens."""
    tokens = tuple(tokens)
    return Logprobs(
        tuple(spelled(plan.pieces[placed.token.id]) for placed in tokens),
        tuple(placed.token.logprob for placed in tokens),
        tuple(top_map(placed.token, plan) for placed in tokens) if plan.logprobs else None,
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
    top = tuple(None if t is None else top_map(t, plan) for t in known) if plan.logprobs else None
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


def make_report(plan: Plan, prompt: PromptPlan, scored: Sequence[Token]) -> PromptReport | None:
    """What was asked about the tokens that the model read, the server's among them."""
    if not plan.return_token_ids and plan.prompt_logprobs is None:
        return None
    ids = prompt.job.prompt if plan.return_token_ids else None
    if plan.prompt_logprobs is None:
        return PromptReport(ids, None)
    return PromptReport(ids, (None, *(ranked(token, plan) for token in scored)))


def ranked(token: Token, plan: Plan) -> dict[str, Ranked]:
    """A token of the prompt and the likeliest ones, by their ids."""
    assert token.logprob is not None
    entries = {str(token.id): Ranked(token.logprob, token.rank, spelled(plan.pieces[token.id]))}
    for rank, (other, logprob) in enumerate(token.top[: plan.prompt_logprobs], 1):
        entries.setdefault(str(other), Ranked(logprob, rank, spelled(plan.pieces[other])))
    return entries


def top_map(token: Token, plan: Plan) -> dict[str, float]:
    """The token itself, then the likeliest others, best first. Of equal spellings the first stays."""
    entries = {} if token.logprob is None else {spelled(plan.pieces[token.id]): token.logprob}
    for other, logprob in token.top[: plan.logprobs]:
        entries.setdefault(spelled(plan.pieces[other]), logprob)
    return entries


@lru_cache(2**15)
def spelled(piece: bytes) -> str:
    r"""A token as a string: its text, or `bytes:` and escapes where its bytes are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in piece)

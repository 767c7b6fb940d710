"""Log probabilities as callers read them: columns of generated and echoed tokens, and reports about the prompt."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar

from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.text_stream import ReleasedText, StopStrings, TextStream, TokenAtOffset
from afterword.engine.protocol import Token, score_count

SLICE_TOKENS = 64
"""Tokens whose columns are made, and encoded, in one step."""

_SEARCHED = 16  # times that a text is searched to its end for a token that is not in it
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # bytes that begin no character

T = TypeVar("T")
TopLogprobs = tuple[dict[str, float] | None, ...]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Four parallel columns, an entry a token. `top_logprobs` is None when no alternatives were asked for."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: TopLogprobs | None
    text_offset: tuple[int, ...]


def slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """A sequence in slices of what is worked on in one step."""
    return (items[start : start + SLICE_TOKENS] for start in range(0, len(items), SLICE_TOKENS))


def join_columns(parts: Iterable[Logprobs]) -> Logprobs:
    """Columns one after another, of which there is at least one part."""
    parts = tuple(parts)
    tops = [part.top_logprobs for part in parts if part.top_logprobs is not None]
    return Logprobs(
        tuple(chain.from_iterable(part.tokens for part in parts)),
        tuple(chain.from_iterable(part.token_logprobs for part in parts)),
        tuple(chain.from_iterable(tops)) if len(tops) == len(parts) else None,
        tuple(chain.from_iterable(part.text_offset for part in parts)),
    )


def column_slices(columns: Logprobs) -> Iterator[Logprobs]:
    """Columns in slices of what is worked on in one step."""
    if len(columns.tokens) <= SLICE_TOKENS:
        yield columns
        return
    for start in range(0, len(columns.tokens), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        top = None if columns.top_logprobs is None else columns.top_logprobs[part]
        yield Logprobs(columns.tokens[part], columns.token_logprobs[part], top, columns.text_offset[part])


@dataclass(frozen=True, slots=True)
class Echo:
    """What comes before the completion when the prompt is echoed; its choices share it.

    `text` are whole characters; `pending_bytes` are the bytes after them, the beginning of a character that the
    completion may end. `tokens` are the prompt's, each as it is in the text, with what the engine reported; None
    without columns.
    """

    text: str
    pending_bytes: bytes
    tokens: tuple[tuple[bytes, Token | None], ...] | None
    aligned: bool
    plan: Plan = field(compare=False, repr=False)

    def columns(self) -> Iterator[Logprobs]:
        """The columns in slices, each made when it is asked for: those of a long prompt are large."""
        if self.tokens is None:
            return
        offsets = _searched(self) if self.aligned else _decoded(self)
        for part in slices(self.tokens):
            placed = list(islice(offsets, len(part)))
            top = tuple(None if t is None else top_map(t, self.plan) for _, t in part) if self.plan.logprobs else None
            yield Logprobs(
                tuple(token_text(shown) for shown, _ in placed),
                tuple(None if t is None else t.logprob for _, t in part),
                top,
                tuple(offset for _, offset in placed),
            )


@dataclass(frozen=True, slots=True)
class RankedToken:
    """A token of the prompt as vLLM reports it; `rank` is 1 for the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What was asked about the tokens that the model read; None where nothing was. Its choices share it.

    `scored` are the tokens from the second on.
    """

    token_ids: tuple[int, ...] | None
    scored: tuple[Token, ...] | None
    plan: Plan = field(compare=False, repr=False)

    def entries(self) -> Iterator[tuple[dict[str, RankedToken] | None, ...]]:
        """An entry for each token, in slices, each made when it is asked for. Nothing precedes the first token."""
        if self.scored is not None:
            yield (None,)
            for part in slices(self.scored):
                yield tuple(ranked(token, self.plan) for token in part)

    @property
    def logprobs(self) -> tuple[dict[str, RankedToken] | None, ...] | None:
        """All entries."""
        return None if self.scored is None else tuple(chain.from_iterable(self.entries()))


def generated_columns(tokens: Iterable[TokenAtOffset[Token]], plan: Plan) -> Logprobs:
    """Columns of generated tokens."""
    tokens = tuple(tokens)
    return Logprobs(
        tuple(token_text(plan.pieces[placed.token.id]) for placed in tokens),
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
    ids = prompt.job.prompt[prompt.hidden_tokens :]
    pieces = [plan.pieces[token] for token in ids]
    spelling = b"".join(pieces)
    aligned = spelling.decode("utf-8", "replace") != prompt.text
    begun = b"" if aligned else unfinished(spelling)
    text = prompt.text[:-1] if begun else prompt.text
    if plan.logprobs is None:
        return Echo(text, begun, None, aligned, plan)
    # The first echoed token has no entry, also where a token that the server added precedes it.
    known: list[Token | None] = [None, *scored[score_count(prompt.hidden_tokens + 1) :]] if ids else []
    return Echo(text, begun, tuple(zip(pieces, known, strict=True)), aligned, plan)


def _decoded(echo: Echo) -> Iterator[tuple[bytes, int]]:
    """Each token's bytes and offset, where the tokens spell the text."""
    stream: TextStream[bytes] = TextStream(StopStrings(), 0)
    for count, (piece, _) in enumerate(echo.tokens or (), 1):
        stream.push(piece, piece)
        if count % SLICE_TOKENS == 0:
            yield from _pairs(stream.release())
    yield from _pairs(stream.finish())


def _pairs(released: ReleasedText[bytes]) -> Iterator[tuple[bytes, int]]:
    return ((placed.token, placed.offset) for placed in released.tokens)


def _searched(echo: Echo) -> Iterator[tuple[bytes, int]]:
    """Each token's bytes and offset, where the tokenizer has added or dropped something.

    SentencePiece puts spaces before a text and after its special tokens; byte-level vocabularies without a token for a
    byte drop it. A token stands where its bytes come next. What is not found at all takes no place in the text.
    """
    text = echo.text.encode()
    place = characters = 0
    budget = _SEARCHED * len(text)  # so that many tokens that are not in the text cost no more than a few looks at it
    for piece, _ in echo.tokens or ():
        spaceless = piece.removeprefix(b" ") if echo.plan.strip_space else piece
        shown = piece if text.startswith(piece, place) else spaceless
        found = place
        if not text.startswith(shown, place):
            shown = piece
            found = text.find(piece, place) if budget > 0 else -1
            budget -= len(text) - place if found < 0 else 0
        if found < 0:
            yield piece, characters
            continue
        characters += _beginnings(text[place:found])
        inside = bool(shown) and text[found] in _CONTINUATIONS
        yield shown, characters - inside
        characters += _beginnings(shown)
        place = found + len(shown)


def _beginnings(data: bytes) -> int:
    """How many characters begin in these bytes."""
    return len(data.translate(None, _CONTINUATIONS))


def unfinished(data: bytes) -> bytes:
    """The bytes at the end that are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-3:])
    return decoder.getstate()[0]


def make_report(plan: Plan, prompt: PromptPlan, scored: Sequence[Token]) -> PromptReport | None:
    """What was asked about the tokens that the model read, the server's among them."""
    if not plan.return_token_ids and plan.prompt_logprobs is None:
        return None
    ids = prompt.job.prompt if plan.return_token_ids else None
    return PromptReport(ids, None if plan.prompt_logprobs is None else tuple(scored), plan)


def ranked(token: Token, plan: Plan) -> dict[str, RankedToken]:
    """A token of the prompt and the likeliest ones, by their ids."""
    assert token.logprob is not None
    entries = {str(token.id): RankedToken(token.logprob, token.rank, token_text(plan.pieces[token.id]))}
    for rank, (other, logprob) in enumerate(token.top[: plan.prompt_logprobs], 1):
        entries.setdefault(str(other), RankedToken(logprob, rank, token_text(plan.pieces[other])))
    return entries


def top_map(token: Token, plan: Plan) -> dict[str, float]:
    """The token itself, then the likeliest others, best first. Of equal spellings the first stays."""
    entries = {} if token.logprob is None else {token_text(plan.pieces[token.id]): token.logprob}
    for other, logprob in token.top[: plan.logprobs]:
        entries.setdefault(token_text(plan.pieces[other]), logprob)
    return entries


@lru_cache(2**15)
def token_text(piece: bytes) -> str:
    r"""A token as a string: its text, or `bytes:` and escapes where its bytes are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in piece)

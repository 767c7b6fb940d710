"""Makes the log probabilities of a response: `logprobs` columns, and `prompt_logprobs` in vLLM's format.

The columns are OpenAI's four parallel arrays, for generated and for echoed tokens. Those of a prompt are made in slices
of `SLICE_TOKENS` tokens, so that a long prompt never has all of them in memory. This module decodes bytes and offsets
for the columns; `text_stream` does the same for generated text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any, TypeVar

from afterword.completion.full_rows import FullRow, Ranked, finite, finite_value
from afterword.completion.plan import Plan, PromptPlan
from afterword.completion.text_stream import ReleasedText, StopStrings, TextStream, TokenAtOffset
from afterword.engine.protocol import Token, score_count
from afterword.engine.token_row import is_packed

SLICE_TOKENS = 64
"""The number of tokens whose columns are made and encoded in one step."""

_MAX_FAILED_SEARCHES = 16  # searches through the whole text for tokens that are not in it
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # UTF-8 continuation bytes

T = TypeVar("T")
TopLogprobs = tuple[dict[str, float] | FullRow | None, ...]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Four parallel columns with one entry for each token. `top_logprobs` is None with `logprobs` 0.

    `text_offset` counts code points from the start of the prompt's text.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: TopLogprobs | None
    text_offset: tuple[int, ...]

    @property
    def has_rows(self) -> bool:
        """Whether it has entries that are made in parts."""
        return any(isinstance(entry, FullRow) for entry in self.top_logprobs or ())


def slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in slices of at most `SLICE_TOKENS`."""
    return (items[start : start + SLICE_TOKENS] for start in range(0, len(items), SLICE_TOKENS))


def join_columns(parts: Iterable[Logprobs]) -> Logprobs:
    """Concatenate columns. There must be at least one part."""
    parts = tuple(parts)
    tops = [part.top_logprobs for part in parts if part.top_logprobs is not None]
    return Logprobs(
        tuple(chain.from_iterable(part.tokens for part in parts)),
        tuple(chain.from_iterable(part.token_logprobs for part in parts)),
        tuple(chain.from_iterable(tops)) if len(tops) == len(parts) else None,
        tuple(chain.from_iterable(part.text_offset for part in parts)),
    )


def column_slices(columns: Logprobs) -> Iterator[Logprobs]:
    """The columns in slices of at most `SLICE_TOKENS` entries."""
    if len(columns.tokens) <= SLICE_TOKENS:
        yield columns
        return
    for start in range(0, len(columns.tokens), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        top = None if columns.top_logprobs is None else columns.top_logprobs[part]
        yield Logprobs(columns.tokens[part], columns.token_logprobs[part], top, columns.text_offset[part])


@dataclass(frozen=True, slots=True)
class Echo:
    """The echoed prompt of a request with `echo`. All choices of the prompt share it.

    `text`: whole characters. `pending_bytes`: the bytes after them, the start of a character that the completion may
    complete. `tokens`: the bytes and the score of each of the prompt's tokens; None without `logprobs`. `must_search`:
    the tokens do not spell the text exactly, so their offsets are found by search. `ids`: those of the tokens.
    """

    text: str
    pending_bytes: bytes
    tokens: tuple[tuple[bytes, Token | None], ...] | None
    must_search: bool
    plan: Plan = field(compare=False, repr=False)
    ids: tuple[int, ...] = ()

    def columns(self) -> Iterator[Logprobs]:
        """Yield the columns in slices. Each slice is made on demand, because those of a long prompt are large."""
        if self.tokens is None:
            return
        offsets = self.places()
        ids = iter(self.ids)
        for part in slices(self.tokens):
            placed = list(islice(offsets, len(part)))
            names = map(_id_text, islice(ids, len(part))) if self.plan.tokens_as_ids else None
            top = tuple(None if t is None else top_map(t, self.plan) for _, t in part) if self.plan.logprobs else None
            yield Logprobs(
                tuple(names or (token_text(shown) for shown, _ in placed)),
                tuple(None if t is None else t.logprob for _, t in part),
                top,
                tuple(offset for _, offset in placed),
            )

    def places(self) -> Iterator[tuple[bytes, int]]:
        """The bytes that are shown for each token, and its offset in code points."""
        return _searched_offsets(self) if self.must_search else _decoded_offsets(self)


@dataclass(frozen=True, slots=True)
class EchoPart:
    """A part of an echoed prompt, with the columns of a token; None: only text."""

    text: str
    tokens: Logprobs | None

    def columns(self) -> Iterator[Logprobs]:
        """The columns of its token, if it has one."""
        if self.tokens is not None:
            yield self.tokens


@dataclass(frozen=True, slots=True)
class RankedToken:
    """A token of the prompt in vLLM's format. `rank`: 1 for the most likely token; None if the request chose the id."""

    logprob: float
    rank: int | None
    decoded_token: str


RankedTokens = dict[str, RankedToken] | dict[str, Any] | FullRow


@dataclass(frozen=True, slots=True)
class PromptReport:
    """The report about the prompt's tokens, for `return_token_ids` and `prompt_logprobs`. All choices share it.

    `token_ids`: None without `return_token_ids`. `scored`: the scores of the tokens from the second on; None without
    `prompt_logprobs`. `begins`: the report begins with the first token of the prompt (`prompt_rows` makes others).
    """

    token_ids: tuple[int, ...] | None
    scored: tuple[Token, ...] | None
    plan: Plan = field(compare=False, repr=False)
    begins: bool = True

    def entries(self) -> Iterator[tuple[RankedTokens | None, ...]]:
        """Yield an entry for each token, in slices that are made on demand. The entry of the first token is None."""
        if self.scored is not None:
            if self.begins:
                yield (None,)
            for part in slices(self.scored):
                yield tuple(ranked(token, self.plan) for token in part)

    @property
    def logprobs(self) -> tuple[RankedTokens | None, ...] | None:
        """All entries; None without `prompt_logprobs`."""
        return None if self.scored is None else tuple(chain.from_iterable(self.entries()))


def generated_columns(tokens: Iterable[TokenAtOffset[Token]], plan: Plan) -> Logprobs:
    """The columns of generated tokens."""
    tokens = tuple(tokens)
    return Logprobs(
        tuple(_name(placed.token.id, plan) for placed in tokens),
        tuple(placed.token.logprob for placed in tokens),
        tuple(top_map(placed.token, plan) for placed in tokens) if plan.logprobs else None,
        tuple(placed.offset for placed in tokens),
    )


def placed_columns(plan: Plan, token: int, place: tuple[bytes, int], score: Token | None) -> Logprobs:
    """The columns of one echoed token. `place`: the bytes that are shown for it, and its offset."""
    name = _id_text(token) if plan.tokens_as_ids else token_text(place[0])
    top = (None if score is None else top_map(score, plan),) if plan.logprobs else None
    return Logprobs((name,), (None if score is None else score.logprob,), top, (place[1],))


def make_echo(plan: Plan, prompt: PromptPlan, scored: Sequence[Token] | None) -> Echo | None:
    """The echoed prompt; None without `echo`.

    `scored`: the scores of the prompt's tokens from the second on; None if they follow. Not used without `logprobs`.
    """
    if not plan.echo:
        return None
    ids = prompt.job.prompt[prompt.hidden_tokens :]
    pieces = [plan.pieces[token] for token in ids]
    must_search = prompt.spelling(plan.pieces).decode("utf-8", "replace") != prompt.text
    pending = prompt.pending_bytes(plan.pieces)
    text = prompt.text[:-1] if pending else prompt.text  # without U+FFFD for the pending bytes
    if plan.logprobs is None:
        return Echo(text, pending, None, must_search, plan)
    # The first echoed token has no log probability, even if a token that the server added precedes it.
    known: list[Token | None] = [None] * len(ids)
    if scored is not None:
        known[1:] = scored[score_count(prompt.hidden_tokens + 1) :]
    return Echo(text, pending, tuple(zip(pieces, known, strict=True)), must_search, plan, ids)


def _decoded_offsets(echo: Echo) -> Iterator[tuple[bytes, int]]:
    """Each token's bytes and offset in code points, for tokens that spell the text exactly."""
    stream: TextStream[bytes] = TextStream(StopStrings(), 0)
    for count, (piece, _) in enumerate(echo.tokens or (), 1):
        stream.push(piece, piece)
        if count % SLICE_TOKENS == 0:
            yield from _pairs(stream.release())
    yield from _pairs(stream.finish())


def _pairs(released: ReleasedText[bytes]) -> Iterator[tuple[bytes, int]]:
    return ((placed.token, placed.offset) for placed in released.tokens)


def _searched_offsets(echo: Echo) -> Iterator[tuple[bytes, int]]:
    """Each token's bytes and offset in code points, for a tokenizer that has added or dropped bytes.

    SentencePiece adds spaces before a text and after special tokens. Byte-level vocabularies drop a byte for which they
    have no token. A token's offset is the next place of its bytes in the text. A token that is not found gets the
    current offset and does not move it.
    """
    text = echo.text.encode()
    position = characters = 0  # in bytes, and in code points
    budget = _MAX_FAILED_SEARCHES * len(text)  # bytes; bounds the time for many tokens that are not in the text
    for piece, _ in echo.tokens or ():
        spaceless = piece.removeprefix(b" ") if echo.plan.strip_space else piece
        shown = piece if text.startswith(piece, position) else spaceless
        found = position
        if not text.startswith(shown, position):
            shown = piece
            found = text.find(piece, position) if budget > 0 else -1
            budget -= len(text) - position if found < 0 else 0
        if found < 0:
            yield piece, characters
            continue
        characters += count_characters(text[position:found])
        inside = bool(shown) and text[found] in _CONTINUATIONS
        yield shown, characters - inside
        characters += count_characters(shown)
        position = found + len(shown)


def count_characters(data: bytes) -> int:
    """How many characters start in these bytes."""
    return len(data.translate(None, _CONTINUATIONS))


def make_report(plan: Plan, prompt: PromptPlan, scored: Sequence[Token]) -> PromptReport | None:
    """The report about the prompt's tokens, including those that the server added. None if no field requests it."""
    if not plan.return_token_ids and plan.prompt_logprobs is None:
        return None
    ids = prompt.job.prompt if plan.return_token_ids else None
    return PromptReport(ids, None if plan.prompt_logprobs is None else tuple(scored), plan)


def ranked(token: Token, plan: Plan) -> RankedTokens:
    """A token of the prompt and the alternatives, by token id as a string, as vLLM reports them."""
    assert token.logprob is not None
    if token.row:
        made = FullRow(token, plan.prompt_logprobs or 0, partial(_ranked_part, plan.pieces), None)
        return made if is_packed(plan.prompt_logprobs) else made.whole()
    entries = {str(token.id): _ranked(token.id, token.logprob, token.rank, plan)}
    for rank, (other, logprob) in enumerate(token.top[: plan.prompt_logprobs], 1):
        entries.setdefault(str(other), _ranked(other, logprob, None if plan.reports_ids else rank, plan))
    return entries


def _ranked(token: int, logprob: float, rank: int | None, plan: Plan) -> RankedToken:
    return RankedToken(finite_value(logprob), rank, token_text(plan.pieces[token]))


def _ranked_part(pieces: Sequence[bytes], alternatives: Iterable[Ranked]) -> dict[str, dict[str, Any]]:
    """The members of `RankedToken` as dictionaries, which takes half the time."""
    return {
        str(token): {
            "logprob": finite_value(value),
            "rank": rank,
            "decoded_token": _uncached_text(pieces[token]),
        }
        for token, value, rank in alternatives
    }


def top_map(token: Token, plan: Plan) -> dict[str, float] | FullRow:
    """The token and the alternatives, best first. Of tokens with the same text the first stays."""
    if token.row:
        by_id = plan.tokens_as_ids
        make = _part_by_ids if by_id else partial(_part_by_texts, plan.pieces)
        made = FullRow(token, plan.logprobs or 0, make, None if by_id else plan.pieces)
        return made if is_packed(plan.logprobs) else made.whole()
    entries = {} if token.logprob is None else {_name(token.id, plan): token.logprob}
    for other, logprob in token.top[: plan.logprobs]:
        entries.setdefault(_name(other, plan), logprob)
    return entries


def _part_by_ids(alternatives: Iterable[Ranked]) -> dict[str, float]:
    return finite({f"token_id:{token}": value for token, value, _ in alternatives})


def _part_by_texts(pieces: Sequence[bytes], alternatives: Iterable[Ranked]) -> dict[str, float]:
    return finite({_uncached_text(pieces[token]): value for token, value, _ in alternatives})


def _name(token: int, plan: Plan) -> str:
    """A token as `tokens` and `top_logprobs` show it."""
    return _id_text(token) if plan.tokens_as_ids else token_text(plan.pieces[token])


def _id_text(token: int) -> str:
    """vLLM's text for a token with `return_tokens_as_token_ids`."""
    return f"token_id:{token}"


def _uncached_text(piece: bytes) -> str:
    r"""A token as a string: its text, or `bytes:` and `\xNN` escapes if its bytes are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in piece)


token_text = lru_cache(2**15)(_uncached_text)
"""The text of a token. A whole vocabulary does not go through the cache, because it would replace everything in it."""

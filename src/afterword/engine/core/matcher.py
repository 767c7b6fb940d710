"""What the engine needs to know of a grammar: which tokens may follow the text of a sample.

The library that knows grammars is behind `Matcher` and `GrammarCompiler`; `engine.grammar` implements them.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.sampler import SampleTokens
from afterword.engine.protocol import Grammar, Job

TokenMask = NDArray[np.uint32]
"""One bit for each token id, the lowest bit of the first word first. Shape: (ceil(vocabulary / 32),)."""


class AllowedTokens(msgspec.Struct, frozen=True):
    """What may follow a text. `mask`: the tokens of text, without end tokens. `complete`: the text may end.

    `error`: why that is not known; then the other fields have no meaning. A matcher's is the end of a sentence for the
    client, that of `restricted` a whole one.
    """

    mask: TokenMask
    complete: bool
    error: str = ""


class Busy(msgspec.Struct, frozen=True):
    """No grammar can be compiled at the moment, because earlier ones take too long."""


class Matcher(Protocol):
    """The place of one sample in a grammar. The engine's thread calls everything; masks are computed in another."""

    is_slow: bool
    """Whether a mask of it once took so long that a pass had to wait."""

    def copy(self) -> Matcher:
        """A matcher at the same place. The engine appends to copies only, so that a compiled grammar stays as it is."""
        ...

    def append(self, token: int) -> bool:
        """Go on by one token, and return whether nothing can follow. If something can, its mask is computed."""
        ...

    def take_back(self, count: int) -> None:
        """Go back by `count` of the appended tokens, whose masks are known. The mask before them is computed again."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether `allowed` would return at once."""
        ...

    def allowed(self) -> AllowedTokens:
        """The tokens that may follow. Waits until they are computed."""
        ...


class GrammarCompiler(Protocol):
    """Compiles grammars in a thread of its own, one at a time, and keeps the last ones."""

    def get(self, grammar: Grammar) -> Matcher | None:
        """The matcher of a kept grammar, at its beginning."""
        ...

    def start(self, grammar: Grammar) -> None:
        """Begin to compile a grammar. Call it only when no other one is being compiled."""
        ...

    def result(self) -> Matcher | str | Busy | None:
        """The result of `start`: a matcher, or what is wrong, as the end of a sentence. None: not ready yet."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until a grammar or a mask is ready, at most so long."""
        ...


def grammar_key(grammar: Grammar) -> tuple[str, str]:
    """What the same grammars of different request fields have in common."""
    return grammar.kind, grammar.text


def next_tokens(allowed: AllowedTokens, job: Job, position: int) -> TokenMask | None:
    """The tokens that may be sampled after `position` generated tokens; None if the text is complete and ends here.

    End tokens are allowed where the text is complete, but not among the first `min_tokens` tokens. A grammar that
    allows nothing else wins over `min_tokens`.
    """
    early = position < job.min_tokens
    mask = _with(allowed.mask, job.end_tokens, False) if early else allowed.mask
    if not mask.any():
        return None if allowed.complete else allowed.mask
    return _with(mask, job.end_tokens, True) if allowed.complete and not early else mask


def restricted(allowed: AllowedTokens, job: Job) -> AllowedTokens:
    """The allowed tokens that `allowed_token_ids` of the request has too, and `banned_tokens` has not."""
    if job.banned and not allowed.error:
        allowed = _without(allowed, job.banned)
    chain = job.sampling.chain
    if chain is None or not chain.allowed or allowed.error:
        return allowed
    own = np.zeros(4 * len(allowed.mask), np.uint8)
    given = np.frombuffer(chain.allowed, np.uint8)[: len(own)]
    own[: len(given)] = given
    mask = allowed.mask & own.view(np.uint32)
    if not mask.any() and not allowed.complete:
        return AllowedTokens(
            mask, False, "'allowed_token_ids' has no token that can continue the text as its grammar demands."
        )
    return AllowedTokens(mask, allowed.complete)


def _without(allowed: AllowedTokens, banned: tuple[int, ...]) -> AllowedTokens:
    mask = _with(allowed.mask, banned, False)
    if not mask.any() and not allowed.complete:
        return AllowedTokens(
            mask, False, "'banned_tokens' has every token that could continue the text as its grammar demands."
        )
    return AllowedTokens(mask, allowed.complete)


def first_tokens(job: Job, excluded: tuple[int, ...]) -> TokenMask:
    """The tokens of `Job.first`, without early end tokens and those that were taken back if others are left."""
    mask = np.frombuffer(job.first, np.uint32).copy()
    for tokens in (job.end_tokens if job.min_tokens else (), excluded):
        left = _with(mask, tokens, False)
        mask = left if left.any() else mask
    return mask


def constrained(query: SampleTokens, allowed: AllowedTokens) -> SampleTokens | None:
    """The query for one of the allowed tokens; None if the text of its samples ends here.

    If all of them were taken back at this place, one of them is drawn, which shows that none is left.
    """
    mask = next_tokens(allowed, query.job, query.position)
    if mask is None:
        return None
    left = _with(mask, query.excluded, False) if query.excluded else mask
    return msgspec.structs.replace(query, mask=left if left.any() else mask)


def _with(mask: TokenMask, tokens: tuple[int, ...], value: bool) -> TokenMask:
    """A copy of a mask in which the bits of these tokens are `value`. Ids outside the vocabulary are ignored."""
    copy = mask.copy()
    for token in tokens:
        if token < 32 * len(copy):
            bit = np.uint32(1 << token % 32)
            copy[token // 32] = copy[token // 32] | bit if value else copy[token // 32] & ~bit
    return copy

"""Drafts: tokens that a sample will probably generate next, from a text that is known already or from a draft model.

A draft changes no token: the engine accepts a drafted token only if the sampler chooses it too. The length of a draft
follows the acceptance of the sample's earlier drafts and nothing else. Tokens that were computed one by one count as
those that were verified in one pass. So drafts from texts, and what is counted of them, do not depend on the load.

Pure: it depends on tokens alone. The engine proposes drafts with it; the server counts predicted tokens with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

LENGTHS = (8, 16, 32, 64)
"""Tokens of drafts. A verification also generates the token after the draft, which is the first of the next draft. So
drafts that are verified one after the other fill 16, 32, 64, 64, … columns of a matrix product."""

MODEL_LENGTHS = (3, 7, 15)
"""Tokens of drafts of a draft model. With the token before the draft they fill 4, 8 or 16 columns."""

PROBE = 3
"""Tokens of the first draft, and of the first after a rejected token. It is never verified: the tokens that are
computed one by one show whether the sample follows the text. So a text that is not followed costs nothing."""

INDEXED = 2**14
"""The last tokens of a prompt in which n-grams are looked up."""

_NEAR = 16  # places before and after the expected one that are compared, where a pair of tokens occurs often
_COMPARED = 16  # tokens before a place that are compared
_PRIOR = 6.0, 8.0  # accepted and drafted tokens from which the acceptance of a sample's drafts begins
_OWN_PRIOR = 0.0, 2.0  # the same for drafts from its own text
_PROOF = 0.5  # the acceptance that drafts from its own text must reach once before any of them is verified
_MEMORY = 0.8  # the weight of all earlier drafts, against that of the last one
_MODEL_PRIOR = 3.0, 4.0  # the same for a draft model: four drafts without an accepted token end its drafts
_MODEL_MEMORY = 0.95  # longer, because its drafts are short and the end of its drafts is final
_POOR = 0.2  # the acceptance below which a draft model's passes cost more than they gain
# Bits of a token in the key of three tokens: an integer takes less time and memory than a tuple. Ids from 2^20 on, and
# the id 0 where a text begins, can give other tokens the same key, or the same tokens another one. A wrong key costs a
# draft, never a token.
_KEY_BITS = 20
_KEY = (1 << 3 * _KEY_BITS) - 1


class KnownText(Protocol):
    """A text from which drafts are copied."""

    def append(self, token: int) -> None:
        """Record a generated token."""
        ...

    def find(self) -> int | None:
        """The place of the token that probably follows the generated ones; None if they do not occur in the text."""
        ...

    def read(self, place: int, count: int) -> tuple[int, ...]:
        """Up to `count` tokens from a place on."""
        ...

    def settle(self, place: int, accepted: int, drafted: int) -> None:
        """Record that the first `accepted` tokens from a place on were generated, of `drafted` that were no probe."""
        ...


class Draft:
    """The present draft of one sample, and the length of the next.

    `most`: tokens that the sample can still generate. `place`: where the first draft begins; None if it is found after
    the first tokens. `shares`: the accepted and drafted tokens from which the acceptance begins. If none was accepted,
    the drafts must prove themselves (`is_proven`).
    """

    def __init__(
        self, text: KnownText, most: int, place: int | None = None, shares: tuple[float, float] = _PRIOR
    ) -> None:
        self._text = text
        self._most = most
        self._length = LENGTHS[0]
        self._place = place
        self._tokens: tuple[int, ...] = ()
        self._agreed = 0  # tokens of the draft that were generated
        self._probes = True  # whether the draft is a probe
        self._shares = shares  # tokens that were accepted and drafted, later ones with more weight
        self.is_proven = shares[0] > 0  # whether drafts may be verified; tokens are computed one by one before
        self._propose()

    @property
    def rest(self) -> tuple[int, ...]:
        """The tokens of the draft that are not generated yet; none if it is a probe."""
        return () if self._probes else self._tokens[self._agreed :]

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens, except those of probes, that the sample has accepted lately."""
        accepted, drafted = self._shares
        return accepted / drafted

    def append(self, token: int) -> None:
        """Record a generated token, verified or computed alone."""
        self._most -= 1
        self._text.append(token)
        if self._tokens:
            self._compare(token)
        if not self._tokens:
            self._propose()

    def settle(self) -> None:
        """Record the agreement of a draft that is not finished. Call it at the end of the sample."""
        if self._place is not None:
            self._text.settle(self._place, self._agreed, 0)

    def _compare(self, token: int) -> None:
        assert self._place is not None
        agrees = token == self._tokens[self._agreed]
        self._agreed += agrees
        if agrees and self._agreed < len(self._tokens):
            return
        drafted = len(self._tokens)
        self._text.settle(self._place, self._agreed, 0 if self._probes else drafted)
        if agrees or not self._probes:
            self._place += self._agreed + (not agrees)  # one token is often replaced by one other
        else:
            self._place = None
        if self._probes:
            self._length = self._length if agrees else max(self._length // 2, LENGTHS[0])
        else:
            self._shares = self._shares[0] * _MEMORY + self._agreed, self._shares[1] * _MEMORY + drafted
            self.is_proven = self.is_proven or self.acceptance >= _PROOF
            self._length = next_length(LENGTHS, self._length, self._agreed, drafted)
        self._probes = not agrees
        self._tokens, self._agreed = (), 0

    def _propose(self) -> None:
        if self._place is None:
            self._probes = True
            self._place = self._text.find()
        if self._place is not None:
            self._tokens = self._text.read(self._place, min(PROBE if self._probes else self._length, self._most))
        if not self._tokens:
            self._place = None


def next_length(lengths: tuple[int, ...], length: int, agreed: int, drafted: int) -> int:
    """The next of the possible lengths: longer after a draft that agreed, else about as many tokens as agreed."""
    if agreed == drafted:
        return next((each for each in lengths if each > length), lengths[-1])
    return max(each for each in lengths if each <= max(agreed, lengths[0]))


class ModelDraft:
    """The present draft of one sample by a draft model, and the length of the next. The engine computes it on demand.

    `most`: tokens that the sample can still generate.
    """

    is_proven = True  # see `Draft`

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = MODEL_LENGTHS[0]
        self._tokens: tuple[int, ...] = ()
        self._agreed = 0  # tokens of the draft that were generated
        self._shares = _MODEL_PRIOR  # see `Draft`
        self.dropped = False  # whether the model drafts nothing more for the sample

    @property
    def rest(self) -> tuple[int, ...]:
        """The tokens of the draft that are not generated yet."""
        return self._tokens[self._agreed :]

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that the sample has accepted lately."""
        accepted, drafted = self._shares
        return accepted / drafted

    @property
    def wanted(self) -> int:
        """How many tokens the model should draft now; 0 while a draft is left or if the model's drafts are poor."""
        return 0 if self._tokens or self.dropped else min(self._length, self._most - 1)

    def propose(self, tokens: tuple[int, ...]) -> None:
        """Set the draft. No token of an earlier one may be left."""
        self._tokens, self._agreed = tokens, 0

    def append(self, token: int) -> None:
        """Record a generated token, verified or computed alone."""
        self._most -= 1
        if not self._tokens:
            return
        agrees = token == self._tokens[self._agreed]
        self._agreed += agrees
        drafted = len(self._tokens)
        if agrees and self._agreed < drafted:
            return
        accepted, earlier = self._shares
        self._shares = accepted * _MODEL_MEMORY + self._agreed, earlier * _MODEL_MEMORY + drafted
        self._length = next_length(MODEL_LENGTHS, self._length, self._agreed, drafted)
        self.dropped = self.dropped or self.acceptance < _POOR
        self._tokens = ()


class PredictedText:
    """The tokens of a prediction. All samples of a job share it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)

    @cached_property
    def _places(self) -> dict[tuple[int, int], list[int]]:
        """The places after each pair of tokens, in order. Made only when a sample deviates from the prediction."""
        places: dict[tuple[int, int], list[int]] = {}
        for index, pair in enumerate(zip(self.tokens, self.tokens[1:], strict=False)):
            places.setdefault(pair, []).append(index + 2)
        return places

    def find(self, last: Sequence[int], expected: int) -> int | None:
        """The place after the longest text that ends like `last`; of equal ones the place nearest to `expected`."""
        if len(last) < 2:
            return None
        places = self._places.get((last[-2], last[-1]), [])
        middle = bisect_left(places, expected)
        near = places[max(0, middle - _NEAR) : middle + _NEAR]
        return max(near, key=lambda place: (self._equal(place, last), -abs(place - expected)), default=None)

    def _equal(self, place: int, last: Sequence[int]) -> int:
        """How many tokens before a place equal the last ones."""
        count = 0
        while count < min(place, len(last)) and self.tokens[place - 1 - count] == last[-1 - count]:
            count += 1
        return count


class Prediction:
    """The prediction of one sample's text: `KnownText` with counts of what was generated.

    After a deviation it is continued where the last generated tokens occur in it, near the place of the deviation.
    """

    def __init__(self, text: PredictedText) -> None:
        self._text = text
        self._last: deque[int] = deque(maxlen=_COMPARED)
        self._expected = 0  # the end of the part that was generated
        self._drafted: set[int] = set()  # places
        self._accepted: set[int] = set()

    @property
    def accepted(self) -> int:
        """The number of the prediction's tokens that were generated."""
        return len(self._accepted)

    @property
    def rejected(self) -> int:
        """The number of the prediction's tokens that were drafted, except in probes, and not generated."""
        return len(self._drafted - self._accepted)

    def append(self, token: int) -> None:
        """See `KnownText`."""
        self._last.append(token)

    def find(self) -> int | None:
        """See `KnownText`."""
        return self._text.find(self._last, self._expected)

    def read(self, place: int, count: int) -> tuple[int, ...]:
        """See `KnownText`."""
        return self._text.tokens[place : place + count]

    def settle(self, place: int, accepted: int, drafted: int) -> None:
        """See `KnownText`."""
        self._accepted.update(range(place, place + accepted))
        self._drafted.update(range(place, place + drafted))
        if accepted >= PROBE:
            self._expected = place + accepted


def prediction_draft(prediction: Prediction, max_tokens: int) -> Draft:
    """The draft that begins with a prediction's first token, for a sample of up to `max_tokens` tokens."""
    return Draft(prediction, max_tokens, place=0)


class OwnText:
    """A sample's own text as `KnownText`: its prompt and what it has generated. It is found by its last three tokens.

    `prompt_places`: those of `ngram_places` for the prompt; all samples of a job share them.
    """

    def __init__(self, prompt: tuple[int, ...], prompt_places: dict[int, int]) -> None:
        self._prompt = prompt
        self._prompt_places = prompt_places
        self._generated: list[int] = []
        self._places: dict[int, int] = {}
        self._end = len(prompt)
        self._last = 0  # the key of the last three tokens
        for token in prompt[-2:]:
            self._last = self._last << _KEY_BITS | token
        self._found: int | None = None  # the place after the latest earlier occurrence of the last three tokens

    def append(self, token: int) -> None:
        """See `KnownText`. Every step of every sample calls it, so it is short: it takes half a microsecond."""
        self._generated.append(token)
        self._end += 1
        self._last = last = (self._last << _KEY_BITS | token) & _KEY
        self._found = self._places.get(last) or self._prompt_places.get(last)
        self._places[last] = self._end

    def find(self) -> int | None:
        """See `KnownText`."""
        return self._found

    def read(self, place: int, count: int) -> tuple[int, ...]:
        """See `KnownText`. At the end of the text the part from `place` on is repeated."""
        tokens = self._slice(place, min(place + count, self._end))
        return (tokens * (-(-count // len(tokens))))[:count] if tokens else ()

    def settle(self, place: int, accepted: int, drafted: int) -> None:
        """See `KnownText`. Nothing is counted."""

    def _slice(self, start: int, stop: int) -> tuple[int, ...]:
        size = len(self._prompt)
        return self._prompt[start:stop] + tuple(self._generated[max(0, start - size) : max(0, stop - size)])


def ngram_places(prompt: tuple[int, ...]) -> dict[int, int]:
    """For each three tokens in a row among the last `INDEXED` of a prompt, the place after their last occurrence."""
    start = max(0, len(prompt) - INDEXED)
    part = prompt[start:]
    threes = enumerate(zip(part, part[1:], part[2:], strict=False), start + 3)
    return {(first << _KEY_BITS | second) << _KEY_BITS | third: place for place, (first, second, third) in threes}


def own_text_draft(prompt: tuple[int, ...], prompt_places: dict[int, int], max_tokens: int) -> Draft:
    """The drafts of a sample from its own text. `prompt_places`: see `OwnText`."""
    return Draft(OwnText(prompt, prompt_places), max_tokens, shares=_OWN_PRIOR)

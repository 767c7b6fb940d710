"""The waist: what `completion/` asks of an engine, and what comes back.

Tokens only. Nothing here knows text, `echo`, `stop`, `suffix`, JSON or HTTP, and nothing here knows a library
that runs models. All values are plain and frozen, so that they cross a process unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

End = Literal["stop", "length"]


class Value(msgspec.Struct, frozen=True, array_like=True):
    """Base of everything that crosses the waist: immutable, compared by content, compact on the wire."""


class Sampling(Value, frozen=True):
    """How the next token is chosen from a row of logits. Nothing is optional."""

    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]


class Job(Value, frozen=True):
    """One prompt to be continued `samples` times.

    `alternatives` is how many of the likeliest tokens to report beside each token; None asks for no log
    probabilities at all. `score` asks for the prompt's own tokens too, from the second on. `ends` are the tokens
    that end a sample. `key` (16 bytes) is where all its randomness comes from: see `core.sampler.uniform`.
    """

    prompt: tuple[int, ...]
    samples: int
    max_tokens: int
    sampling: Sampling
    ends: tuple[int, ...]
    key: bytes
    alternatives: int | None = None
    score: bool = False


class Token(Value, frozen=True):
    """A token with its natural-log probability under the unmodified model, and the likeliest ones, best first.

    `logprob` is None where the job asked for no log probabilities.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Step(Value, frozen=True):
    """What one forward pass brought one job.

    `scored` are further tokens of the prompt, in order; `sampled` are pairs of sample and new token; `ended` are
    the samples that this pass finished.
    """

    scored: tuple[Token, ...] = ()
    sampled: tuple[tuple[int, Token], ...] = ()
    ended: tuple[tuple[int, End], ...] = ()


class Load(Value, frozen=True):
    """How busy an engine is, in sequences. `waiting` counts samples that have no sequence yet."""

    sequences: int = 0
    running: int = 0
    waiting: int = 0


class Infill(Value, frozen=True):
    """A model's own tokens for fill-in-the-middle."""

    prefix: int
    suffix: int
    middle: int


class Card(Value, frozen=True):
    """Facts about a loaded model.

    `pieces[id]` are the bytes that a token stands for, special tokens by their name; an id without text has b"".
    `longest` bounds the bytes of one token of a tokenized text, 0 where the tokenizer can drop or fold text.
    `fingerprint` names everything that could change a number that the engine returns.
    """

    architecture: str
    parameters: int
    context: int
    sequences: int
    pieces: tuple[bytes, ...]
    special: tuple[int, ...]
    ends: tuple[int, ...]
    bos: int | None
    eos: int | None
    add_bos: bool
    space_prefix: bool
    longest: int
    infill: Infill | None
    fingerprint: str


class Run(Protocol):
    """One job under way. Iteration ends when every sample has ended."""

    def __aiter__(self) -> AsyncIterator[Step]:
        """Yield steps. Raises `EngineError` if the engine cannot finish."""
        ...

    def drop(self, sample: int) -> None:
        """End one sample now: its text is complete."""
        ...

    def close(self) -> None:
        """End the whole job now: nobody waits for it. Harmless on a finished run."""
        ...


class Engine(Protocol):
    """Whatever turns jobs into steps."""

    @property
    def card(self) -> Card:
        """Facts about the model."""
        ...

    def start(self, job: Job) -> Run:
        """Accept a job. Raises `Overloaded` when the queue is full."""
        ...

    async def tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        """Tokens of a text, without BOS. `special`: text that spells a special token becomes that token."""
        ...

"""The waist: what `completion/` asks of an engine, and what comes back.

Tokens only. Nothing here knows text, `echo`, `stop`, `suffix`, JSON or HTTP, and nothing here knows a library
that runs models. All values are plain and frozen, so that they cross a process unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length"]

TOKEN_BYTES, ALTERNATIVE_BYTES = 160, 120
"""About how much memory CPython takes for a reported token, and for each alternative that is reported with it."""
Promise = Literal["exact", "reproducible", "none"]
"""What an engine promises of its numbers. "reproducible": they depend on the request alone, not on who else is there.
"exact": besides, a token's are the same whether it was read or generated."""

BATCH_CLIENT = " batch"


class Value(msgspec.Struct, frozen=True, array_like=True):
    """Base of everything that crosses the waist: immutable, compared by content, compact on the wire."""


class Sampling(Value, frozen=True):
    """How the next token is chosen from a row of logits. `top_k` 0 and the other defaults change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class Job(Value, frozen=True):
    """One prompt to be continued `samples` times.

    `end_tokens` are the tokens that end a sample; they are banned from its first `min_tokens` tokens. `alternatives` is
    how many of the likeliest tokens to report beside each token; None asks for no log probabilities at all.
    `prompt_alternatives` asks the same of the prompt's own tokens, from the second on. `key` (16 bytes) is where
    all randomness comes from: see `core.sampler.seed_of`. What was computed for one `namespace` is never used for
    another. `client` names the client: clients that wait get equal shares. If it ends with `BATCH_CLIENT`, the job is a
    row of a batch of the client.
    """

    prompt: tuple[int, ...]
    samples: int
    max_tokens: int
    sampling: Sampling
    end_tokens: tuple[int, ...]
    key: bytes
    min_tokens: int = 0
    alternatives: int | None = None
    prompt_alternatives: int | None = None
    namespace: str = ""
    client: str = ""


class Token(Value, frozen=True, gc=False):
    """A token with its natural-log probability under the unmodified model, and the likeliest ones, best first.

    `logprob` is None where the job asked for no log probabilities. `rank` is 1 for the likeliest token; known for
    tokens of the prompt, else 0. The garbage collector does not visit it: it cannot be part of a cycle, and a large
    answer has so many that a collection would stop the process for a long time.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0

    @property
    def size(self) -> int:
        """About how many bytes of memory it takes."""
        return TOKEN_BYTES + ALTERNATIVE_BYTES * len(self.top)


class Step(Value, frozen=True):
    """What one forward pass brought one job.

    `scored` are further tokens of the prompt, in order; `sampled` are pairs of sample and new token; `ended` are
    the samples that this pass finished. `cached`, in a job's first step: how many of its prompt's tokens had been
    computed for others before. `failed`: its logits were not finite, and the job has ended.
    """

    scored: tuple[Token, ...] = ()
    sampled: tuple[tuple[int, Token], ...] = ()
    ended: tuple[tuple[int, FinishReason], ...] = ()
    cached: int = 0
    failed: bool = False

    @property
    def size(self) -> int:
        """About how many bytes of memory its tokens take: tokens of a job have equally many alternatives."""
        scored = len(self.scored) * self.scored[0].size if self.scored else 0
        return scored + (len(self.sampled) * self.sampled[0][1].size if self.sampled else 0)


def scored_positions(start: int, stop: int) -> slice:
    """The positions of the tokens that the logits rows at the positions `start` to `stop - 1` score.

    The logits row at position i - 1 predicts the token at position i, so it gives that token's score. The first token
    has no score. In a list of a prompt's scores, the score with index j belongs to the token at position j + 1.
    """
    return slice(start + 1, stop + 1)


def score_count(tokens: int) -> int:
    """How many scores the first `tokens` tokens of a prompt have: one for each token but the first."""
    return max(tokens - 1, 0)


class Load(Value, frozen=True):
    """How busy an engine is, in sequences. `waiting` counts samples that have no sequence yet."""

    sequences: int = 0
    running: int = 0
    waiting: int = 0


class PassStats(Value, frozen=True):
    """What an engine's last pass computed, and how full it is.

    `tokens` 0: no pass was made. `prompt`: they were a piece of a prompt, else one of each running sequence. `seconds`
    that the pass took. `used_tokens`: tokens whose state running sequences have; `cached_tokens`: those that the others
    left behind.
    """

    prompt: bool = False
    tokens: int = 0
    seconds: float = 0.0
    used_tokens: int = 0
    cached_tokens: int = 0


class InfillTokens(Value, frozen=True):
    """A model's own tokens for fill-in-the-middle."""

    prefix: int
    suffix: int
    middle: int


class ModelInfo(Value, frozen=True):
    """Facts about a loaded model.

    `pieces[id]` are the bytes that a token stands for, special tokens by their name; an id without text has b"".
    `longest_token` bounds the bytes of one token of a tokenized text, 0 where the tokenizer can drop or fold text.
    `fingerprint` names everything that could change a number that the engine returns; `promise` what could not.
    `slow_runs`: a text may have at most so many characters of a class (a regular expression) in a row, since the
    tokenizer's time is quadratic in their number.
    """

    parameters: int
    context: int
    sequences: int
    pieces: tuple[bytes, ...]
    end_tokens: tuple[int, ...]
    bos: int | None
    eos: int | None
    add_bos: bool
    space_prefix: bool
    longest_token: int
    infill: InfillTokens | None
    fingerprint: str
    promise: Promise = "none"
    slow_runs: tuple[str, int] | None = None


class JobHandle(Protocol):
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

    def pause(self) -> None:
        """Compute and send nothing more of this job for now: its reader is far behind. Other jobs go on.

        What was on its way still arrives. Harmless on a finished run.
        """
        ...

    def resume(self) -> None:
        """Go on with a paused job."""
        ...


class Engine(Protocol):
    """Whatever turns jobs into steps."""

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model."""
        ...

    def start(self, job: Job) -> JobHandle:
        """Accept a job. Raises `Overloaded` when the queue is full."""
        ...

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        """Tokens of a text, without BOS. `special`: text that spells a special token becomes that token.

        Clients are served in turn. Raises `RequestError` where the text is too long for the tokenizer.
        """
        ...

"""The interface between `completion/` and an engine: jobs go in, steps come out.

The interface handles token ids. It must not depend on text processing, `echo`, `stop`, `suffix`, JSON or HTTP, nor on
a library that runs models. All values are immutable structs, so they pass between processes unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

import msgspec

from afterword.engine.token_row import ReportedAt, TokenRow, is_packed

FinishReason = Literal["stop", "length", "repetition"]
GrammarKind = Literal["json", "regex", "choice", "lark", "gbnf"]

TOKEN_BYTES, ALTERNATIVE_BYTES = 160, 120
"""Approximate bytes of memory that CPython uses for one reported token, and for each alternative reported with it."""
Promise = Literal["exact", "reproducible", "none"]
"""What an engine guarantees about its numbers. "reproducible": they depend on the request alone, not on other requests.
"exact": in addition, a token has the same numbers whether it was part of the prompt or generated."""

MAX_TAIL = 20
"""The most tokens after the first one of a breaker of DRY, as in llama.cpp."""

BATCH_CLIENT = " batch"
"""Suffix of `Job.client` for jobs that are lines of a batch."""


class Value(msgspec.Struct, frozen=True, array_like=True):
    """Base class of all values that pass between server and worker: immutable, compared by content, sent as arrays."""


class Dry(Value, frozen=True):
    """The sampler DRY: penalties for tokens that would continue a repetition of `allowed_length` tokens or more.

    The penalty is `multiplier` times `base` to the power of the tokens beyond `allowed_length`. Repetitions are
    searched in the last `last_n` tokens of prompt and sample; -1: in all. They end at breakers. `breakers`: one bit for
    each token id, the lowest first: the tokens that contain a breaker. `sequences`: breakers of several tokens: the ids
    that the first token may have, and the 1 to `MAX_TAIL` tokens after it.
    """

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: bytes = b""
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


INFILL_MIN_P = 0.2
"""llama.cpp's sampler `infill` keeps tokens with at least this probability; here it is a fraction of the highest."""


class SamplerChain(Value, frozen=True):
    """Samplers, with llama-server's names, in the order in which they are applied; others are not applied.

    `top_n_sigma` 0 and `typical_p` 1 change nothing. `mirostat` 1 or 2, else an `adaptive_target` from 0: Mirostat or
    adaptive-p draws the token after all others. `allowed`: one bit for each token id, the lowest first: the tokens that
    may be sampled; empty: all. `min_keep`: the fewest tokens that `top_p`, `min_p`, `typ_p` and `xtc` leave. `last_n`:
    penalties count this many last tokens of prompt and sample, -1: all; None: as in the kernel.
    """

    order: tuple[str, ...]
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry: Dry | None = None
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    allowed: bytes = b""
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    last_n: int | None = None


class Sampling(Value, frozen=True):
    """How the next token is sampled from a row of logits. The defaults (`top_k` 0 included) change nothing.

    `chain`: further samplers, and the order of all of them; None: the samplers of this value in the kernel's order.
    It is sent as an array and is constructed by position in tests: append new fields last.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    chain: SamplerChain | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the next token depends on how often each token was generated."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


class Grammar(Value, frozen=True):
    """What the generated text must be.

    `text`: a JSON Schema, a regular expression, a JSON array of texts, or a grammar in Lark's or llama.cpp's notation.
    `field`: the request field that it came from, for error messages.
    """

    kind: GrammarKind
    text: str
    field: str


class BannedText(Value, frozen=True):
    """Phrases that the text of a sample must not contain: `exact` as they are, `folded` in any case.

    `silent`: tokens that have no text in the response. `begun`: the first bytes of the text, which end the prompt.
    """

    exact: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    silent: tuple[int, ...] = ()
    begun: bytes = b""


class RepetitionDetection(Value, frozen=True):
    """Ends a sample whose last tokens are a pattern of `min_size` to `max_size` tokens, `min_count` times in a row."""

    max_size: int
    min_size: int
    min_count: int


class Job(Value, frozen=True):
    """One prompt to be continued `samples` times.

    `end_tokens`: token ids that end a sample. The sampler does not choose them for the first `min_tokens` tokens.
    `alternatives`: how many of the most likely tokens to report with each generated token; None: report no log
    probabilities. `prompt_alternatives`: the same for the prompt's tokens, from the second on. `reported`: ids that are
    reported instead of the most likely ones; the alternatives are then as many as these. `reported_at`: the same for
    each position of prompt and sample by itself; the alternatives are the most of a position. `key` (16 bytes): the
    source of all randomness, see `core.sampler.seed_of`. `namespace`: jobs of different namespaces do not share the
    prefix cache. `client`: the client's name; the scheduler gives equal shares to waiting clients. If the name ends
    with `BATCH_CLIENT`, the job is a line of one of the client's batches. `prediction`: tokens that the client expects;
    they change how fast samples are generated, and nothing else. `grammar`: what the text of every sample must be.
    `banned`: token ids that are never sampled. `banned_text`: what the text of no sample contains.
    `healed`: the bytes with which the first generated token must begin, because the prompt's last token was left out;
    they belong to the prompt's text. `first`: one bit for each token that begins so, as in a mask.
    `repetition_detection`: which loops end a sample, after `min_tokens` tokens. `priority`: of the waiting jobs of one
    client those with the lowest number are first. `processed`: generated tokens have the log probabilities of the
    distribution that they are drawn from, not of the model. `whole`: an engine may report several tokens together.
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
    prediction: tuple[int, ...] = ()
    reported: tuple[int, ...] = ()
    grammar: Grammar | None = None
    banned: tuple[int, ...] = ()
    banned_text: BannedText | None = None
    healed: bytes = b""
    first: bytes = b""
    repetition_detection: RepetitionDetection | None = None
    priority: int = 0
    reported_at: ReportedAt | None = None
    processed: bool = False
    whole: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether any of its tokens has a `TokenRow`."""
        chosen = self.reported or self.reported_at
        return is_packed(self.alternatives, chosen) or is_packed(self.prompt_alternatives, chosen)


class Token(Value, frozen=True, gc=False):
    """A token with its log probability under the unmodified model, and the alternatives, most likely first, or those of
    `Job.reported` in their order. More than `token_row.MAX_LISTED` most likely ones are in `row`, and `top` is empty.

    `logprob` is None if the job requested no log probabilities. `rank` is 1 for the most likely token; it is set for
    prompt tokens and 0 for generated ones. `gc=False` excludes tokens from garbage collection: a token cannot be part
    of a cycle, and a collection over the many tokens of a large response would stop the process for a long time.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0
    row: TokenRow | None = None

    @property
    def size(self) -> int:
        """Approximate bytes of memory."""
        return TOKEN_BYTES + ALTERNATIVE_BYTES * len(self.top) + (self.row.size if self.row else 0)


class Step(Value, frozen=True):
    """What one forward pass produced for one job.

    `scored`: the next tokens of the prompt, in order. `sampled`: pairs of a sample's index and its new token.
    `ended`: the samples that this pass finished, with the reason. `cached`, in one of the steps up to a job's first
    token: how many prompt tokens came from the prefix cache. `failed`: the job has ended, because of its grammar if
    there is an `error` (a sentence for the client), else because its logits were not finite. `refused`: the library
    that computes has refused the job, and the job has ended. `busy`: with `failed`, its grammar cannot be compiled now.
    `compiling`: the worker now begins (True) or has ended (False) to compile the job's grammar; the step has nothing
    else. `taken_back`: how many tokens were computed that are not part of any sample, because of `Job.banned_text`.
    `lost`: another server has broken off the job, and the job has ended. `late`: the job has waited too long for that
    server, without any token, and has ended.
    """

    scored: tuple[Token, ...] = ()
    sampled: tuple[tuple[int, Token], ...] = ()
    ended: tuple[tuple[int, FinishReason], ...] = ()
    cached: int = 0
    failed: bool = False
    refused: bool = False
    error: str = ""
    compiling: bool | None = None
    busy: bool = False
    taken_back: int = 0
    lost: bool = False
    late: bool = False

    @property
    def ends_job(self) -> bool:
        """Whether the job has ended with an error."""
        return self.failed or self.refused or self.lost or self.late

    @property
    def size(self) -> int:
        """Approximate bytes of memory of the tokens. All scores, and all other tokens, have rows of one size."""
        if len(self.sampled) == 1 and not self.scored:  # most steps
            return self.sampled[0][1].size
        samples = [token for _, token in self.sampled]
        listed = sum([len(token.top) for token in (*self.scored, *samples)])  # twice as fast as the sum of sizes
        rows = sum(len(part) * row.size for part in (self.scored, samples) if part and (row := part[-1].row))
        return TOKEN_BYTES * (len(self.scored) + len(samples)) + ALTERNATIVE_BYTES * listed + rows


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
    """The load of an engine: number of slots (`sequences`), slots in use, and samples that wait for a slot."""

    sequences: int = 0
    running: int = 0
    waiting: int = 0


class PassStats(Value, frozen=True):
    """What an engine's last forward pass computed, and how full its slots are.

    `tokens`: number of tokens computed; 0: there was no pass. `prompt`: True for a prefill, False for a decode.
    `seconds`: duration of the pass. `used_tokens`: tokens in the slots of running sequences. `cached_tokens`: tokens in
    all other slots, left by ended sequences. `drafted_tokens`: tokens of a draft that the pass verified;
    `accepted_tokens`: those that were generated.
    """

    prompt: bool = False
    tokens: int = 0
    seconds: float = 0.0
    used_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class InfillLayout(Value, frozen=True):
    """How a model was trained to fill a gap.

    `parts`: the prompt, in order: ids of tokens, "prefix" and "suffix". `family`: see `llama.infill_families`; "custom"
    for the operator's template, "other" for tokens of no known family. `with_files`: the prompt where other files come
    first, with "files" for them; empty if the model was trained without other files. `file`: each of these files: ids
    of tokens and "file". `ends`: tokens that end the middle beside the model's end tokens.
    """

    family: str
    parts: tuple[int | str, ...]
    with_files: tuple[int | str, ...] = ()
    file: tuple[int | str, ...] = ()
    ends: tuple[int, ...] = ()


class JobLimits(Value, frozen=True):
    """What an engine computes exactly, if that is not everything. Other jobs must not be started.

    `fields`: the names of fields of `Job` and `Sampling` that may have another value than their default.
    `min_temperature`, `max_temperature`: of `Sampling.temperature`, which may be 0 too. `max_alternatives`,
    `max_prompt_alternatives`: None for no limit. `banned`: tokens that the engine does not sample for the first
    `min_tokens` tokens, also if they are not among `end_tokens`.
    """

    fields: tuple[str, ...]
    min_temperature: float
    max_temperature: float
    max_alternatives: int | None = None
    max_prompt_alternatives: int | None = None
    banned: tuple[int, ...] = ()


class ModelInfo(Value, frozen=True):
    """Facts about a loaded model.

    `pieces[id]`: the bytes of a token's text; for a special token its name; b"" for an id without text.
    `longest_token`: upper bound of the text bytes that one token can cover; 0 if the tokenizer can drop or fold text.
    `fingerprint`: a hash of everything that can change a number that the engine returns. `promise`: what the engine
    guarantees about its numbers. `slow_runs`: a regular expression for a class of characters, and the most of them that
    a text may have in a row. The tokenizer's time is quadratic in the length of such a run. `capacity`: the most tokens
    of all sequences together; None if every sequence can be full. `verifies_drafts`: whether several tokens that were
    drafted can be verified in one pass. `job_limits`: None if the engine computes every job. `special`: ids of control
    tokens and of the unknown token. `takes_back`: whether generated tokens can be taken back (`Job.banned_text`).
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
    infill: InfillLayout | None
    fingerprint: str
    promise: Promise = "none"
    slow_runs: tuple[str, int] | None = None
    capacity: int | None = None
    verifies_drafts: bool = False
    job_limits: JobLimits | None = None
    special: tuple[int, ...] = ()
    takes_back: bool = True


class JobHandle(Protocol):
    """An accepted job. Iteration yields its steps and ends when every sample has ended."""

    def __aiter__(self) -> AsyncIterator[Step]:
        """Yield steps. Raises `EngineError` if the engine cannot finish."""

    def deliver_to(self, receive: Callable[[Step | Exception | None], None]) -> None:
        """Call `receive` with each step when it arrives, and once with an error, or with None at the end.

        It is an alternative to the iteration, for which a task would have to wake up for each step.
        """

    def drop(self, sample: int) -> None:
        """End one sample now, because its text is complete."""

    def close(self) -> None:
        """End the whole job now, because its client no longer waits. No effect on a finished job."""

    def pause(self) -> None:
        """Compute and send no steps of this job until `resume`: its client reads too slowly. Sent ones still arrive."""

    def resume(self) -> None:
        """Continue a paused job."""


class Engine(Protocol):
    """A component that turns jobs into steps."""

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the loaded model."""

    def start(self, job: Job) -> JobHandle:
        """Accept a job. Raises `Overloaded` when the queue is full."""

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        """Tokenize a text, without BOS. `special`: text that spells a special token becomes that token.

        Clients take turns. Raises `RequestError` if the text is too long for the tokenizer.
        """

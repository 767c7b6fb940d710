"""Makes a `Plan` from a request, the model's facts and the tokens of its texts.

A plan has a value for every default, limit and seed. Later code finds no optional fields and no errors of the client.
This module checks what depends on the model: token ids, the context length and infill. It does no I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from afterword.completion.engine_limits import check_job
from afterword.completion.fields import Prompt
from afterword.completion.infill import NO_RULES, InfillPrompt, InfillRules, infill_prompt, layout_of
from afterword.completion.infill_trim import InfillTexts
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.completion.sampler_fields import sampling_of
from afterword.completion.text_stream import StopStrings, incomplete_character
from afterword.completion.token_healing import healed
from afterword.completion.vocabulary_fields import (
    banned_text,
    check_allowed,
    check_ids,
    reported_at,
    shown_ends,
    truncated,
)
from afterword.engine.most_sampled import most_sampled_for
from afterword.engine.protocol import Job, ModelInfo
from afterword.engine.token_row import is_packed
from afterword.errors import RequestError

_MORE = 3  # candidates for a suffix beyond `n`
_RESERVED = 256  # tokens that stay free for a middle whose length is not limited


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt of a request.

    `text`: the prompt as it is echoed. `hidden_tokens`: how many leading tokens of `job.prompt` are not echoed.
    `given`: the ranges of `job.prompt` that the client sent, including suffix and files: pairs of the first position
    and the one after the last. The server added the other tokens. `suffix`: the tokens by which the candidates are
    ranked, for models without infill tokens (`rerank`).
    """

    job: Job
    text: str
    hidden_tokens: int
    given: tuple[tuple[int, int], ...]
    suffix: tuple[int, ...] = ()

    def spelling(self, pieces: Sequence[bytes]) -> bytes:
        """The bytes of the prompt's tokens that are echoed. With some tokenizers they are not those of `text`."""
        return b"".join(pieces[token] for token in self.job.prompt[self.hidden_tokens :]) + self.job.healed

    def pending_bytes(self, pieces: Sequence[bytes]) -> bytes:
        """The last bytes of the echoed prompt, if the completion can continue the character that they begin."""
        if not self.text.endswith("\ufffd"):
            return b""
        spelling = self.spelling(pieces)
        return incomplete_character(spelling) if spelling.decode("utf-8", "replace") == self.text else b""

    @property
    def scored_tokens(self) -> int:
        """The tokens of the suffix, counted once for each candidate that they rank."""
        return len(self.suffix) * self.job.samples

    @property
    def billed_tokens(self) -> int:
        """The number of tokens that the client sent, as far as the model reads them."""
        return self.billed_within(len(self.job.prompt))

    def billed_within(self, count: int) -> int:
        """How many of the first `count` tokens of `job.prompt` the client sent."""
        return sum(max(0, min(stop, count) - start) for start, stop in self.given)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole request to the model with this `fingerprint`. Choices are numbered prompt by prompt, `n` for each.

    `logprobs`, `prompt_logprobs`: numbers of alternatives. `reports_ids`: the request chose their ids. `tokens_as_ids`:
    tokens are named by their ids. `silent`: tokens that have no text in a choice. `shown_ends`: end tokens that have.
    `streams`: deltas are sent when they are made.
    """

    fingerprint: str
    prompts: tuple[PromptPlan, ...]
    n: int
    best_of: int
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool
    stop: StopStrings
    pieces: tuple[bytes, ...]
    strip_space: bool
    reports_ids: bool = False
    tokens_as_ids: bool = False
    silent: frozenset[int] = frozenset()
    shown_ends: frozenset[int] = frozenset()
    streams: bool = False

    @property
    def prompt_by_row(self) -> bool:
        """Whether the prompt's log probabilities are sent token by token, see `prompt_rows`."""
        return self.streams and is_packed(self.prompts[0].job.prompt_alternatives, self.reports_ids)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens that the client sent in all prompts; each prompt counts once, see `scored_tokens`."""
        return sum(prompt.billed_tokens + prompt.scored_tokens for prompt in self.prompts)

    @property
    def reranks(self) -> bool:
        """Whether the candidates are ranked by a suffix."""
        return any(prompt.suffix for prompt in self.prompts)

    @property
    def max_total_tokens(self) -> int:
        """The largest number of tokens that the request can read and generate, so the most that it can be charged."""
        return self.prompt_tokens + self.max_generated_tokens

    @property
    def max_generated_tokens(self) -> int:
        """The largest number of tokens that all candidates can have together, those that are taken back included."""
        return sum(most_sampled_for(prompt.job) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The token ids of a request's texts.

    `prompts`, `files`: one tuple for each; the client's ids where it sent ids.
    `rules`: those by which the plan lays out infill prompts. `inside`, `sequences`: the breakers of DRY, see
    `engine.protocol.Dry`. `first`: see `token_healing.first_tokens`.
    """

    prompts: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...]
    files: tuple[tuple[int, ...], ...] = ()
    prediction: tuple[int, ...] = ()
    rules: InfillRules = NO_RULES
    inside: bytes = b""
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    first: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """The client of a request, for fair shares and for the prefix cache.

    Two clients use the same prefix cache only if both have `shares_cache`. `queue`: the name of a separate queue of the
    client, `"batch"` for batch lines; empty for its direct requests. The engine gives each queue its own share.
    `cache_name`: a name that no other client has, not even after a restart of the server.
    """

    name: str = ""
    shares_cache: bool = False
    queue: str = ""
    cache_name: str = ""

    @property
    def job_client(self) -> str:
        """The name of the queue's client in jobs: `Job.client`."""
        return f"{self.name} {self.queue}".rstrip()


def check_lengths(request: CompletionRequest, model_info: ModelInfo) -> None:
    """Refuse texts that cannot fit into the context, before they are tokenized. Raises `RequestError`.

    No token spells more than `model_info.longest_token` bytes. So a text has at least its size in bytes divided by that
    number of tokens.
    """
    if not model_info.longest_token or request.truncate_prompt_tokens is not None:
        return
    # not once for each prompt: thousands of prompts with as many files would stop the event loop for seconds
    shared = sum(len(text.encode()) for text in (request.suffix or "", *(file.text for file in request.input_extra)))
    for prompt in request.prompt:
        size = shared + (len(prompt.encode()) if isinstance(prompt, str) else 0)
        # the layout has at least one token for each file
        fewest = size // model_info.longest_token + len(request.input_extra)
        if fewest > model_info.context:
            raise too_long(model_info, fewest, request.max_tokens)


def check_candidates(plan: Plan, limits: RequestLimits) -> None:
    """Refuse a plan with more candidates or generated tokens than a request can have. Raises `RequestError`.

    `request.parse` checks the numbers in the request. Middles without infill tokens have more candidates than these.
    """
    candidates = sum(prompt.job.samples for prompt in plan.prompts)
    if candidates > limits.max_completions:
        raise RequestError(
            f"The server would generate {candidates} completions, from which it chooses, but a request can have at "
            f"most {limits.max_completions} in total.",
            param="n",
        )
    if plan.max_generated_tokens > limits.max_request_tokens:
        raise RequestError(
            f"The server would generate up to {plan.max_generated_tokens} tokens, those of completions included from "
            f"which it chooses, but a request can have at most {limits.max_request_tokens} in total.",
            param="max_tokens",
        )


def make_plan(
    request: CompletionRequest,
    model_info: ModelInfo,
    tokens: Tokenized,
    entropy: int,
    caller: ClientIdentity | None = None,
) -> Plan:
    """Make the plan of a request. `entropy` (64 bits) seeds a request without a seed. Raises `RequestError`."""
    caller = caller or ClientIdentity()
    rules = tokens.rules
    check_ids(request, model_info)
    # Of all prompts equally: `infill_trim` may leave the suffix to some of them only.
    reranks = bool(tokens.suffix and request.max_tokens) and model_info.infill is None
    candidates = max(request.candidates, request.n + _MORE) if reranks else request.candidates
    prompts = []
    end_tokens = _end_tokens(request, model_info, rules)
    check_allowed(request, model_info, end_tokens)
    banned = banned_text(request, model_info, end_tokens) if request.max_tokens else None
    sampling = sampling_of(request, len(model_info.pieces), tokens.inside, tokens.sequences)
    for index, (given, whole) in enumerate(zip(request.prompt, tokens.prompts, strict=True)):
        ids = truncated(request, model_info, given, whole)
        laid_out = _laid_out(request, model_info, given, InfillTexts(ids, tokens.suffix, tokens.files), rules)
        left_out = healed(request, model_info, laid_out.ids, ids, tokens.first)
        prompt = laid_out.ids[:-1] if left_out else laid_out.ids
        suffix = laid_out.suffix if request.max_tokens else ()
        max_tokens = _max_tokens(request, model_info, len(prompt) + len(suffix), rules, candidates)
        job = Job(
            prompt=prompt,
            samples=candidates,
            max_tokens=max_tokens,
            sampling=sampling,
            end_tokens=end_tokens,
            key=_sampling_key(entropy if request.seed is None else request.seed, index),
            min_tokens=request.min_tokens,
            alternatives=_alternatives(request, candidates),
            # with scores of the prompt, those of the same prompt with a suffix need not compute it again
            prompt_alternatives=(_prompt_alternatives(request) or 0) if reranks else _prompt_alternatives(request),
            namespace=_namespace(caller, request.cache_salt),
            client=caller.job_client,
            prediction=tokens.prediction,
            reported=request.reported_ids,
            reported_at=reported_at(request, len(prompt)),
            processed=request.logprobs_mode == "processed_logprobs" and request.logprobs is not None,
            grammar=next(iter(request.constraints), None) if max_tokens else None,
            banned=request.banned_ids,
            banned_text=banned,
            priority=request.priority,
            healed=left_out,
            repetition_detection=request.repetition_detection if max_tokens else None,
            first=tokens.first.get(left_out, b""),
            whole=not (request.stream or request.stop or rules.ends_texts),  # what ends a text must do so at once
        )
        check_job(job, model_info)
        text = given if isinstance(given, str) and ids == whole else _decode(model_info, ids)
        prompts.append(PromptPlan(job, text, laid_out.before, laid_out.given, suffix))
        if banned and request.echo:  # else the text begins after the bytes of the prompt
            begun = msgspec.structs.replace(banned, begun=prompts[-1].pending_bytes(model_info.pieces))
            prompts[-1] = replace(prompts[-1], job=msgspec.structs.replace(job, banned_text=begun))
    return Plan(
        fingerprint=model_info.fingerprint,
        prompts=tuple(prompts),
        n=request.n,
        best_of=max(prompt.job.samples for prompt in prompts),
        echo=request.echo,
        logprobs=_count(request, request.logprobs),
        prompt_logprobs=_count(request, request.prompt_logprobs),
        return_token_ids=request.return_token_ids,
        stop=StopStrings.prepare(request.stop, request.include_stop_str_in_output),
        pieces=model_info.pieces,
        strip_space=model_info.space_prefix,
        reports_ids=bool(request.logprob_token_ids),
        tokens_as_ids=request.return_tokens_as_token_ids,
        silent=frozenset(model_info.special if request.skip_special_tokens else ()),
        shown_ends=shown_ends(request, model_info, end_tokens),
        streams=request.stream and not reranks,
    )


def _laid_out(
    request: CompletionRequest, model_info: ModelInfo, given: Prompt, texts: InfillTexts, rules: InfillRules
) -> InfillPrompt:
    """The tokens that the model reads, with the layout of infill prompts if the request asks for it."""
    ids = texts.prefix
    add = request.add_special_tokens
    if add is None:  # token ids are read as they are: they are how a client says exactly what the model reads
        add = not isinstance(given, tuple)
    bos = bos_before(model_info, ids, add)
    if not rules.apply_to(request):
        start = bos if ids else _document_start(model_info)
        return InfillPrompt(start + ids, len(start), ((len(start), len(start) + len(ids)),))
    own = ids[:1] if isinstance(given, str) and model_info.add_bos and ids[:1] == (model_info.bos,) else ()
    first = bos + own
    room = _room(request, model_info, rules) - len(first) if rules.trim else None
    rest = InfillTexts(ids[len(own) :], texts.suffix, texts.files)
    inner = infill_prompt(layout_of(request, model_info, rules), rest, room, model_info.pieces)
    sent = [(len(bos), len(first))] if own else []
    sent += [(start + len(first), stop + len(first)) for start, stop in inner.given]
    return InfillPrompt(first + inner.ids, len(bos) + inner.before, tuple(sent), inner.suffix)


def _room(request: CompletionRequest, model_info: ModelInfo, rules: InfillRules) -> int:
    """The most tokens that an infill prompt may have where what is too long is left out."""
    # With `fill_context` not `max_tokens`: a request that only fills the prefix cache is cut like the next one.
    wanted = min(_RESERVED, model_info.context // 4) if rules.fill_context else request.max_tokens
    return model_info.context - wanted


def _max_tokens(
    request: CompletionRequest, model_info: ModelInfo, prompt: int, rules: InfillRules, candidates: int
) -> int:
    """`Job.max_tokens`. Raises `RequestError` if a prompt of `prompt` tokens leaves no space for it."""
    room = model_info.context - prompt
    if rules.fill_context and room >= min(1, request.max_tokens):
        return min(request.max_tokens, room, rules.most_tokens // candidates)
    if request.max_tokens > room:
        raise too_long(model_info, prompt, 1 if rules.fill_context else request.max_tokens)
    return request.max_tokens


def _end_tokens(request: CompletionRequest, model_info: ModelInfo, rules: InfillRules) -> tuple[int, ...]:
    """`Job.end_tokens`. A middle also ends before the tokens of the layout."""
    own = () if request.ignore_eos else model_info.end_tokens
    if rules.apply_to(request) and not request.ignore_eos:
        own += tuple(token for token in layout_of(request, model_info, rules).ends if token not in own)
    return own + request.stop_token_ids


def bos_before(model_info: ModelInfo, ids: tuple[int, ...], add: bool) -> tuple[int, ...]:
    """The BOS to put before the tokens of a prompt, as a tuple. Empty without `add`, or if `ids` begins with BOS."""
    if not (add and model_info.add_bos) or model_info.bos is None or ids[:1] == (model_info.bos,):
        return ()
    return (model_info.bos,)


def _document_start(model_info: ModelInfo) -> tuple[int, ...]:
    """The token that an empty prompt continues from: BOS, or else the EOS that ends the document before."""
    token = model_info.eos if model_info.bos is None else model_info.bos
    if token is None:
        raise RequestError(
            "The prompt cannot be empty: this model has neither a BOS nor an EOS token to start a document with.",
            param="prompt",
        )
    return (token,)


def _alternatives(request: CompletionRequest, candidates: int) -> int | None:
    """`Job.alternatives`. Candidates are ranked by their log probabilities, so `best_of` above `n` requires them."""
    if request.logprobs is not None:
        return _count(request, request.logprobs)
    return 0 if candidates > request.n else None


def _prompt_alternatives(request: CompletionRequest) -> int | None:
    """`Job.prompt_alternatives`: the larger of what `echo` with `logprobs` and `prompt_logprobs` request."""
    echoed = request.logprobs if request.echo else None
    wanted = [count for count in (echoed, request.prompt_logprobs) if count is not None]
    return _count(request, max(wanted, default=None))


def _count(request: CompletionRequest, alternatives: int | None) -> int | None:
    """The number of alternatives: those that the request chose, if it chose any."""
    chosen = max(map(len, request.reported_lists), default=len(request.reported_ids))
    return chosen or alternatives if alternatives is not None else None


def _sampling_key(seed: int, prompt: int) -> bytes:
    """`Job.key`, 16 bytes. With the same seed, prompts at different indexes get different random numbers."""
    return hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=16).digest()


def _namespace(caller: ClientIdentity, salt: str | None) -> str:
    """`Job.namespace`: only requests with the same one share prefixes. A hash, so that its length is bounded."""
    client = "" if caller.shares_cache else f"{caller.name} {caller.cache_name}".strip()
    if not client and salt is None:
        return ""
    return hashlib.blake2b(f"{client}\n{salt or ''}".encode(), digest_size=16).hexdigest()


def _decode(model_info: ModelInfo, ids: tuple[int, ...]) -> str:
    return b"".join(model_info.pieces[token] for token in ids).decode("utf-8", "replace")


def too_long(model_info: ModelInfo, prompt: int, max_tokens: int) -> RequestError:
    """The error for a prompt of `prompt` tokens that does not fit with `max_tokens`, in OpenAI's words."""
    return RequestError(
        f"This model's maximum context length is {model_info.context} tokens, however you requested "
        f"{prompt + max_tokens} tokens ({prompt} in your prompt; {max_tokens} for the completion). Please reduce "
        "your prompt; or completion length."
    )

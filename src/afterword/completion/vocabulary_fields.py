"""The fields of a request that name tokens by their ids or count them, checked and applied with the model's facts."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from afterword.completion.fields import Prompt
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.engine.protocol import BannedText, ModelInfo
from afterword.engine.token_row import ReportedAt
from afterword.errors import RequestError

_ID_FIELDS = ("stop_token_ids", "allowed_token_ids", "banned_tokens", "custom_token_bans")


def check_ids(request: CompletionRequest, model_info: ModelInfo) -> None:
    """Refuse ids that the vocabulary does not have. Raises `RequestError`."""
    last = len(model_info.pieces) - 1
    for prompt in request.prompt:
        for token in prompt if isinstance(prompt, tuple) else ():
            if not 0 <= token <= last:
                raise RequestError(
                    f"Invalid token in prompt: {str(token)[:32]}. Minimum value is 0, maximum value is {last} "
                    "(inclusive)."
                )
    given = {name: getattr(request, name) or () for name in _ID_FIELDS}
    given["logprob_token_ids"] = (*request.reported_ids, *chain.from_iterable(request.reported_lists))
    for name, tokens in given.items():
        for token in tokens:
            if not 0 <= token <= last:
                raise RequestError(
                    f"Invalid token in '{name}': {str(token)[:32]}. Minimum value is 0, maximum value is {last} "
                    "(inclusive).",
                    param=name,
                )
    for token, _ in request.logit_bias:
        if token > last:
            raise RequestError(f"Invalid key in 'logit_bias': {token}. Maximum value is {last}.", param="logit_bias")


def reported_at(request: CompletionRequest, prompt: int) -> ReportedAt | None:
    """`Job.reported_at` for a prompt of `prompt` tokens. Raises `RequestError`.

    Where the prompt has log probabilities the first lists are those of all its tokens, as `prompt_token_ids` has them.
    """
    lists, name = request.reported_lists, "logprob_token_ids"
    if not lists:
        return None
    scored = prompt if request.scores_prompt else 0
    if not any(lists[min(scored, 1) :]):
        raise RequestError(f"'{name}' has no ids for any position with log probabilities.", param=name)
    if len(lists) < scored:
        raise RequestError(
            f"'{name}' has {len(lists)} lists, but the prompt has {scored} tokens with log probabilities. Send a list "
            "for each token that the model reads, then those for generated tokens.",
            param=name,
        )
    most = scored + request.max_tokens
    if len(lists) > most:
        raise RequestError(
            f"'{name}' has {len(lists)} lists, but there are at most {most} positions with log probabilities: {scored} "
            f"in the prompt and {request.max_tokens} in the completion.",
            param=name,
        )
    if scored and request.logprobs is None and len(lists) > scored:
        raise RequestError(
            f"'{name}' has lists for generated tokens, which have no log probabilities without 'logprobs'.", param=name
        )
    return ReportedAt(lists[:scored], lists[scored:])


def with_all_alternatives(
    request: CompletionRequest, model_info: ModelInfo, limits: RequestLimits
) -> CompletionRequest:
    """The request with the size of the vocabulary for -1, and at most that many alternatives. Raises `RequestError`."""
    size = len(model_info.pieces)
    counts = {name: getattr(request, name) for name in ("logprobs", "prompt_logprobs")}
    for name, count in counts.items():
        if count == -1 and size > limits.most_logprobs:
            raise RequestError(
                f"'{name}' is -1: all {size} tokens of the vocabulary. At most {limits.most_logprobs} alternatives of "
                "each token can be requested. (HINT: --max-logprobs -1 lifts the server's limit.)",
                param=name,
            )
    whole: dict[str, Any] = {
        name: size for name, count in counts.items() if count is not None and not 0 <= count <= size
    }
    return replace(request, **whole) if whole else request


def shown_ends(request: CompletionRequest, model_info: ModelInfo, end_tokens: tuple[int, ...]) -> frozenset[int]:
    """The end tokens whose text is in the choice; special tokens only if the request says that it wants them."""
    if not request.include_stop_str_in_output:
        return frozenset()
    return frozenset(end_tokens).difference(() if request.skip_special_tokens is False else model_info.special)


def banned_text(request: CompletionRequest, model_info: ModelInfo, end_tokens: tuple[int, ...]) -> BannedText | None:
    """`Job.banned_text`."""
    if not (request.banned_strings or request.bad_words):
        return None
    hidden = set(end_tokens) - shown_ends(request, model_info, end_tokens)
    silent = hidden.union(model_info.special if request.skip_special_tokens else ())
    return BannedText(request.bad_words, request.banned_strings, tuple(sorted(silent)))


def check_allowed(request: CompletionRequest, model_info: ModelInfo, end_tokens: tuple[int, ...]) -> None:
    """Refuse a request that may only sample tokens that it must not sample yet, or never. Raises `RequestError`."""
    if not request.max_tokens or (request.allowed_token_ids is None and not request.banned_ids):
        return
    every = range(len(model_info.pieces))
    left = set(every if request.allowed_token_ids is None else request.allowed_token_ids).difference(request.banned_ids)
    name = "banned_tokens" if request.banned_tokens else "custom_token_bans"
    if not left:
        raise RequestError(f"'{name}' leaves no token that can be generated.", param=name)
    if request.min_tokens and left.issubset(end_tokens):
        name = "allowed_token_ids" if request.allowed_token_ids else name
        raise RequestError(
            f"All tokens that '{name}' leaves end the text, but 'min_tokens' requires tokens before that.",
            param=name,
        )


def truncated(
    request: CompletionRequest, model_info: ModelInfo, given: Prompt, ids: tuple[int, ...]
) -> tuple[int, ...]:
    """The tokens of a prompt that `truncate_prompt_tokens` keeps, without a BOS that the server adds.

    Raises `RequestError`.
    """
    kept = request.truncate_prompt_tokens
    if kept is None:
        return ids
    most = model_info.context - request.max_tokens
    if kept > most:
        raise RequestError(
            f"'truncate_prompt_tokens' ({kept}) cannot be greater than the context length minus 'max_tokens' ({most}). "
            "Please request a smaller truncation size.",
            param="truncate_prompt_tokens",
        )
    if kept < 0:
        adds = isinstance(given, str) if request.add_special_tokens is None else request.add_special_tokens
        kept = max(most - (adds and model_info.add_bos), 0)
    return ids[max(0, len(ids) - kept) :] if request.truncation_side == "left" else ids[:kept]

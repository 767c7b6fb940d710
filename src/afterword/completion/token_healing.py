"""`token_healing`: the last token of a prompt is left out, and the first generated token begins with its bytes.

So a prompt that ends inside a word is continued with the tokens that the model would have read for the whole word.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from afterword.completion.dry_breakers import bit_set
from afterword.engine.protocol import ModelInfo
from afterword.errors import RequestError

if TYPE_CHECKING:
    from afterword.completion.request import CompletionRequest

Vocabulary = tuple[tuple[bytes, ...], tuple[int, ...]]
"""The pieces of a vocabulary in order, and their tokens."""


def check_healing(request: CompletionRequest) -> None:
    """Refuse what `token_healing` cannot be combined with. Raises `RequestError`."""
    if not request.token_healing:
        return
    right = request.truncate_prompt_tokens is not None and request.truncation_side == "right"
    others = {
        "suffix": bool(request.suffix),
        "input_extra": bool(request.input_extra),
        "truncation_side": right,
        **{each.field.partition(".")[0]: True for each in request.constraints},
    }
    if name := next((name for name, given in others.items() if given), None):
        raise RequestError(f"'token_healing' cannot be combined with '{name}'. Leave out one of them.", param=name)


def first_tokens(
    request: CompletionRequest, model_info: ModelInfo, prompts: Iterable[tuple[int, ...]]
) -> Mapping[bytes, bytes]:
    """For the bytes of each prompt's last token: which tokens begin with them, one bit for each, see `Job.first`.

    Control tokens are not among them, and no tokens that the request excludes.
    """
    if not (request.token_healing and request.max_tokens):
        return {}
    last = {prompt[-1] for prompt in prompts if prompt}
    pieces = {_healed(token, model_info) for token in last} - {b""}
    excluded = frozenset(model_info.special).union(request.banned_ids)
    allowed = None if request.allowed_token_ids is None else frozenset(request.allowed_token_ids)
    vocabulary, found = _sorted(model_info.pieces), {}
    for piece in sorted(pieces):
        ids = {token for token in _beginning_with(vocabulary, piece) if token not in excluded}
        found[piece] = bit_set(ids if allowed is None else ids & allowed, -(-len(model_info.pieces) // 32) * 32)
    return found


def healed(
    request: CompletionRequest,
    model_info: ModelInfo,
    prompt: tuple[int, ...],
    ids: tuple[int, ...],
    first: Mapping[bytes, bytes],
) -> bytes:
    """The bytes of a prompt's last token if it is left out, else b"". `ids`: the part that the client sent.

    Raises `RequestError` if no token may follow then.
    """
    piece = _healed(ids[-1], model_info) if first and ids and len(prompt) > 1 else b""
    if piece and not any(first[piece]):
        name = "banned_tokens" if request.allowed_token_ids is None else "allowed_token_ids"
        raise RequestError(
            f"With 'token_healing' no token of '{name}' can begin the text: none begins as the prompt's last token.",
            param=name,
        )
    return piece


def _healed(token: int, model_info: ModelInfo) -> bytes:
    in_range = 0 <= token < len(model_info.pieces)  # ids are checked later
    return model_info.pieces[token] if in_range and token not in model_info.special else b""


@lru_cache(4)  # megabytes each
def _sorted(pieces: tuple[bytes, ...]) -> Vocabulary:
    tokens = sorted(range(len(pieces)), key=pieces.__getitem__)
    return tuple(pieces[token] for token in tokens), tuple(tokens)


def _beginning_with(vocabulary: Vocabulary, start: bytes) -> tuple[int, ...]:
    """The tokens whose bytes begin with these."""
    ordered, tokens = vocabulary
    first = bisect_left(ordered, start)
    return tokens[first : bisect_right(ordered, start, first, key=lambda piece: piece[: len(start)])]

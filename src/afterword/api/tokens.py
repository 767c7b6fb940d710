"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the model's tokenizer, for clients that count and slice."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword.api import gate
from afterword.api.models import json_answer
from afterword.api.presence import while_present
from afterword.api.service import Served, Service
from afterword.api.visit import visit_of
from afterword.completion.fields import as_integer
from afterword.completion.plan import bos_before
from afterword.completion.request import parse_object
from afterword.engine.protocol import Card
from afterword.errors import RequestError


async def tokenize(request: Request) -> Response:
    """`{"prompt": text, "add_special_tokens": true}` to token ids: those that the model reads of such a prompt.

    So the BOS is among them if the model wants one; `usage` counts the caller's own tokens, without it.
    """
    served, body = await _read(request, ("prompt", "add_special_tokens"))
    prompt, add = body.get("prompt"), body.get("add_special_tokens")
    if not isinstance(prompt, str):
        raise RequestError("'prompt' must be a string.", param="prompt")
    if not isinstance(add, bool | None):
        raise RequestError("'add_special_tokens' must be a boolean.", param="add_special_tokens")
    card = served.engine.card
    special = request.app.state.service.config.special_text
    work = served.engine.tokenize(prompt, special, visit_of(request.scope).key)
    ids = await while_present(request.receive, work) if prompt else ()
    tokens = [*bos_before(card, ids, add is not False), *ids]
    return json_answer({"tokens": tokens, "count": len(tokens), "max_model_len": card.context})


async def detokenize(request: Request) -> Response:
    """`{"tokens": ids}` to the text that they spell; bytes that are no characters become U+FFFD."""
    served, body = await _read(request, ("tokens",))
    given = body.get("tokens")
    ids = [as_integer(token) for token in given] if isinstance(given, list) else [None]
    card = served.engine.card
    pieces = card.pieces
    if not all(token is not None and 0 <= token < len(pieces) for token in ids):
        raise RequestError(f"'tokens' must be an array of integers from 0 to {len(pieces) - 1}.", param="tokens")
    text = b"".join(pieces[token] for token in ids if token is not None)
    if card.space_prefix:
        text = text.removeprefix(b" ")  # which tokenizing had added
    return json_answer({"prompt": text.decode("utf-8", "replace")})


async def tokenizer_info(request: Request) -> Response:
    """The special tokens, by name and id, and the sizes that clients need."""
    service: Service = request.app.state.service
    card = (await service.enter(request.query_params.get("model"), visit_of(request.scope))).engine.card
    return json_answer(
        {
            "vocab_size": len(card.pieces),
            "model_max_length": card.context,
            "add_bos_token": card.add_bos,
            "bos_token": _name(card, card.bos),
            "bos_token_id": card.bos,
            "eos_token": _name(card, card.eos),
            "eos_token_id": card.eos,
        }
    )


async def _read(request: Request, known: tuple[str, ...]) -> tuple[Served, dict[str, Any]]:
    """The body, whose keys are known ones and perhaps `model`."""
    service: Service = request.app.state.service
    body = parse_object(await gate.read_json(request))
    for key in body:
        if key not in (*known, "model"):
            raise RequestError(f"Unrecognized request argument supplied: {key[:64]}", param=key[:64])
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("'model' must be a string.", param="model")
    return await service.enter(model, visit_of(request.scope)), body


def _name(card: Card, token: int | None) -> str | None:
    return None if token is None else card.pieces[token].decode("utf-8", "replace")

"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the model's tokenizer, for clients that count and slice."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterword.api import gate, pieces
from afterword.api.models import json_answer
from afterword.api.presence import while_present
from afterword.api.service import Served, Service
from afterword.api.turns import Turns
from afterword.api.visit import visit_of
from afterword.completion.body import beside, encode, parse_object
from afterword.completion.fields import as_integer
from afterword.completion.plan import bos_before
from afterword.engine.protocol import Card
from afterword.errors import RequestError

_NOT_LOADED = "The model is not loaded. On a server without keys a GET loads none; POST /tokenize does."
_SLICE = 2**12  # token ids that are worked on in one step


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
    bos = bos_before(card, tuple(ids[:1]), add is not False)
    encoded = await while_present(request.receive, _numbers(bos, ids))
    rest = encode({"count": len(bos) + len(ids), "max_model_len": card.context})[1:]
    return _InPieces([b'{"tokens":[', b",".join(encoded), b"],", rest])


async def _numbers(bos: tuple[int, ...], ids: Sequence[int]) -> list[bytes]:
    """Tokens as parts of a JSON array."""
    encoded, turns = [encode(bos)[1:-1]] if bos else [], Turns()
    for start in range(0, len(ids), _SLICE):
        encoded.append(encode(list(ids[start : start + _SLICE]))[1:-1])
        await turns.after()
    return encoded


async def detokenize(request: Request) -> Response:
    """`{"tokens": ids}` to the text that they spell; bytes that are no characters become U+FFFD."""
    served, body = await _read(request, ("tokens",))
    given = body.get("tokens")
    card = served.engine.card
    if not isinstance(given, list):
        raise _not_tokens(card)
    most = request.app.state.service.config.limits.max_answer
    text = await while_present(request.receive, _text(card, given, most))
    return _InPieces([b'{"prompt":"', *text, b'"}'])


async def _text(card: Card, given: list[Any], most: int) -> list[bytes]:
    """What some tokens spell, as parts of a JSON string. Raises `RequestError` beyond `most` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, size, turns = [], 0, Turns()
    for start in range(0, len(given), _SLICE):
        spelled = _spell(card, given[start : start + _SLICE])
        if start == 0 and card.space_prefix:
            spelled = spelled.removeprefix(b" ")  # which tokenizing had added
        size += len(spelled)
        if size > most:
            raise RequestError(f"The text has more than {most} bytes.", param="tokens", code="answer_too_large")
        text.append(encode(decoder.decode(spelled))[1:-1])
        await turns.after()
    text.append(encode(decoder.decode(b"", final=True))[1:-1])
    return text


async def tokenizer_info(request: Request) -> Response:
    """The special tokens, by name and id, and the sizes that clients need."""
    service: Service = request.app.state.service
    name = request.query_params.get("model")
    if not service.config.guarded:  # a page on another site can send a GET, but has no key
        service.models.check_loaded(service.host(name), _NOT_LOADED)
    card = (await service.enter(name, visit_of(request.scope))).engine.card
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


class _InPieces(Response):
    """A JSON answer that is sent piece by piece, as fast as the client reads it."""

    def __init__(self, fragments: list[bytes]) -> None:
        self._fragments = fragments
        length = sum(map(len, fragments))
        super().__init__(headers={"content-length": str(length)}, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await pieces.send_pieces(send, self._fragments)


def _spell(card: Card, given: list[Any]) -> bytes:
    """The bytes of some tokens. Raises `RequestError`."""
    plain = set(map(type, given)) <= {int}  # nearly always, and a list can have millions
    ids = given if plain else [-1 if (token := as_integer(each)) is None else token for each in given]
    if ids and not 0 <= min(ids) <= max(ids) < len(card.pieces):
        raise _not_tokens(card)
    return b"".join(map(card.pieces.__getitem__, ids))


def _not_tokens(card: Card) -> RequestError:
    return RequestError(f"'tokens' must be an array of integers from 0 to {len(card.pieces) - 1}.", param="tokens")


async def _read(request: Request, known: tuple[str, ...]) -> tuple[Served, dict[str, Any]]:
    """The body, whose keys are known ones and perhaps `model`."""
    service: Service = request.app.state.service
    body = await beside(parse_object, await gate.read_json(request))
    for key in body:
        if key not in (*known, "model"):
            raise RequestError(f"Unrecognized request argument supplied: {key[:64]}", param=key[:64])
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("'model' must be a string.", param="model")
    return await service.enter(model, visit_of(request.scope)), body


def _name(card: Card, token: int | None) -> str | None:
    return None if token is None else card.pieces[token].decode("utf-8", "replace")

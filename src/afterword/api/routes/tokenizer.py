"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the model's tokenizer, for clients that count or split tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterword.api.requests.disconnect import cancel_on_disconnect
from afterword.api.requests.request_body import read_json
from afterword.api.requests.request_context import request_context_of
from afterword.api.responses import incremental
from afterword.api.responses.time_slices import TimeSlices
from afterword.api.routes.models import json_response
from afterword.api.service import ServedModel, Service
from afterword.completion.fields import as_integer
from afterword.completion.json_body import encode, parse_object, run_in_thread_if_large
from afterword.completion.plan import bos_before
from afterword.engine.protocol import ModelInfo
from afterword.errors import RequestError

_NOT_LOADED = "The model is not loaded. Without API keys, a GET request does not load a model; POST /tokenize does."
_SLICE = 2**12  # token ids in one time slice


async def tokenize(request: Request) -> Response:
    """`{"prompt": text, "add_special_tokens": true}` to the token ids that the model would read for this prompt.

    They include the BOS if the model needs one. `usage` of a completion does not count a BOS that the server adds.
    """
    served, body = await _read(request, ("prompt", "add_special_tokens"))
    prompt, add = body.get("prompt"), body.get("add_special_tokens")
    if not isinstance(prompt, str):
        raise RequestError("'prompt' must be a string.", param="prompt")
    if not isinstance(add, bool | None):
        raise RequestError("'add_special_tokens' must be a boolean.", param="add_special_tokens")
    model_info = served.engine.model_info
    special = request.app.state.service.config.special_text
    work = served.engine.tokenize(prompt, special, request_context_of(request.scope).key)
    ids = await cancel_on_disconnect(request.receive, work) if prompt else ()
    bos = bos_before(model_info, tuple(ids[:1]), add is not False)
    encoded = await cancel_on_disconnect(request.receive, _numbers(bos, ids))
    rest = encode({"count": len(bos) + len(ids), "max_model_len": model_info.context})[1:]
    return ChunkedJsonResponse([b'{"tokens":[', b",".join(encoded), b"],", rest])


async def _numbers(bos: tuple[int, ...], ids: Sequence[int]) -> list[bytes]:
    """The token ids as fragments of a JSON array."""
    encoded, time_slices = [encode(bos)[1:-1]] if bos else [], TimeSlices()
    for start in range(0, len(ids), _SLICE):
        encoded.append(encode(list(ids[start : start + _SLICE]))[1:-1])
        await time_slices.yield_after()
    return encoded


async def detokenize(request: Request) -> Response:
    """`{"tokens": ids}` to the text of these tokens. Bytes that are not valid UTF-8 become U+FFFD."""
    served, body = await _read(request, ("tokens",))
    tokens = body.get("tokens")
    model_info = served.engine.model_info
    if not isinstance(tokens, list):
        raise _not_tokens(model_info)
    max_bytes = request.app.state.service.config.limits.max_answer
    text = await cancel_on_disconnect(request.receive, _text(model_info, tokens, max_bytes))
    return ChunkedJsonResponse([b'{"prompt":"', *text, b'"}'])


async def _text(model_info: ModelInfo, tokens: list[Any], max_bytes: int) -> list[bytes]:
    """The text of tokens as fragments of a JSON string. Raises `RequestError` if it has more than `max_bytes` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, size, time_slices = [], 0, TimeSlices()
    for start in range(0, len(tokens), _SLICE):
        spelled = _spell(model_info, tokens[start : start + _SLICE])
        if start == 0 and model_info.space_prefix:
            spelled = spelled.removeprefix(b" ")  # the space that tokenizing adds
        size += len(spelled)
        if size > max_bytes:
            raise RequestError(
                f"The text of these tokens has more than {max_bytes} bytes.", param="tokens", code="answer_too_large"
            )
        text.append(encode(decoder.decode(spelled))[1:-1])
        await time_slices.yield_after()
    text.append(encode(decoder.decode(b"", final=True))[1:-1])
    return text


async def tokenizer_info(request: Request) -> Response:
    """The special tokens, by text and id, and the sizes of vocabulary and context."""
    service: Service = request.app.state.service
    name = request.query_params.get("model")
    if not service.config.requires_key:  # otherwise a web page of another site could load models with a GET
        service.models.check_loaded(service.managed_model(name), _NOT_LOADED)
    served = await request_context_of(request.scope).enter(service.use_model(name))
    model_info = served.engine.model_info
    return json_response(
        {
            "vocab_size": len(model_info.pieces),
            "model_max_length": model_info.context,
            "add_bos_token": model_info.add_bos,
            "bos_token": _name(model_info, model_info.bos),
            "bos_token_id": model_info.bos,
            "eos_token": _name(model_info, model_info.eos),
            "eos_token_id": model_info.eos,
        }
    )


class ChunkedJsonResponse(Response):
    """A JSON response that is sent in pieces, as fast as the client reads it."""

    def __init__(self, fragments: list[bytes]) -> None:
        self._fragments = fragments
        length = sum(map(len, fragments))
        super().__init__(headers={"content-length": str(length)}, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await incremental.send_chunks(send, self._fragments)


def _spell(model_info: ModelInfo, tokens: list[Any]) -> bytes:
    """The bytes of tokens. Raises `RequestError` for anything but token ids of the model."""
    all_int = set(map(type, tokens)) <= {int}  # the common case, checked fast: a list can have millions of items
    ids = tokens if all_int else [-1 if (token := as_integer(each)) is None else token for each in tokens]
    if ids and not 0 <= min(ids) <= max(ids) < len(model_info.pieces):
        raise _not_tokens(model_info)
    return b"".join(map(model_info.pieces.__getitem__, ids))


def _not_tokens(model_info: ModelInfo) -> RequestError:
    return RequestError(
        f"'tokens' must be an array of integers from 0 to {len(model_info.pieces) - 1}.", param="tokens"
    )


async def _read(request: Request, known: tuple[str, ...]) -> tuple[ServedModel, dict[str, Any]]:
    """The model and the body. Raises `RequestError` for keys of the body other than `known` and `model`."""
    service: Service = request.app.state.service
    body = await run_in_thread_if_large(parse_object, await read_json(request))
    for key in body:
        if key not in (*known, "model"):
            raise RequestError(f"Unrecognized request argument supplied: {key[:64]}", param=key[:64])
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("'model' must be a string.", param="model")
    return await request_context_of(request.scope).enter(service.use_model(model)), body


def _name(model_info: ModelInfo, token: int | None) -> str | None:
    return None if token is None else model_info.pieces[token].decode("utf-8", "replace")

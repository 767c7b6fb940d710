"""Which model the upstream serves, by its routes `/v1/models` and `/version`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from afterword.engine.http.failures import Malformed, Refused, SeveralModels
from afterword.engine.http.upstream import Upstream

_SHOWN = 10  # names of models in a message


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of the upstream's model. `version`: of vLLM, "" if the upstream does not say it.

    `root`: the name or path with which vLLM was started. `length`: its `max_model_len`.
    """

    version: str
    model: str
    root: str
    length: int


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


async def find_identity(upstream: Upstream, name: str) -> Identity:
    """The only model of the upstream, or that with this name. Raises `UpstreamFailure`, such as `SeveralModels`."""
    card = _choose(_convert(await upstream.get("/v1/models"), _Models).data, name)
    if card.max_model_len is None:
        raise Malformed(f"/v1/models states no max_model_len for {card.id!r}, as vLLM does")
    return Identity(await _version(upstream), card.id, card.root or "", card.max_model_len)


def _choose(cards: list[_Card], name: str) -> _Card:
    """A base model: adapters have a parent."""
    cards = [card for card in cards if card.parent is None]
    if not cards:
        raise Malformed("it serves 0 models")
    if len(cards) > 1:
        named = [card for card in cards if name in (card.id, _last(card.id), _last(card.root or ""))]
        cards = [card for card in cards if card.id == name] or named or cards
    if len(cards) > 1:
        names = ", ".join(card.id for card in cards[:_SHOWN])
        raise SeveralModels(f"it serves {len(cards)} models ({names}), and not exactly one has the name {name}")
    return cards[0]


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


async def _version(upstream: Upstream) -> str:
    try:
        found = await upstream.get("/version")
    except Refused:  # gateways have other routes
        return ""
    version = found.get("version") if isinstance(found, dict) else None
    return version if isinstance(version, str) else ""


def _convert(value: Any, kind: type[_Models]) -> _Models:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise Malformed(f"/v1/models: {problem}") from None

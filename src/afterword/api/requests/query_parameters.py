"""Parses the query string of a URL. Errors name the wrong parameter: unknown, given twice, or out of range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from afterword.errors import RequestError

T = TypeVar("T", bound=str)


class QueryParameters:
    """The parameters in the query string of a request. All methods and `__init__` raise `RequestError`."""

    def __init__(self, request: Request, known: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name not in known or name in self._values:
                raise RequestError(f"Unrecognized request argument supplied: {name[:64]}", param=name[:64])
            self._values[name] = value

    def text(self, name: str) -> str | None:
        """The value of a parameter, or None if it is absent."""
        return self._values.get(name)

    def number(self, name: str, minimum: int, maximum: int, default: int) -> int:
        """A whole number from `minimum` to `maximum`."""
        text = self._values.get(name)
        if text is None:
            return default
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if not minimum <= number <= maximum:
            raise RequestError(f"'{name}' must be a whole number from {minimum} to {maximum}.", param=name)
        return number

    def choice(self, name: str, known: Sequence[T], default: T) -> T:
        """One of the values in `known`."""
        text = self._values.get(name, default)
        for word in known:
            if word == text:
                return word
        raise RequestError(f"'{name}' must be one of {', '.join(filter(None, known))}.", param=name)

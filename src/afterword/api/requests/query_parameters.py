"""What stands after the question mark: known names once each, or an error that names the one that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from afterword.errors import RequestError

T = TypeVar("T", bound=str)


class QueryParameters:
    """The parameters of a request. Raises `RequestError`."""

    def __init__(self, request: Request, known: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name not in known or name in self._values:
                raise RequestError(f"Unrecognized request argument supplied: {name[:64]}", param=name[:64])
            self._values[name] = value

    def text(self, name: str) -> str | None:
        """Some text, None if it is not given."""
        return self._values.get(name)

    def number(self, name: str, least: int, most: int, default: int) -> int:
        """A whole number in a range."""
        text = self._values.get(name)
        if text is None:
            return default
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if not least <= number <= most:
            raise RequestError(f"'{name}' must be a whole number from {least} to {most}.", param=name)
        return number

    def choice(self, name: str, known: Sequence[T], default: T) -> T:
        """One of some words."""
        text = self._values.get(name, default)
        for word in known:
            if word == text:
                return word
        raise RequestError(f"'{name}' must be one of {', '.join(filter(None, known))}.", param=name)

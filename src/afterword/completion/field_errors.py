"""Errors of request fields, in OpenAI's wording where it was recorded. Holds no state."""

from __future__ import annotations

from afterword.errors import RequestError


def wrong_type(name: str, value: object, expected: str) -> RequestError:
    message = f"Invalid type for '{name}': expected {expected}, but got {kind_of(value)} instead."
    return RequestError(message, param=name, code="invalid_type")


def kind_of(value: object) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string", list: "an array"}
    return "null" if value is None else kinds.get(type(value), "an object")


def out_of_range(name: str, value: float, low: float, high: float, kind: str) -> RequestError:
    above = value > high
    return RequestError(
        f"Invalid '{name}': {kind} {'above maximum' if above else 'below minimum'} value. Expected a value "
        f"{'<=' if above else '>='} {high if above else low}, but got {str(value)[:32]} instead.",
        param=name,
        code=f"{kind}_{'above_max' if above else 'below_min'}_value",
    )


def empty_array(name: str) -> RequestError:
    message = "empty array. Expected an array with minimum length 1, but got an empty array instead."
    return RequestError(f"Invalid '{name}': {message}", param=name, code="empty_array")


def too_long(name: str, kind: str, limit: int, length: int) -> RequestError:
    return RequestError(
        f"Invalid '{name}': {kind} too long. Expected {'an' if kind == 'array' else 'a'} {kind} with maximum length "
        f"{limit}, but got {'an' if kind == 'array' else 'a'} {kind} with length {length} instead.",
        param=name,
        code=f"{kind}_above_max_length",
    )


def unknown(name: str) -> RequestError:
    return RequestError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")

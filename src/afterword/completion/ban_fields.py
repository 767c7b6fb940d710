"""The fields that ban texts and tokens: their parsers.

`banned_strings`, `banned_tokens` and `custom_token_bans` are those of KoboldCpp and TabbyAPI as SillyTavern sends them,
`bad_words` is vLLM's.
"""

from __future__ import annotations

import re
from typing import Any

from afterword.completion import fields
from afterword.completion.field_errors import too_long
from afterword.completion.fields import field_parser
from afterword.completion.request_limits import RequestLimits
from afterword.errors import RequestError

_MOST, _LONGEST, _MOST_CHARACTERS = 1024, 256, 16384
_PHRASE = {"type": "string", "pattern": "^[^\ufffd]*$", "maxLength": _LONGEST}
_WORD = {"type": "string", "pattern": "^[^\ufffd]*[^\\s\ufffd][^\ufffd]*$", "maxLength": _LONGEST}
_MOST_PER_ID = 16  # characters of an id in a text, with its comma and spaces
_ID_TEXT = r"^ *([0-9]{1,10} *(, *[0-9]{1,10} *)*)?$"
_IDS = {"type": "array", "items": {"type": "integer"}}


@field_parser({"anyOf": [_PHRASE, {"type": "array", "maxItems": _MOST, "items": _PHRASE}]})
def banned_strings(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
    """One text or an array of texts. Empty ones have no effect."""
    texts: tuple[str, ...] = fields.strings(name, [value] if isinstance(value, str) else value, limits)
    return tuple(filter(None, _bounded(name, texts)))


@field_parser({"type": "array", "maxItems": _MOST, "items": _WORD})
def bad_words(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
    """An array of texts, without the white space at their beginning, as in vLLM."""
    words = tuple(text.lstrip() for text in _bounded(name, fields.strings(name, value, limits)))
    if not all(words):
        raise RequestError(f"Invalid '{name}': a text is empty.", param=name)
    return words


@field_parser(
    lambda limits: {
        "anyOf": [
            {"type": "string", "pattern": _ID_TEXT, "maxLength": _MOST_PER_ID * limits.max_bias},
            _IDS | {"maxItems": limits.max_bias},
        ]
    }
)
def banned_tokens(name: str, value: Any, limits: RequestLimits) -> tuple[int, ...]:
    """An array of token ids, or their decimal numbers in a text with commas. Empty: none."""
    if isinstance(value, str):
        if len(value) > _MOST_PER_ID * limits.max_bias:
            raise too_long(name, "string", _MOST_PER_ID * limits.max_bias, len(value))
        if value.count(",") >= limits.max_bias:
            raise too_long(name, "array", limits.max_bias, value.count(",") + 1)
        if not re.fullmatch(_ID_TEXT, value):
            raise RequestError(f"Invalid '{name}': expected token ids with commas between them.", param=name)
        return tuple(map(int, value.split(","))) if value.strip() else ()
    if isinstance(value, list) and any(isinstance(each, str) for each in value):
        raise RequestError(f"Invalid '{name}': expected token ids. (HINT: texts go to 'banned_strings'.)", param=name)
    ids: tuple[int, ...] = fields.token_ids(name, value, limits)
    return ids


def _bounded(name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    fields.bounded(name, texts, _MOST, _LONGEST, _MOST_CHARACTERS)
    if any("\ufffd" in text for text in texts):
        # A choice has it where it ends inside a character, which is known too late to take tokens back.
        raise RequestError(f"Invalid '{name}': a text contains U+FFFD, which stands for invalid bytes.", param=name)
    return texts

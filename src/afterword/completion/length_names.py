"""Other servers' names for the number of tokens to generate.

They are refused even where unknown fields are ignored: the completion would have another length than the client wants.
"""

from __future__ import annotations

from typing import Any

_NAMES = (
    "max_completion_tokens",
    "max_gen_len",
    "max_length",
    "max_new_tokens",
    "max_output_tokens",
    "max_tokens",
    "max_tokens_to_sample",
    "maxOutputTokens",
    "maxTokens",
    "n_predict",
    "num_predict",
)
_OBJECTS = ("generation_config", "generationConfig", "options", "parameters", "sampling_params")

LENGTH_NAMES = (*_NAMES, *(f"{parent}.{name}" for parent in _OBJECTS for name in _NAMES))
"""All names, also those of members of objects, which stand for settings of a request."""

_ALL = frozenset(LENGTH_NAMES)


def other_lengths(values: dict[str, Any], own: str) -> list[str]:
    """The names in a body that give another length than its field `own`, which is one of the names."""
    members = {
        f"{parent}.{name}": member
        for parent in _OBJECTS
        if isinstance(values.get(parent), dict)
        for name, member in values[parent].items()
    }
    given = values | members
    if given.keys().isdisjoint(_ALL - {own}):  # nearly always
        return []
    return [name for name in LENGTH_NAMES if name != own and given.get(name) not in (None, values.get(own))]

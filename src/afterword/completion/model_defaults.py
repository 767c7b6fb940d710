"""Default values of request fields, which an operator gives to the names of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DefaultsOf = Callable[[Any], Mapping[str, Any]]
"""Returns the default values for the value of a request's `model`, which need not be a string."""

WITHOUT_DEFAULT = frozenset(
    ("model", "prompt", "suffix", "input_extra", "stream", "stream_options", "user", "cache_salt")
)
"""Fields that every request states for itself."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """A name in requests, the served model that it stands for, and default values: JSON values by field name."""

    name: str
    model: str
    values: Mapping[str, Any] = field(default_factory=dict)


def no_defaults(_: Any) -> Mapping[str, Any]:
    """The defaults of a server whose operator gives none."""
    return {}

"""The models on this machine as a list for people: where each comes from, how large it is, what its header says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from afterword.errors import NotLanguageModel, SettingError
from afterword.models.gguf_facts import Facts, read_facts
from afterword.models.registry import Model, present


@dataclass(frozen=True, slots=True)
class Entry:
    """A model, with the facts of its file or the reason why there are none."""

    model: Model
    facts: Facts | None
    problem: str | None = None


def entries() -> Iterator[Entry]:
    """All that is here, as soon as it is known; what is no language model is left out."""
    for model in present():
        try:
            yield Entry(model, None, model.problem) if model.problem else Entry(model, read_facts(model.path))
        except NotLanguageModel:
            continue
        except SettingError as error:
            yield Entry(model, None, error.message)

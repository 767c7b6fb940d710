"""Lists the models on this machine with the facts of their headers, for `afterword models`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from afterword.errors import NotLanguageModel, SettingError
from afterword.models.gguf_facts import Facts, read_facts
from afterword.models.registry import Model, present


@dataclass(frozen=True, slots=True)
class Entry:
    """A model with the facts of its file, or with the reason why it cannot be used."""

    model: Model
    facts: Facts | None
    problem: str | None = None


def entries() -> Iterator[Entry]:
    """Yield all language models on this machine, each as soon as its header is read. Other models are left out."""
    for model in present():
        try:
            yield Entry(model, None, model.problem) if model.problem else Entry(model, read_facts(model.path))
        except NotLanguageModel:
            continue
        except SettingError as error:
            yield Entry(model, None, error.message)

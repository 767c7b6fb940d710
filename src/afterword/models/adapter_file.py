"""Checks the header of a LoRA adapter's file, so that a wrong file is refused before a worker loads it."""

from __future__ import annotations

from pathlib import Path

from afterword.errors import SettingError
from afterword.models.gguf_header import read_header


def check_adapter(path: Path, architecture: str) -> None:
    """Raise `SettingError` unless the file is a LoRA adapter for models of that architecture.

    The shapes of its matrices are compared by llama.cpp when it loads them.
    """
    values = read_header(path).values
    kind = values.get("general.type", "model")
    if kind != "adapter":
        raise SettingError(f"{path} is no adapter but of the type {kind!r}.")
    if values.get("adapter.type") != "lora":
        raise SettingError(f"{path} is no LoRA adapter but of the type {values.get('adapter.type')!r}.")
    found = values.get("general.architecture")
    if found != architecture:
        raise SettingError(
            f"{path} is an adapter of {found} models, and the architecture of this model is {architecture}."
        )

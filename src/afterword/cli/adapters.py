"""Reads the option `--lora NAME=FILE[@SCALE]`: LoRA adapters, which are served as models of their own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.file_names import check_utf8
from afterword.models.registry import Adapter, Model


def with_adapters(models: Sequence[Model], names: Sequence[str], options: Sequence[str]) -> list[Model]:
    """The models by their `names`, and one further model for each option. Raises `SettingError`."""
    named = [replace(model, id=name) for model, name in zip(models, names, strict=True)]
    if options and len(named) != 1:
        raise SettingError(f"--lora adds adapters to one model, but {len(named)} models are served.")
    adapted = [_adapted(named[0], option) for option in options]
    found: set[str] = set()
    for model in (*named, *adapted):
        if model.id in found:
            raise SettingError(f"--lora: there are two models with the name {model.id}.")
        found.add(model.id)
    return [*named, *adapted]


def _adapted(base: Model, option: str) -> Model:
    name, equals, file = option.partition("=")
    if not name or not equals or not file:
        raise SettingError(f"--lora {option}: write NAME=FILE or NAME=FILE@SCALE.")
    check_utf8(option)
    path, scale = _path_and_scale(option, file)
    if not path.is_file():
        raise SettingError(f"--lora {option}: {path} {'is not a file' if path.exists() else 'does not exist'}.")
    return replace(base, id=name, adapter=Adapter(path, scale, base.id))


def _path_and_scale(option: str, file: str) -> tuple[Path, float]:
    """The path and the scale, 1 if none is given. An @ in a file's name counts only if no number follows the last."""
    whole, at, number = file.rpartition("@")
    if not at or Path(file).expanduser().is_file():
        return Path(file).expanduser(), 1.0
    try:
        scale = float(number)
    except ValueError:
        return Path(file).expanduser(), 1.0
    if not math.isfinite(scale):
        raise SettingError(f"--lora {option}: the scale must be a finite number.")
    return Path(whole).expanduser(), scale

"""Reads the file of `--defaults`: default values of request fields for names of models.

The file is TOML with a table for each name. `model` in it is the served model for which the name stands; without it the
name is that of a served model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afterword.completion.model_defaults import WITHOUT_DEFAULT, ModelDefaults
from afterword.completion.request import EXTENSIONS, FIELDS
from afterword.completion.request_limits import RequestLimits
from afterword.errors import RequestError, SettingError
from afterword.models.file_names import check_utf8

_ALLOWED = {name: field for name, field in (FIELDS | EXTENSIONS).items() if name not in WITHOUT_DEFAULT}


def read_model_defaults(path: Path, served: Iterable[str], limits: RequestLimits) -> tuple[ModelDefaults, ...]:
    """Read the file. `served`: the names of all models of the server. Raises `SettingError`, which names the value."""
    import tomllib  # imported late: most commands run without a file

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise SettingError(f"{path} is not valid TOML: {error}.") from None
    names = tuple(served)
    return tuple(_defaults(f"{path}: [{name}]", name, table, names, limits) for name, table in tables.items())


def _defaults(where: str, name: str, table: Any, served: tuple[str, ...], limits: RequestLimits) -> ModelDefaults:
    check_utf8(name)
    if not 0 < len(name) <= limits.max_name:  # the empty name is that of the only model
        raise SettingError(f"{where}: a name must have 1 to {limits.max_name} characters.")
    if not isinstance(table, dict):
        raise SettingError(f"{where}: expected a table with default values, such as temperature = 0.")
    model = table.get("model", name)
    if model not in served:
        raise SettingError(
            f"{where}: no served model is called {model}. Served are {', '.join(served)}. For a further name of one of "
            "them, give its name in model."
        )
    if name in served and model != name:
        raise SettingError(f"{where}: {name} is the name of a served model, so it cannot stand for {model}.")
    values = {key: value for key, value in table.items() if key != "model"}
    for key, value in values.items():
        _check(f"{where} {key}", key, value, limits)
    return ModelDefaults(name, model, values)


def _check(where: str, key: str, value: Any, limits: RequestLimits) -> None:
    if key not in _ALLOWED:
        close = difflib.get_close_matches(key, _ALLOWED, n=1)
        raise SettingError(f"{where}: this field has no default{f'; did you mean {close[0]}?' if close else '.'}")
    try:
        _ALLOWED[key](key, value, limits)
    except RequestError as error:
        raise SettingError(f"{where}: {error.message}") from None

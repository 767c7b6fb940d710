"""The file of `--defaults`: what it may contain, and the errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from afterword.cli.model_defaults import read_model_defaults
from afterword.completion.model_defaults import ModelDefaults
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.errors import SettingError


def read(folder: Path, text: str, limits: RequestLimits | None = None) -> tuple[ModelDefaults, ...]:
    path = folder / "defaults.toml"
    path.write_text(text, encoding="utf-8")
    return read_model_defaults(path, ["coder", "writer"], limits or RequestLimits())


def test_a_table_belongs_to_a_model_or_is_a_further_name(tmp_path: Path) -> None:
    coder = "[coder]\ntemperature = 0.5\n"
    edits = '[edits]\nmodel = "coder"\nstop = ["a"]\nlogit_bias = {5 = -100}\n'
    text = coder + edits + '[same]\nmodel = "writer"\n'
    assert read(tmp_path, text) == (
        ModelDefaults("coder", "coder", {"temperature": 0.5}),
        ModelDefaults("edits", "coder", {"stop": ["a"], "logit_bias": {"5": -100}}),
        ModelDefaults("same", "writer", {}),
    )
    assert read(tmp_path, "") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1", "[a]: expected a table"),
        ("[other]\ntemperature = 1", "[other]: no served model is called other. Served are coder, writer."),
        ('[edits]\nmodel = "other"', "[edits]: no served model is called other."),
        ('[coder]\nmodel = "writer"', "coder is the name of a served model, so it cannot stand for writer"),
        ("[coder]\ntemperature = 3", "[coder] temperature: Invalid 'temperature': decimal above maximum value."),
        ("[coder]\ntemprature = 1", "[coder] temprature: this field has no default; did you mean temperature?"),
        ('[coder]\nprompt = "a"', "[coder] prompt: this field has no default"),
        ('[""]\nmodel = "coder"', "[]: a name must have 1 to 256 characters"),
        (f'["{"x" * 257}"]\nmodel = "coder"', "a name must have 1 to 256 characters"),
        ("[coder", "is not valid TOML"),
    ],
)
def test_an_error_names_the_file_the_name_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "defaults.toml") in caught.value.message
    assert message in caught.value.message


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        read_model_defaults(tmp_path / "none.toml", ["coder"], RequestLimits())


def test_the_limits_of_the_server_apply(tmp_path: Path) -> None:
    text = 'coder.stop = ["1", "2", "3", "4", "5"]'
    assert read(tmp_path, text)
    with pytest.raises(SettingError, match="array too long"):
        read(tmp_path, text, STRICT)

"""The option `--draft-model`: which files it refuses, the memory that it counts, and a process that uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf import TokenType

from afterword.cli import main
from afterword.cli.model_setup import FittedModel, fit_models
from afterword.config import EngineSettings
from afterword.errors import SettingError
from afterword.models.gguf_facts import read_facts
from afterword.models.memory_fit import ComputeOptions, ModelShape
from afterword.models.registry import Adapter, Model, builtin_path
from oracle.architectures import write_random
from oracle.tiny import Shape, byte_vocabulary, random_weights, with_tokens, write_model, write_tiny


def afterword(*words: str) -> Result:
    return CliRunner().invoke(main, words, prog_name="afterword")


def fitted(path: Path, draft: Path, **settings: object) -> FittedModel:
    model = Model(path.stem, path, "file")
    (found,) = fit_models([(model, read_facts(path))], EngineSettings(draft_model=str(draft), **settings))  # type: ignore[arg-type]
    return found


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "served.gguf", file_type="Q8_0")


def padded(path: Path, count: int, name: str = "[PAD{}]", context: int = 512) -> Path:
    """A tiny model with more tokens at the end of the vocabulary."""
    words = byte_vocabulary(infill=True, add_bos=False)
    words = with_tokens(words, *((name.format(number), TokenType.UNUSED) for number in range(count)))
    shape = Shape(context=context)
    return write_model(path, shape, words, random_weights(shape, words), "Q8_0")


def test_the_draft_model_has_the_sequences_of_the_model(served: Path, tmp_path: Path) -> None:
    draft = padded(tmp_path / "draft.gguf", 0, context=256)
    message = fitted(served, draft, parallel=3).load_message
    assert message.draft is not None
    assert (message.draft.path, message.draft.sequences, message.draft.context) == (str(draft), 3, 256)
    assert (message.context, message.draft.draft, message.draft.kv_type) == (512, None, "exact")


def test_another_vocabulary_is_refused_with_the_difference(served: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", vocabulary="spm")
    with pytest.raises(
        SettingError, match=r"other\.gguf has another vocabulary than .*served\.gguf: token 0 is '<unk>'"
    ):
        fitted(served, other)
    longer = padded(tmp_path / "longer.gguf", 2, name="more{}")
    with pytest.raises(SettingError, match=r"it has \d+ tokens and not \d+\. A draft model needs the same tokens"):
        fitted(served, longer)


def test_padding_at_the_end_of_a_vocabulary_is_no_difference(served: Path, tmp_path: Path) -> None:
    draft = padded(tmp_path / "padded.gguf", 7)
    assert fitted(served, draft).load_message.draft
    assert fitted(draft, served).load_message.draft


def test_a_recurrent_draft_model_is_refused(served: Path, tmp_path: Path) -> None:
    draft = write_random(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(SettingError, match="the state of mamba models cannot be cut after a rejected token"):
        fitted(served, draft)


def test_files_that_are_no_models_are_refused_at_start(served: Path, tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>", encoding="utf-8")
    for name, expected in (("none.gguf", "none.gguf does not exist"), ("page.gguf", "page.gguf is not a GGUF file")):
        result = afterword("serve", str(served), "--draft-model", str(tmp_path / name))
        assert result.exit_code == 2
        assert expected in result.stderr


def test_no_draft_model_is_loaded_where_no_draft_can_be_verified(served: Path, tmp_path: Path) -> None:
    mamba = write_random(tmp_path / "mamba.gguf", "mamba")
    for path, settings in ((served, {"kv_type": "f16"}), (mamba, {})):
        draft = padded(tmp_path / "draft.gguf", 0) if path is served else write_random(tmp_path / "l.gguf", "llama")
        plain = fit_models([(Model("a", path, "file"), read_facts(path))], EngineSettings(**settings))[0]  # type: ignore[arg-type]
        assert fitted(path, draft, **settings).load_message.draft is None
        assert fitted(path, draft, **settings).memory_bytes == plain.memory_bytes


def test_the_memory_of_the_draft_model_is_counted() -> None:
    facts = read_facts(builtin_path())
    draft = replace(facts, size_bytes=1000, kv_heads=2)
    alone = ModelShape(512, 4, facts, ComputeOptions(on_demand=True))
    both = ModelShape(512, 4, facts, ComputeOptions(on_demand=True, draft=draft))
    assert both.weights_bytes == alone.weights_bytes + 1000
    assert both.token_bytes == alone.token_bytes + draft.kv_bytes_per_token(2)
    assert both.sequences_bytes > alone.sequences_bytes + 4 * 512 * draft.kv_bytes_per_token(2)
    assert both.pass_bytes == 2 * alone.pass_bytes


def test_the_weights_of_the_draft_model_are_counted_once_for_all_adapters(served: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a.gguf"
    adapter.write_bytes(bytes(1000))
    models = [Model("base", served, "file"), Model("x", served, "file", adapter=Adapter(adapter, 1.0, "base"))]
    given = [(model, read_facts(served)) for model in models]
    settings = EngineSettings(share_weights=True, parallel=2)
    without = fit_models(given, settings)
    drafting = fit_models(given, replace(settings, draft_model=str(served)))
    assert all(each.load_message.draft for each in drafting)
    more = [one.memory_bytes - other.memory_bytes for one, other in zip(drafting, without, strict=True)]
    assert more[0] - more[1] == pytest.approx(1.1 * read_facts(served).size_bytes, abs=2)


def test_a_text_is_the_same_with_a_draft_model() -> None:
    words = ("complete", "Once upon a time", "--max-tokens", "40", "--seed", "3", "--json")
    plain, drafted = afterword(*words), afterword(*words, "--draft-model", str(builtin_path()))
    assert plain.exit_code == drafted.exit_code == 0
    fields = ("choices", "usage", "system_fingerprint")
    assert [read(plain)[field] for field in fields] == [read(drafted)[field] for field in fields]


def read(result: Result) -> dict[str, object]:
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_a_draft_model_that_llama_cpp_cannot_load_is_an_error_at_start(served: Path, tmp_path: Path) -> None:
    shape, words = Shape(), byte_vocabulary(infill=True, add_bos=False)
    weights = random_weights(shape, words)
    del weights["blk.1.ffn_up.weight"]
    broken = write_model(tmp_path / "broken.gguf", shape, words, weights, "Q8_0")
    result = afterword("complete", "a", "--model", str(served), "--draft-model", str(broken))
    assert result.exit_code == 2
    assert "llama.cpp cannot load" in result.stderr
    assert "broken.gguf" in result.stderr

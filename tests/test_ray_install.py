"""Tests of the script that installs Ray for `make ray`, without installing it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.with_ray import install_ray


def test_a_failed_installation_of_ray_leaves_no_folder_and_says_why(tmp_path, monkeypatch, capsys):
    def fail(folder: Path, _: list[str]) -> None:
        (folder / "bin").mkdir(parents=True)
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(install_ray, "install", fail)
    folder = tmp_path / "environment"
    assert install_ray.main(folder) == 1
    assert not folder.exists()
    assert "tests are skipped" in capsys.readouterr().err


def test_an_environment_is_kept_until_the_requirements_change(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(install_ray, "install", lambda folder, wanted: calls.append(wanted))
    assert [install_ray.main(tmp_path), install_ray.main(tmp_path)] == [0, 0]
    assert len(calls) == 1
    assert any(line.startswith("ray[serve]==2.60") for line in calls[0])
    (tmp_path / "done").write_text("others")
    assert install_ray.main(tmp_path) == 0
    assert len(calls) == 2

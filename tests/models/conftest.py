from __future__ import annotations

from pathlib import Path

import pytest

from afterword.models import other_stores


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache in the returned folder, and no models of other programs."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(other_stores, "ollama", list)
    monkeypatch.setattr(other_stores, "lmstudio", list)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path

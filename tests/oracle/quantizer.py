"""Converts the weights of model files to other types with llama.cpp.

Prebuilt libraries may lack the function, so a process with the installed library converts the file:
`python -m oracle.quantizer SOURCE TARGET TYPE PURE`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import LlamaFileType

from afterword.engine.llama import library
from afterword.engine.llama.library import native

_ABSENT = 3  # exit status


def quantize(source: Path, target: Path, file_type: LlamaFileType, *, pure: bool = False) -> None:
    """Write the model with other weights. Skips the test where the installed library cannot convert.

    `pure`: all matrices get the type; otherwise llama.cpp chooses a better one for some of them.
    """
    environment = {name: value for name, value in os.environ.items() if name != library.VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "oracle.quantizer", source, target, str(int(file_type)), str(int(pure))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == _ABSENT:
        pytest.skip("the installed llama.cpp cannot convert weights")
    assert done.returncode == 0, done.stderr


def main(source: str, target: str, file_type: str, pure: str) -> int:
    library.initialize(verbose=False)
    if not hasattr(native.handle, "llama_model_quantize"):
        return _ABSENT
    params = native.llama_model_quantize_default_params()
    params.ftype, params.pure = int(file_type), bool(int(pure))
    params.allow_requantize, params.nthread = True, 1
    failed: int = native.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

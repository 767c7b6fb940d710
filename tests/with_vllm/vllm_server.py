"""How the tests start a server whose model is run by vLLM."""

from __future__ import annotations

import os
from pathlib import Path

PYTHON = os.environ.get("AFTERWORD_VLLM_PYTHON", "")
WRITE_MODEL = Path(__file__).with_name("random_model.py")
FLAGS = ("--dtype=float32", "--block-size=32", "--enforce-eager")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""vLLM on a CPU takes 1 GiB for its cache and one thread, which is not bound to a core that other programs use."""


def arguments(folder: Path, *more: str) -> tuple[str, ...]:
    """The arguments of `afterword serve` for a model that vLLM runs."""
    return (str(folder), "--engine", "vllm", "--vllm-python", PYTHON, *more, "--", *FLAGS)

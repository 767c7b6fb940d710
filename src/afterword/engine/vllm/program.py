"""What the server must know about the worker with vLLM: its program, and the flags that it accepts for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afterword.engine.parent.worker_process import WorkerProgram
from afterword.errors import SettingError

_OWN_FLAGS = {
    "--model": "it is the MODEL of the command line",
    "--tokenizer": "the tokenizer is read from the model's folder",
    "--tokenizer-mode": "the tokenizer is read from the model's folder",
    "--skip-tokenizer-init": "without its tokenizer vLLM does not check token ids",
    "--logprobs-mode": "log probabilities are those of the unmodified model",
    "--max-logprobs": "the limit of requests is --max-logprobs of afterword serve",
    "--generation-config": "requests that name no value get that of the API",
    "--logits-processors": "they change which tokens are drawn",
    "--speculative-config": "vLLM refuses several fields with it, and its log probabilities were not verified",
}
"""Flags of vLLM that cannot be given, with the reason."""


def vllm_program(python: str) -> WorkerProgram:
    """The worker's program. `python`: the interpreter of the environment that has vLLM."""
    return WorkerProgram((python, "-P", str(Path(__file__).with_name("bootstrap.py"))), starts_others=True)


def check_flags(flags: Sequence[str]) -> None:
    """Raise `SettingError` for a flag of vLLM that cannot be given."""
    for flag in flags:
        name = flag.split("=")[0].replace("_", "-")
        if name in _OWN_FLAGS:
            raise SettingError(f"{name} cannot be given to vLLM: {_OWN_FLAGS[name]}.")

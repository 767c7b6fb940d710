"""What the server must know about the worker with vLLM: its program, and the flags that it accepts for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from afterword.engine.parent.worker_process import WorkerProgram
from afterword.errors import SettingError

_SPECULATION = "vLLM refuses several fields with it, and its log probabilities were not verified"
_OWN_FLAGS = {
    "--model": "it is the MODEL of the command line",
    "--tokenizer": "the tokenizer is read from the model's folder",
    "--tokenizer-mode": "the tokenizer is read from the model's folder",
    "--skip-tokenizer-init": "without its tokenizer vLLM does not check token ids",
    "--logprobs-mode": "log probabilities are those of the unmodified model",
    "--max-logprobs": "the limit of requests is --max-logprobs of afterword serve",
    "--generation-config": "requests that name no value get that of the API",
    "--logits-processors": "they change which tokens are drawn",
    "--speculative-config": _SPECULATION,
    "-sc": _SPECULATION,
    "-s": _SPECULATION,  # vLLM's parser accepts the beginning of a flag with one dash
    "--config": "its file could hold flags that cannot be given; write them on the command line",
}
"""Flags of vLLM that cannot be given, with the reason."""

_BACKENDS = ("--distributed-executor-backend", "--data-parallel-backend", "-dpb")
"""Flags that name what starts vLLM's processes."""


def vllm_program(python: str) -> WorkerProgram:
    """The worker's program. `python`: the interpreter of the environment that has vLLM."""
    return WorkerProgram((python, "-P", str(Path(__file__).with_name("bootstrap.py"))), starts_others=True)


def check_flags(flags: Sequence[str]) -> None:
    """Raise `SettingError` for a flag of vLLM that cannot be given.

    vLLM's parser accepts `--flag=value`, `--flag.part value`, and `_` in place of `-`.
    """
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        word, equals, value = flag.partition("=")
        name = word.split(".")[0].replace("_", "-")
        reason = _SPECULATION if name.startswith("--spec-") else _OWN_FLAGS.get(name)
        if reason:
            raise SettingError(f"{name} cannot be given to vLLM: {reason}.")
        if name in _BACKENDS and (value if equals else following) not in ("mp", "uni"):
            raise SettingError(f"{name} must be mp or uni: processes that others start would outlive the worker.")

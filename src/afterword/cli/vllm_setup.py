"""Makes the model manager of a server whose models are run by vLLM. Starts no worker."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from afterword.cli.model_setup import WantedModels, names_in_requests
from afterword.config import EngineSettings
from afterword.engine.messages import LoadVllm
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.vllm.model_folder import ModelFolder, read_folder
from afterword.engine.vllm.program import check_flags, vllm_program
from afterword.errors import SettingError

_USED = ("context", "parallel", "verbose", "infill_template")  # settings that have a meaning for vLLM
_HARMLESS = {"speculate": "off"}  # values that ask for what happens anyway
_REASONS = {
    "gpu_layers": "vLLM computes all layers on the device that it was built for",
    "reproducible": "vLLM's batch invariance was not verified; its promise is none",
    "draft_model": "drafts are verified by the built-in engine",
    "speculate": "drafts are verified by the built-in engine",
    "cache_dir": "vLLM keeps its prefix cache in memory",
}


def make_vllm_manager(
    wanted: WantedModels,
    settings: EngineSettings,
    options: dict[str, Any],
    policy: QueuePolicy,
) -> ModelManager:
    """Return the manager of models that vLLM runs; none is loaded. Raises `SettingError`.

    `options`: the values of the options of `afterword serve` by name.
    """
    check_settings(settings)
    models = folders_of(wanted, "vllm")
    program = vllm_program(find_python(options["vllm_python"]))
    flags = vllm_flags(settings, options["vllm_flags"])
    definitions = [
        ModelDefinition(
            id=name,
            created=folder_created(folder),
            make_engine=partial(Supervisor, _load_message(folder, flags, settings), policy, program=program),
            context=planned_context(settings, folder, flags),
            sequences=settings.parallel or 0,
        )
        for name, folder in models
    ]
    return ModelManager(definitions, keep_alive=options["keep_alive"], policy=policy)


def check_settings(
    settings: EngineSettings,
    engine: str = "vllm",
    used: Sequence[str] = _USED,
    otherwise: str = "give vLLM's own flags after --",
) -> None:
    """Raise `SettingError` for a setting of the built-in engine that has no meaning for vLLM.

    `used`: the settings that have one. `otherwise`: the reason that is given for the settings without one of their own.
    """
    default = EngineSettings()
    for name in EngineSettings.__dataclass_fields__:
        if name not in used and getattr(settings, name) not in (getattr(default, name), _HARMLESS.get(name)):
            option = "--" + name.replace("cache_bytes", "cache_size").replace("_", "-")
            raise SettingError(f"{option} cannot be used with --engine {engine}: {_REASONS.get(name, otherwise)}.")


def folders_of(wanted: WantedModels, engine: str) -> list[tuple[str, ModelFolder]]:
    """The wanted models with their names in requests. Raises `SettingError`."""
    for option, given in (("--lora", wanted.adapters), ("--lora-dir", wanted.further_adapters)):
        if given:
            raise SettingError(f"{option} cannot be used with --engine {engine}.")
    if not wanted.specs:
        raise SettingError(f"--engine {engine} needs a MODEL: the folder of a model in Hugging Face's format.")
    folders = [read_folder(Path(spec).absolute()) for spec in wanted.specs]
    names = names_in_requests([folder.path.name for folder in folders], wanted.aliases)
    return list(zip(names, folders, strict=True))


def folder_created(folder: ModelFolder) -> int:
    """The time at which the model was created, in seconds of Unix time."""
    return int((folder.path / "config.json").stat().st_mtime)


def vllm_flags(settings: EngineSettings, text: str) -> tuple[str, ...]:
    """vLLM's flags: those of a text, and those for --context and --parallel. Raises `SettingError`."""
    try:
        flags = shlex.split(text)
    except ValueError as problem:
        raise SettingError(f"--vllm-flags cannot be read: {problem}.") from None
    check_flags(flags)
    if settings.context is not None:
        flags.append(f"--max-model-len={settings.context + 1}")  # vLLM always generates a token
    if settings.parallel is not None:
        flags.append(f"--max-num-seqs={settings.parallel}")
    return tuple(flags)


def planned_context(settings: EngineSettings, folder: ModelFolder, flags: Sequence[str]) -> int:
    """Tokens of one sequence as far as they are known before the model is loaded; 0 if vLLM decides."""
    if settings.context is not None:
        return settings.context
    if any(flag.replace("_", "-").startswith("--max-model-len") for flag in flags):
        return 0
    return max(folder.trained_context - 1, 0)  # vLLM always generates a token


def find_python(given: str | None) -> str:
    """Return the interpreter of the environment with vLLM. Raises `SettingError`."""
    if given is None:
        if (spec := find_spec("vllm")) and spec.origin:
            return sys.executable
        raise SettingError(
            "vLLM is not installed in Afterword's environment. Name the interpreter of an environment that has it: "
            "--vllm-python PATH (see docs/vllm.md)."
        )
    found = shutil.which(given)
    if found is None:
        raise SettingError(f"--vllm-python {given}: there is no such program.")
    return found


def _load_message(folder: ModelFolder, flags: tuple[str, ...], settings: EngineSettings) -> LoadVllm:
    return LoadVllm(str(folder.path), flags, settings.infill_template, settings.verbose)

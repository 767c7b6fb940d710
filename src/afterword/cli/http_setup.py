"""Makes the model manager of a server whose models are run by a vLLM server behind HTTP. Starts no worker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from afterword.cli.model_setup import WantedModels
from afterword.cli.vllm_setup import check_settings, folder_created, folders_of, planned_context
from afterword.config import EngineSettings
from afterword.engine.http.program import UPSTREAM, base_url
from afterword.engine.messages import LoadUpstream
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.token_row import MAX_LISTED
from afterword.errors import SettingError

SAMPLES = 64
"""How many samples the upstream gets at a time by default."""

_USED = ("context", "parallel", "infill_template", "verbose")
_OTHERWISE = "the upstream has its own settings"


def make_http_manager(
    wanted: WantedModels, settings: EngineSettings, options: dict[str, Any], policy: QueuePolicy, max_logprobs: int
) -> ModelManager:
    """Return the manager of models that the upstream runs; none is loaded. Raises `SettingError`.

    `options`: the values of the options of `afterword serve` by name. `max_logprobs`: the limit of requests; -1: none.
    """
    check_settings(settings, "http", _USED, _OTHERWISE)
    if not options["upstream"]:
        raise SettingError("--engine http needs --upstream URL: the address of a vLLM server.")
    load = partial(
        LoadUpstream,
        url=base_url(options["upstream"]),
        sequences=settings.parallel or SAMPLES,
        alternatives=MAX_LISTED if max_logprobs < 0 else min(max_logprobs, MAX_LISTED),
        silence=policy.upstream_seconds,
        patience=policy.queue_seconds,
        key=_read_key(options["upstream_key_file"]),
        context=settings.context,
        infill_template=settings.infill_template,
        verbose=settings.verbose,
    )
    definitions = [
        ModelDefinition(
            id=name,
            created=folder_created(folder),
            make_engine=partial(Supervisor, load(str(folder.path)), policy, program=UPSTREAM),
            context=planned_context(settings, folder, ()),
            sequences=settings.parallel or SAMPLES,
        )
        for name, folder in folders_of(wanted, "http")
    ]
    return ModelManager(definitions, keep_alive=options["keep_alive"], policy=policy)


def _read_key(path: Path | None) -> str:
    """The API key in a file, or nothing without a file. Raises `SettingError`."""
    if path is None:
        return ""
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingError(f"--upstream-key-file {path} cannot be read: {problem}.") from None
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise SettingError(f"--upstream-key-file {path} must have one line with an API key.")
    return key

"""Opens the store of prefixes of a loaded model, if its settings name a folder for it."""

from __future__ import annotations

import sys
from pathlib import Path

from afterword.engine.core.prefix_store import PART_TOKENS
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.engine.store.disk_store import DiskStore
from afterword.engine.store.part_files import PartFolder
from afterword.engine.store.part_index import PartIndex
from afterword.errors import SettingError


def open_store(settings: LoadModel, runner: LlamaRunner, fingerprint: str) -> DiskStore | None:
    """Open the store and start its threads. None if no folder is set, or if the model's states cannot be stored.

    Clears all slots. Raises `SettingError` if the folder cannot be used.
    """
    if not settings.cache_dir:
        return None
    states = runner.slot_states()
    if states is None or PART_TOKENS % runner.grid:
        log(f"--cache-dir has no effect for {settings.path}: the states of this model cannot be stored.")
        return None
    index = PartIndex(PartFolder.open(Path(settings.cache_dir)), settings.cache_bytes)
    try:
        index.scan()
    except OSError as error:
        raise SettingError(f"--cache-dir {settings.cache_dir} cannot be read: {error.strerror}.") from None
    distance = -(-runner.min_shared_tokens // runner.grid) * runner.grid
    store = DiskStore(index, fingerprint, states, distance=distance, log=log)
    store.start()
    return store


def log(line: str) -> None:
    """Write a line to the log of the server: its standard error."""
    print(line, file=sys.stderr, flush=True)

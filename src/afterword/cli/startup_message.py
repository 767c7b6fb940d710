"""The message that `afterword serve` prints when it is ready: what to do first, then facts about the models.

Its lines have at most 80 columns, except for addresses and names that are longer. Holds no state.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence

from afterword import __version__
from afterword.config import Config
from afterword.engine.parent.model_manager import ManagedModel, ModelManager
from afterword.engine.protocol import Promise
from afterword.settings.durations import format_duration

COLUMNS = 80
_PROMISES: dict[Promise, str] = {
    "exact": "The same request gives the same bytes. A token has the same log probability read or generated.",
    "reproducible": "The same request gives the same bytes.",
    "none": "Numbers can differ in their last digits with other requests (docs/reproducibility.md).",
}


def startup_message(models: ModelManager, config: Config, port: int) -> str:
    """Return the message for a server that is ready, with a curl command that works."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{port}"
    managed_models = list(models)
    names = [managed_model.id for managed_model in managed_models]
    facts = [_describe(managed_model, len(names) > 1) for managed_model in managed_models]
    further = [each for each in config.defaults if each.name != each.model]
    facts += [f"{each.name}: another name of {each.model}, with its own defaults." for each in further]
    if models.keep_alive is not None:
        unloaded = format_duration(models.keep_alive)
        facts.append(f"A model is loaded for its first request, and unloaded {unloaded} after its last one.")
    paragraphs = [
        f"{_serves(names)}\n\n  {url}",
        _wrapped("Open it in a browser to write with the model and see every token's probability. Or send a request:"),
        _curl(url, names[0], config.requires_key),
        "\n".join(map(_wrapped, facts)),
        f"{url}/docs explains every field,\nafterword serve --help every setting. Ctrl+C stops the server.",
    ]
    return "\n\n".join(paragraphs)


def _serves(names: Sequence[str]) -> str:
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    line = f"Afterword {__version__} serves {listed} at"
    if len(line) <= COLUMNS or len(names) == 1:
        return line
    others = "another model" if len(names) == 2 else f"{len(names) - 1} other models"
    return f"Afterword {__version__} serves {names[0]} and {others} at"


def _curl(url: str, name: str, with_key: bool) -> str:
    """A command that continues a text, at a temperature at which small models write readable texts."""
    key = "    -H 'Authorization: Bearer YOUR_KEY' \\\n" if with_key else ""
    prompt = f'{{"model": {json.dumps(name)}, "prompt": "Once upon a time",'
    body = f'{prompt}\n         "max_tokens": 60, "temperature": 0.7}}'
    return (
        f"  curl {url}/v1/completions \\\n{key}    -H 'Content-Type: application/json' \\\n    -d {shlex.quote(body)}"
    )


def _describe(managed_model: ManagedModel, named: bool) -> str:
    definition = managed_model.definition
    model_info = managed_model.loaded_engine.model_info if managed_model.loaded_engine else None
    parts = [f"{managed_model.id}:"] if named else []
    if model_info and model_info.parameters:
        parts.append(f"{model_info.parameters / 1e6:,.1f} M parameters,")
    shape = managed_model.shape
    together = "" if shape.capacity is None else f", {shape.capacity:,} tokens together"
    up = "up" if model_info else "Up"
    if shape.sequences and shape.context:
        parts.append(f"{up} to {shape.sequences} sequences of {shape.context:,} tokens at the same time{together}.")
    if definition.trained_context > shape.context:
        trained = definition.trained_context
        parts.append(f"It was trained on {trained:,}: --context {trained} serves them if memory suffices.")
    parts.append(_PROMISES[managed_model.promise])
    if model_info and not model_info.verifies_drafts:
        parts.append("Predictions, --speculate and --draft-model have no effect.")
    if definition.advice:
        parts.append(definition.advice)
    return " ".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False)

"""`python -m afterword.engine.llama FD FD`: the engine's process, with llama.cpp."""

from __future__ import annotations

from afterword.engine import child, frames
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import make_card


def load(settings: frames.Open, tell: child.Tell) -> child.Loaded:
    """The model that `settings` names. Raises `SettingError`."""
    library.start(settings.verbose)
    runner = LlamaRunner(settings, tell)
    card, vocabulary = make_card(runner, settings)
    return child.Loaded(runner, card, vocabulary.parts, runner.team, runner.files.check)


child.serve(load)

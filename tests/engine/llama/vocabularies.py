"""Loads vocabularies without their models."""

from __future__ import annotations

import os
from pathlib import Path

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary


def load(path: Path) -> Vocabulary:
    library.initialize(verbose=False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    assert model, library.last_error()
    return Vocabulary(model)

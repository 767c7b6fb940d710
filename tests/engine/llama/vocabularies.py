"""Loads vocabularies without their models."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gguf import TokenType

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary
from oracle import tiny


def load(path: Path) -> Vocabulary:
    library.initialize(verbose=False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    assert model, library.last_error()
    return Vocabulary(model)


def load_extract(path: Path, folder: Path) -> Vocabulary:
    """The vocabulary of an extract (`infill_tokenizers`): its entries have their ids, all others are unused tokens."""
    extract = json.loads(path.read_text("utf-8"))
    entries = {token: (text, kind, *score) for token, text, kind, *score in extract["tokens"]}
    unused = (TokenType.UNUSED, -1e9)
    whole = [entries.get(token, (f"<unused {token}>", *unused)) for token in range(extract["size"])]
    vocabulary = tiny.Vocabulary(
        extract["model"],
        tuple(text for text, *_ in whole),
        tuple(TokenType(kind) for _, kind, *_ in whole),
        extract["special"],
        extract["add_bos"],
        tuple(extract["merges"]),
        tuple(score[0] for _, _, *score in whole) if extract["model"] == "llama" else (),
        extract["pre"],
        extract["space_prefix"],
    )
    return load(tiny.write_vocabulary(folder / f"{path.stem}.gguf", vocabulary))

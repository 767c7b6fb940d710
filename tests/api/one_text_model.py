"""A model that generates one fixed text: after each byte of `TEXT` the next one, and at the end the end token.

The generated tokens are known in advance, so tests know where a character is split and where a stop string begins.
"""

from __future__ import annotations

from pathlib import Path

from oracle.chain import write_chain_model
from oracle.tiny import byte_vocabulary

TEXT = "(é😀漢) 1234567890."
"""No byte occurs twice, and each byte is one token, so that every token determines the next one."""


def write_one_text_model(path: Path) -> Path:
    """Write the model."""
    vocabulary = byte_vocabulary(infill=False, add_bos=False)
    chain = (*TEXT.encode(), vocabulary.tokens.index(vocabulary.special["eos"]))
    return write_chain_model(path, vocabulary, chain)

"""Unedited samples of a GGUF file, as Markdown.

Knows llama-cpp-python and the file; the model card shows what this prints.
"""

from pathlib import Path

import llama_cpp

from training.rows import END

LENGTH = 120
TEMPERATURE = 0.7
STORY = "Once upon a time, there was a little"
OPENINGS = [
    *[STORY] * 5,
    "One day, Sam found a big box in the garden.",
    "Lily was sad because",
    "In a quiet forest, there lived an old owl",
    "import os\n\n\ndef list_files(path):\n",
    'class Queue:\n    """First in, first out."""\n\n    def __init__(self):\n',
]


def samples(path: Path, seed: int) -> str:
    """Every opening gone on with, each with a seed of its own."""
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, verbose=False)
    lines = []
    for number, opening in enumerate(OPENINGS):
        text = opening + _sample(model, [END, *ids_of(model, opening)], seed + number)
        code = opening.endswith("\n")
        shown = ["```python", text.rstrip("\n"), "```"] if code else [f"> {line}".rstrip() for line in text.split("\n")]
        lines += [f"Opening `{opening.strip().splitlines()[-1].strip()}`, seed {seed + number}:", "", *shown, ""]
    return "\n".join(lines)


def ids_of(model: llama_cpp.Llama, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=False)


def _sample(model: llama_cpp.Llama, prompt: list[int], seed: int) -> str:
    """Draw from the whole distribution at the temperature, until the end of the document."""
    model.reset()
    model.set_seed(seed)
    found: list[int] = []
    for token in model.generate(
        prompt, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, temp=TEMPERATURE, repeat_penalty=1.0
    ):
        if token == END or len(found) == LENGTH:
            break
        found.append(token)
    return model.detokenize(found).decode("utf-8", "replace")

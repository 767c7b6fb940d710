"""Unedited samples of a GGUF file, as Markdown: stories, and middles filled in.

Knows llama-cpp-python and the file; the model card shows what this prints.
"""

from pathlib import Path

import llama_cpp

from training.rows import END, MIDDLE, PREFIX, SUFFIX

OPENING = "Once upon a time, there was a little"
LENGTH = 200
TEMPERATURE = 0.7
GAPS = [
    ("Lily had a red ball. She ", " and the ball fell into the water."),
    ("Tom wanted to eat the apple, but his mom said", " Tom was sad. Then Mom smiled and gave him a cookie."),
    ("Once upon a time, there was a", " who lived in the forest. He loved to fly over the trees."),
    ('def add(a, b):\n    """Return the sum."""\n    ', "\n\n\ndef sub(a, b):\n    return a - b\n"),
    ("for name in os.listdir(path):\n    if name", ":\n        found.append(name)\nreturn found\n"),
]


def samples(path: Path, seed: int) -> str:
    """Five stories and every gap, each with a seed of its own."""
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, verbose=False)
    lines = [f"Opening: `{OPENING}`", ""]
    for number in range(5):
        text = _sample(model, [END, *_ids(model, OPENING)], seed + number)
        quoted = [f"> {line}".rstrip() for line in (OPENING + text).split("\n")]
        lines += [f"Seed {seed + number}:", "", *quoted, ""]
    for number, (before, after) in enumerate(GAPS):
        prompt = [PREFIX, *_ids(model, before), SUFFIX, *_ids(model, after), MIDDLE]
        middle = _sample(model, prompt, seed + number)
        lines += [f"Gap {number + 1}, seed {seed + number}:", "", "```text"]
        lines += [f"{before}[[{middle}]]{after}".rstrip("\n"), "```", ""]
    return "\n".join(lines)


def _ids(model: llama_cpp.Llama, text: str) -> list[int]:
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

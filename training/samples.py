"""Generates unedited samples of a GGUF file with `afterword complete`, as Markdown.

It runs the command line of the installed Afterword. The model card shows its output.
"""

import subprocess
import sys
from pathlib import Path

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
    """A continuation of each opening, each with a different seed."""
    lines = []
    for number, opening in enumerate(OPENINGS, seed):
        text = opening + complete(path, opening, temperature=0.7, max_tokens=120, seed=number)
        code = opening.endswith("\n")
        shown = ["```python", text.rstrip("\n"), "```"] if code else [f"> {line}".rstrip() for line in text.split("\n")]
        lines += [f"Opening `{opening.strip().splitlines()[-1].strip()}`, seed {number}:", "", *shown, ""]
    return "\n".join(lines)


def complete(path: Path, prompt: str, **options: object) -> str:
    """The output of `afterword complete`."""
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "afterword", "complete", f"--model={path}", *named, "--", prompt]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return answer.decode().removesuffix("\n")

"""The training text: which documents there are, how much each source weighs, which are held out.

Knows files and text; knows nothing of tokens.
"""

import hashlib
import lzma
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPECIALS = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
SHARES = {"stories": 0.30, "truecased": 0.08, "fables": 0.17, "python": 0.29, "books": 0.16}
SECOND_SHARES = {"stories": 0.45, "truecased": 0.10, "fables": 0.12, "python": 0.28, "books": 0.05}
FILES = {
    "stories": "tinystories_cased.txt.xz",
    "truecased": "tinystories_truecased.txt.xz",
    "fables": "tinyfabulist_apache_mit_models.txt.xz",
    "books": "pd_children_books.txt.xz",
}
LONGEST = 6000  # characters of one training document; books and modules are cut to it
HELD_OUT = {"stories": 0.01, "truecased": 0.01, "fables": 0.01, "books": 0.01, "python": 0.02}

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "ensurepip",
    "msilib",
    "__pycache__",
    "__phello__",
}
SKIPPED_FILES = {"entities.py", "_casefix.py", "stringprep.py", "this.py", "keysyms.py", "cp437.py"}


@dataclass(frozen=True)
class Document:
    """One text of one source; `held_out` documents never reach the tokenizer or the model."""

    source: str
    text: str
    held_out: bool


def documents(corpus: Path) -> Iterator[Document]:
    """All documents of all sources, long ones already cut."""
    for source, file in FILES.items():
        with lzma.open(corpus / file, "rt", encoding="utf-8") as stream:
            texts = stream.read().split(SPECIALS[0])
        yield from _documents(source, [text.strip() for text in texts])
    yield from _documents("python", [path.read_text("utf-8", "replace") for path in modules()])


def _documents(source: str, texts: list[str]) -> Iterator[Document]:
    """Hold out by the hash of the whole text, except books: there are too few, so by that of each piece."""
    named = re.compile("|".join(map(re.escape, SPECIALS)))
    for text in (named.sub("", text) for text in texts):
        whole = _held_out(text, source)
        for piece in pieces(text, LONGEST):
            yield Document(source, piece, _held_out(piece, source) if source == "books" else whole)


def _held_out(text: str, source: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT[source] * 2**32


def modules() -> list[Path]:
    """The modules of the running Python's standard library, without tests and big tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
        and path.name not in SKIPPED_FILES
        and not path.name.startswith("_sysconfigdata")
    ]


def pieces(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters: at blank lines if it can, else at lines."""
    found = []
    while len(text) > limit:
        cut = text.rfind("\n\n", limit // 2, limit) + 2
        if cut == 1:
            cut = text.rfind("\n", limit // 2, limit) + 1 or limit
        found.append(text[:cut])
        text = text[cut:]
    if text.strip():
        found.append(text)
    return found


def hashes(corpus: Path) -> dict[str, str]:
    """SHA-256 of every input: each corpus file, and the chosen modules taken together."""
    found = {file: hashlib.sha256((corpus / file).read_bytes()).hexdigest() for file in FILES.values()}
    library = hashlib.sha256()
    for path in modules():
        library.update(path.read_bytes())
    return found | {"python standard library": library.hexdigest()}

"""The training text: documents, shares of the sources, and held-out documents.

Reads the corpus files and calls the generators of text. Does not use the tokenizer.
"""

import hashlib
import lzma
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from training import made_python, made_stories

SPECIALS = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
SHARES = {"stories": 0.30, "truecased": 0.08, "fables": 0.17, "python": 0.29, "books": 0.16}
SECOND_SHARES = {"stories": 0.45, "truecased": 0.10, "fables": 0.12, "python": 0.28, "books": 0.05}
BLEND_SHARES = {
    "made stories": 0.40,
    "stories": 0.18,
    "truecased": 0.04,
    "fables": 0.03,
    "books": 0.02,
    "made python": 0.23,
    "python": 0.10,
}
MADE_STORIES, MADE_PROGRAMS = 20_000, 28_000
FILES = {
    "stories": "tinystories_cased.txt.xz",
    "truecased": "tinystories_truecased.txt.xz",
    "fables": "tinyfabulist_apache_mit_models.txt.xz",
    "books": "pd_children_books.txt.xz",
}
FUNCTION = re.compile(r"^( *)def .*\n(?:(?:\1 +\S.*| *)\n)+", re.MULTILINE)
SHORT_FUNCTION = (100, 1000)  # characters
LONGEST = 6000  # characters of one training document; books and modules are split at this length
HELD_OUT = dict.fromkeys(["stories", "truecased", "fables", "books", "made stories"], 0.01)
HELD_OUT |= dict.fromkeys(["python", "made python"], 0.02)

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
    """All documents of all sources, split at `LONGEST` characters."""
    for source, file in FILES.items():
        with lzma.open(corpus / file, "rt", encoding="utf-8") as stream:
            texts = stream.read().split(SPECIALS[0])
        yield from _documents(source, [text.strip() for text in texts])
    yield from _documents("python", [path.read_text("utf-8", "replace") for path in modules()])


def _documents(source: str, texts: list[str]) -> Iterator[Document]:
    """The held-out documents follow from the hash of the whole text; for books, from that of each piece."""
    named = re.compile("|".join(map(re.escape, SPECIALS)))
    for text in (named.sub("", text) for text in texts):
        whole = held_out(text, source)
        for piece in pieces(text, LONGEST):
            yield Document(source, piece, held_out(piece, source) if source == "books" else whole)


def made(seed: int) -> Iterator[Document]:
    """The generated documents. No training document contains a held-out pair of plot and hero or function."""
    for about, text in islice(made_stories.stories(seed), MADE_STORIES):
        yield Document("made stories", text, held_out(about, "made stories"))
    for parts, text in islice(made_python.programs(seed), MADE_PROGRAMS):
        yield Document("made python", text, any(held_out(part, "made python") for part in parts))


def held_out(text: str, source: str) -> bool:
    """Whether the hash of a text puts it among the held-out documents of its source."""
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
    """Split a text into pieces of at most `limit` characters: at blank lines if possible, else at lines."""
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


def functions(text: str) -> Iterator[str]:
    """The functions and methods of a module that compile on their own and have a length within `SHORT_FUNCTION`."""
    least, most = SHORT_FUNCTION
    for match in FUNCTION.finditer(text + "\n"):
        code = textwrap.dedent(match.group()).strip() + "\n"
        if least <= len(code) <= most and code.isascii() and compiles(code):
            yield code


def compiles(code: str) -> bool:
    """Whether Python accepts the text as a program."""
    try:
        compile(code, "text", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def hashes(corpus: Path) -> dict[str, str]:
    """SHA-256 of each corpus file, and of all selected standard library modules together."""
    found = {file: hashlib.sha256((corpus / file).read_bytes()).hexdigest() for file in FILES.values()}
    library = hashlib.sha256()
    for path in modules():
        library.update(path.read_bytes())
    return found | {"python standard library": library.hexdigest()}

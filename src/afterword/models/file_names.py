"""Selects model files by their names: language models, quantization, the best match for a requested name.

This module opens no file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from afterword.errors import SettingError
from afterword.models.gguf_facts import is_later_part

PREFERRED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "F16", "BF16")
"""Quantizations by preference: the first available one is chosen if the user names none."""

FILE = re.compile(r'[^/\\:*?"<>|\x00-\x1f]+(/[^/\\:*?"<>|\x00-\x1f]+)*')
QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?I?Q\d(?:_\w+)?|BF16|F16|F32|FP16|FP32|MXFP4|NVFP4|TQ\d_\d)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


def model_files(names: Iterable[str]) -> list[str]:
    """The names of language models: without projectors, calibration data and later parts of split models. Sorted."""
    return sorted(
        name
        for name in names
        if name.lower().endswith(".gguf")
        and is_safe(name)
        and not is_later_part(name)
        and not re.search("mmproj|imatrix", name.rpartition("/")[2], re.IGNORECASE)
    )


def printable(name: str) -> str:
    """A file's name with each byte that is not UTF-8 as \\xNN. Python's surrogates for such bytes cannot be encoded."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_utf8(path: str) -> None:
    """Raise `SettingError` for a path that cannot be written in messages, logs and JSON."""
    if (shown := printable(path)) != path:
        raise SettingError(f"{shown} is not valid UTF-8. Rename it, or create a link to it with a valid name.")


def is_safe(name: str) -> bool:
    """Whether an untrusted file name stays inside the folder that it is joined to."""
    return FILE.fullmatch(name) is not None and ".." not in name


def matching_models(models: Sequence[str], wanted: str) -> list[str]:
    """The models that match a file name, a quantization or part of a name; if `wanted` is empty, the preferred ones."""
    if wanted.lower().endswith(".gguf"):
        return [name for name in models if wanted in (name, name.rpartition("/")[2])]
    if wanted:
        exact = [name for name in models if quant_of(name).upper() == wanted.upper()]
        return exact or [name for name in models if wanted.lower() in name.lower()]
    for quant in PREFERRED:
        if found := [name for name in models if quant_of(name) == quant]:
            return found
    return list(models)


def quant_of(name: str) -> str:
    """The quantization in a file's name, in capitals; empty if there is none."""
    found = QUANT.findall(name)
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def similar_names(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Suggestions for a wrong name: the known names that contain it, or else those with a similar spelling."""
    known = list(dict.fromkeys(known))
    wanted = _bare(name)
    if not wanted:
        return []
    if within := [each for each in known if wanted in _bare(each)]:
        return within[:limit]
    spelled = {part: each for each in reversed(known) for part in _parts(each)}
    close = difflib.get_close_matches(wanted, spelled, n=limit, cutoff=0.7)
    return list(dict.fromkeys(spelled[part] for part in close))


def _bare(name: str) -> str:
    """A name in lower case without the prefix of its source and without `.gguf`."""
    return re.sub(r"^(hf|ollama|lmstudio):", "", name.lower()).removesuffix(".gguf")


def _parts(name: str) -> list[str]:
    bare = _bare(name)
    last = bare.rpartition("/")[2]
    return [bare, bare.partition(":")[0], last, last.partition(":")[0]]

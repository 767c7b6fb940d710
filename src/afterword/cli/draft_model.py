"""The option `--draft-model`: finds the draft model, and refuses it if it cannot draft for a served model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.gguf_facts import Facts, read_facts
from afterword.models.gguf_header import read_header
from afterword.models.registry import Model, locate, parse_spec

_PADDING = b"[PAD"  # the beginning of the names that conversion programs give to tokens that only fill the matrix


@dataclass(frozen=True, slots=True)
class LocatedDraft:
    """A draft model."""

    model: Model
    facts: Facts


def find_draft(spec: str) -> LocatedDraft | None:
    """Find the draft model of the settings; None if they have none. Raises `SettingError`."""
    if not spec:
        return None
    model = locate(parse_spec(spec))
    facts = read_facts(model.path)
    if facts.state_bytes:
        raise SettingError(
            f"--draft-model {spec}: the state of {facts.architecture} models cannot be cut after a rejected token. "
            "Name a model without recurrent layers."
        )
    return LocatedDraft(model, facts)


def check_vocabularies(draft: LocatedDraft, served: Iterable[Path]) -> None:
    """Raise `SettingError` if the draft model has other tokens than a served model."""
    tokens = _tokens(draft.model.path)
    for path in served:
        if difference := _difference(tokens, _tokens(path)):
            raise SettingError(
                f"--draft-model {draft.model.path} has another vocabulary than {path}: {difference}. "
                "A draft model needs the same tokens with the same ids."
            )


def _tokens(path: Path) -> tuple[bytes, ...]:
    """The tokens of a file up to the last one that is no padding."""
    tokens = read_header(path).tokens
    end = len(tokens)
    while end and tokens[end - 1].startswith(_PADDING):
        end -= 1
    return tokens[:end]


def _difference(drafted: tuple[bytes, ...], served: tuple[bytes, ...]) -> str:
    """What differs between two vocabularies; empty if they are equal."""
    for number, (one, other) in enumerate(zip(drafted, served, strict=False)):
        if one != other:
            return f"token {number} is {_quoted(one)} and not {_quoted(other)}"
    return "" if len(drafted) == len(served) else f"it has {len(drafted):,} tokens and not {len(served):,}"


def _quoted(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace"))

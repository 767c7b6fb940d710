"""Writes and reads the tables of docs/architectures.md, which are made from verdicts and never by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import ROOT
from .judge import REQUESTS, Verdict

PAGE = ROOT / "docs" / "architectures.md"
_START, _END = "<!-- architectures -->", "<!-- /architectures -->"
_SHOWN = ("the same again", "with 30 more tokens", "its first half and yet others", "a chat's next turn")
_SHOWN_SCORED = "the same scored again"
_HEAD = (
    "| form | promise | reused: same, longer, half, chat, scored | the library computes | differences to the library "
    "| differences to itself | weights |\n|---|---|---|---|---|---|---|"
)
_REFUSED_HEAD = "| architecture | reason |\n|---|---|"


@dataclass(frozen=True, slots=True)
class Row:
    """What the page says about a form or an architecture. `promise` is empty if it is refused."""

    name: str
    promise: str
    text: str


def write(page: Path, forms: Mapping[str, Sequence[Verdict]]) -> None:
    """Replace the tables between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    _, mark, after = rest.partition(_END)
    assert mark, f"{page} has no {_START} and {_END}"
    page.write_text(f"{before}{_START}\n{tables(forms)}\n{_END}{after}", encoding="utf-8")


def tables(forms: Mapping[str, Sequence[Verdict]]) -> str:
    """The table of judged forms and the table of refused architectures. `forms`: the verdicts of each form."""
    judged = [_row(form, verdicts) for form, verdicts in forms.items() if not verdicts[0].refused]
    refused = [_refused(form, verdicts[0].refused) for form, verdicts in forms.items() if verdicts[0].refused]
    return "\n".join((_HEAD, *judged, "", "Refused:", "", _REFUSED_HEAD, *refused))


def read(page: Path) -> list[Row]:
    """The rows of the tables of a page."""
    text = page.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    judged, _, refused = text.partition(_REFUSED_HEAD)
    return [*_read(judged.partition(_HEAD)[2], promise=True), *_read(refused, promise=False)]


def _read(text: str, *, promise: bool) -> Iterable[Row]:
    for line in text.strip().splitlines():
        if match := re.fullmatch(r"\| (\S+) \| ([^|]*) \|(.*)", line):
            yield Row(match[1], match[2] if promise else "", line)


def _row(form: str, verdicts: Sequence[Verdict]) -> str:
    faults = [f"**{each.file_type}: {' '.join(each.faults)}**" for each in verdicts if each.faults]
    cells = (
        form,
        _by_type([(each.file_type, each.promise) for each in verdicts]),
        _by_type([(each.file_type, _reused(each)) for each in verdicts]),
        ", ".join(dict.fromkeys(part for each in verdicts for part in each.library)) or "nothing",
        " ".join(faults) or f"{_largest(verdicts)} (its own: {_spread(verdicts)})",
        _differences(verdicts),
        ", ".join(each.file_type for each in verdicts),
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _refused(form: str, reason: str) -> str:
    reason = reason.removeprefix("FILE ").replace("|", "/")
    return f"| {form} | {reason} |"


def _by_type(values: Sequence[tuple[str, str]]) -> str:
    """The value, or all values with their types of weights if they differ."""
    if len({value for _, value in values}) == 1:
        return values[0][1]
    return ", ".join(f"{value} ({kind})" for kind, value in values)


def _reused(verdict: Verdict) -> str:
    if not verdict.cached:
        return "–"
    counts = dict(zip(REQUESTS, verdict.cached, strict=True))
    return ", ".join(str(counts[name]) for name in (*_SHOWN, _SHOWN_SCORED))


def _largest(verdicts: Sequence[Verdict]) -> str:
    return f"{next((each.largest for each in verdicts if each.file_type == 'F32'), verdicts[-1].largest):.4f}"


def _spread(verdicts: Sequence[Verdict]) -> str:
    return f"{next((each.spread for each in verdicts if each.file_type == 'F32'), verdicts[-1].spread):.4f}"


def _differences(verdicts: Sequence[Verdict]) -> str:
    crowd, requests = sum(each.crowd for each in verdicts), sum(each.requests for each in verdicts)
    warm, all_warm = sum(each.warm for each in verdicts), len(REQUESTS) * len(verdicts)
    if not crowd + warm:
        return "none"
    drift = max(each.drift for each in verdicts)
    return f"{crowd} of {requests} concurrent, {warm} of {all_warm} cached, up to {drift:.2g} nats"

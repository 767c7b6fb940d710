"""A numbered rule, and what comes of holding a server to it: pass, fail with a reason, or not applicable."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from probe import Probe

Level = Literal["MUST", "SHOULD"]
MUST: Level = "MUST"
SHOULD: Level = "SHOULD"


class NotApplicable(Exception):
    """The server cannot be held to the rule; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """A rule and its check, which raises what it finds wrong. A number may have a part of either level."""

    number: int
    level: Level
    rule: str
    check: Callable[[Probe], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a case. `reason` is one line, empty for a pass."""

    case: Case
    result: Literal["pass", "FAIL", "n/a"]
    reason: str = ""


CASES: list[Case] = []
"""All cases, in the order in which they are written."""


def case(number: int, level: Level) -> Callable[[Callable[[Probe], None]], Callable[[Probe], None]]:
    """Add a function to the cases; its name is the rule."""

    def add(check: Callable[[Probe], None]) -> Callable[[Probe], None]:
        CASES.append(Case(number, level, check.__name__.replace("_", " "), check))
        return check

    return add


def judge(case: Case, probe: Probe) -> Verdict:
    """Hold a server to a case; whatever goes wrong is the server's."""
    try:
        case.check(probe)
    except NotApplicable as why:
        return Verdict(case, "n/a", str(why))
    except AssertionError as wrong:
        return Verdict(case, "FAIL", _one_line(str(wrong) or _statement(wrong)))
    except Exception as wrong:
        return Verdict(case, "FAIL", _one_line(f"{_statement(wrong)}: {type(wrong).__name__}: {wrong}"))
    return Verdict(case, "pass")


def report(verdicts: Iterable[Verdict]) -> int:
    """Print a line for each verdict as it comes, and a last one that counts them. Returns the exit status."""
    counts: Counter[tuple[str, str]] = Counter()
    width = max(len(case.rule) for case in CASES)
    for verdict in verdicts:
        case = verdict.case
        counts[case.level, verdict.result] += 1
        line = f"{case.number:>2}  {case.rule:<{width}}  {case.level:<6}  {verdict.result:<4}  {verdict.reason}"
        print(line.rstrip(), flush=True)
    print("; ".join(f"{level}: {_told(counts, level)}" for level in (MUST, SHOULD)))
    return 1 if counts[MUST, "FAIL"] else 0


def _told(counts: Counter[tuple[str, str]], level: str) -> str:
    """How many rules of a level the server keeps."""
    return f"{counts[level, 'pass']} pass, {counts[level, 'FAIL']} fail, {counts[level, 'n/a']} do not apply"


def _statement(wrong: Exception) -> str:
    """The line of the cases that found it."""
    frames = [frame for frame in traceback.extract_tb(wrong.__traceback__) if frame.filename.endswith("cases.py")]
    return (frames[-1].line or "").removeprefix("assert ") if frames else ""


def _one_line(text: str, longest: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."

"""Cases, which are numbered rules with a check, and verdicts: pass, fail with a reason, or not applicable."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from probe import Probe

Level = Literal["MUST", "SHOULD", "EXT"]
MUST: Level = "MUST"
SHOULD: Level = "SHOULD"
EXT: Level = "EXT"


class NotApplicable(Exception):
    """The rule cannot be checked on this server; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Case:
    """A rule and its check, which raises an exception if the rule is broken. Cases can share a number."""

    number: int
    level: Level
    rule: str
    check: Callable[[Probe], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a case. `reason` is one line, empty for a pass."""

    case: Case
    result: Literal["pass", "FAIL", "n/a"]
    reason: str = ""


CASES: list[Case] = []
"""All cases, in the order of their definition."""


def case(number: int, level: Level) -> Callable[[Callable[[Probe], None]], Callable[[Probe], None]]:
    """A decorator that adds a function to the cases. Its name is the rule."""

    def add(check: Callable[[Probe], None]) -> Callable[[Probe], None]:
        CASES.append(Case(number, level, check.__name__.replace("_", " "), check))
        return check

    return add


def judge(case: Case, probe: Probe) -> Verdict:
    """Run a case. Every exception of its check except `NotApplicable` is a failure of the server."""
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
    """Print a line for each verdict when it is known, and then the counts. Returns the exit status."""
    counts: Counter[tuple[str, str]] = Counter()
    width = max(len(case.rule) for case in CASES)  # no extension has a longer name
    for verdict in verdicts:
        case = verdict.case
        counts[case.level, verdict.result] += 1
        line = f"{case.number:>2}  {case.rule:<{width}}  {case.level:<6}  {verdict.result:<4}  {verdict.reason}"
        print(line.rstrip(), flush=True)
    levels = [level for level in (MUST, SHOULD, EXT) if any(found == level for found, _ in counts)]
    print("; ".join(f"{level}: {_counts_text(counts, level)}" for level in levels))
    return 1 if counts[MUST, "FAIL"] or counts[EXT, "FAIL"] else 0


def _counts_text(counts: Counter[tuple[str, str]], level: str) -> str:
    return f"{counts[level, 'pass']} pass, {counts[level, 'FAIL']} fail, {counts[level, 'n/a']} do not apply"


def _statement(wrong: Exception) -> str:
    """The source line of a file with cases in which the exception was raised."""
    files = ("cases.py", "extensions.py")
    frames = [frame for frame in traceback.extract_tb(wrong.__traceback__) if frame.filename.endswith(files)]
    return (frames[-1].line or "").removeprefix("assert ") if frames else ""


def _one_line(text: str, longest: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."

"""Afterword with `--strict` passes all cases; tests of the verdicts and of the report."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES
from verdict import MUST, SHOULD, Case, NotApplicable, Verdict, judge, report


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number:02} {case.rule}")
def test_case(case: Case, api: Any) -> None:
    try:
        case.check(api)
    except NotApplicable as why:
        pytest.skip(str(why))


def test_every_number_has_a_case() -> None:
    assert [case.number for case in CASES] == sorted(case.number for case in CASES)
    assert {case.number for case in CASES} == set(range(1, 75))


def test_the_reason_of_a_verdict_is_one_line() -> None:
    def passes(_: Any) -> None:
        return

    def does_not_apply(_: Any) -> None:
        raise NotApplicable("no key was given")

    def fails(_: Any) -> None:
        raise AssertionError("the message is\n'nope'")

    found = [judge(Case(1, MUST, "a rule", check), None) for check in (passes, does_not_apply, fails)]  # type: ignore[arg-type]
    assert [(verdict.result, verdict.reason) for verdict in found] == [
        ("pass", ""),
        ("n/a", "no key was given"),
        ("FAIL", "the message is 'nope'"),
    ]


def test_the_exit_status_is_1_if_a_must_fails(capsys: pytest.CaptureFixture[str]) -> None:
    must, should = (next(case for case in CASES if case.level == level) for level in (MUST, SHOULD))
    assert report([Verdict(must, "pass"), Verdict(should, "FAIL", "it is not so")]) == 0
    assert report([Verdict(must, "FAIL"), Verdict(should, "n/a")]) == 1
    assert "SHOULD  FAIL  it is not so\nMUST: 1 pass, 0 fail" in capsys.readouterr().out

"""Each field that a request can have has a conformance case, and Afterword passes those of its extensions."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from cases import EXAMPLE
from extensions import EXTENSIONS as CASES
from extensions import NOT_ON_THE_BUILT_IN_MODEL, Extension, check_extension, extension_cases
from verdict import NotApplicable, Verdict, report

from afterword.completion import request
from afterword.completion.request_limits import STRICT, RequestLimits


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.field)
def test_extension(case: Extension, extended: Any) -> None:
    check_extension(case, extended, NOT_ON_THE_BUILT_IN_MODEL)


def test_a_field_that_a_server_refuses_must_be_known() -> None:
    def refuses(_: Any) -> None:
        raise NotApplicable("some_field is refused by name")

    refused, served = Extension("some_field", refuses), Extension("some_field", lambda _: None)
    check_extension(refused, None, {"some_field"})  # type: ignore[arg-type]
    check_extension(served, None)  # type: ignore[arg-type]
    for case, known in ((refused, set[str]()), (served, {"some_field"})):
        with pytest.raises(AssertionError, match="some_field"):
            check_extension(case, None, known)  # type: ignore[arg-type]


class Refusing:
    """A server that refuses every request with this error."""

    token, eos_ban = 5, {"0": -100}

    def __init__(self, param: str | None, message: str) -> None:
        self.answer = httpx.Response(400, json={"error": {"param": param, "message": message}})

    def ask(self, **_: Any) -> httpx.Response:
        return self.answer


DECAY = next(case for case in CASES if case.field == "adaptive_decay")


@pytest.mark.parametrize(
    ("param", "refused"),
    [("adaptive_decay", {"adaptive_decay"}), ("adaptive_target", {"adaptive_decay", "adaptive_target"})],
)
def test_a_refusal_names_the_field_or_another_refused_one(param: str, refused: set[str]) -> None:
    check_extension(DECAY, Refusing(param, "no"), refused)  # type: ignore[arg-type]


@pytest.mark.parametrize("param", ["temperature", "adaptive_target", "seed", None])
def test_a_refusal_of_another_field_is_none_of_the_field(param: str | None) -> None:
    """Also if the text of the error names the field."""
    with pytest.raises(AssertionError):
        check_extension(DECAY, Refusing(param, "adaptive_decay"), {"adaptive_decay"})  # type: ignore[arg-type]


def options_of(limits: RequestLimits) -> set[str]:
    """The members of `stream_options`."""
    return set(request.FIELDS["stream_options"].schema(limits)["properties"])


def test_every_field_of_a_request_has_a_case() -> None:
    nested = {f"stream_options.{name}" for name in options_of(RequestLimits()) - options_of(STRICT)}
    assert sorted(case.field for case in CASES) == sorted({*request.EXTENSIONS, *nested})
    assert {*EXAMPLE, "model"} == set(request.FIELDS), "the example has all of OpenAI's own fields"


@pytest.mark.parametrize("name", sorted(request.EXTENSIONS))
def test_strict_refuses_an_extension_by_name(api: Any, name: str) -> None:
    assert name in api.refused(name, prompt="a", **{name: 1})["message"]


def test_a_failed_extension_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = extension_cases()
    assert report(Verdict(each, "pass") for each in others) == 0
    assert report([Verdict(first, "FAIL", "it is not so")]) == 1
    assert "EXT: 0 pass, 1 fail" in capsys.readouterr().out

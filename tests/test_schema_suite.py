"""The command for the public JSON-Schema-Test-Suite, on a suite of four schemas of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afterword.engine.grammar import schema_rewriting
from bench import schema_suite


def case(data: Any, valid: bool) -> dict[str, Any]:
    return {"description": f"{data} is {valid}", "data": data, "valid": valid}


GROUPS = [
    {"description": "pair", "schema": {"required": ["b", "a"], "properties": {"a": {"const": 1}}}, "tests": []},
    {"description": "not", "schema": {"not": {}}, "tests": [case(1, True)]},
    {"description": "date", "schema": {"format": "date"}, "tests": [case("2021-02-29", False)]},
    {"description": "list", "schema": {"items": {"enum": ["é"]}}, "tests": [case(["é"], True), case([1], False)]},
]
GROUPS[0]["tests"] = [case({"b": {"c": [2]}, "a": 1}, True), case({"a": 2, "b": 1}, False), case({"a": 1}, False)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "optional").mkdir()
    (tmp_path / "some.json").write_text(json.dumps(GROUPS[:2]), "utf-8")
    (tmp_path / "optional" / "others.json").write_text(json.dumps(GROUPS[2:]), "utf-8")
    return tmp_path


def test_schemas_are_compiled_or_refused_and_instances_followed(folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        schema_suite.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert {line.strip() for line in lines if line} == {
        "4 schemas", "1 schemas refused", "4 invalid rejected", "2 valid accepted",
    }  # fmt: skip


def test_an_instance_that_should_be_excluded_is_a_fault(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(schema_rewriting, "FORMATS", {})
    with pytest.raises(SystemExit) as ended:
        schema_suite.main([str(folder)])
    assert ended.value.code == 1
    assert "invalid instance accepted: optional/others.json: date: 2021-02-29 is False" in capsys.readouterr().out


def test_answers_are_validated() -> None:
    findings = schema_suite.Findings()

    class Response:
        status_code = 200

        def __init__(self, answer: Any) -> None:
            self.json = lambda: answer

    class Server:
        def post(self, path: str, json: Any) -> Response:
            if path == "/tokenize":
                return Response({"tokens": [7]})
            texts = (("stop", '{"a":1,"b":[1e999]}'), ("stop", "{"), ("stop", '{"a":2,"b":1}'), ("length", "{"))
            return Response({"choices": [{"finish_reason": reason, "text": text} for reason, text in texts]})

    schema_suite.check_answers(Server(), "pair", GROUPS[0], 4, findings)  # type: ignore[arg-type]
    assert findings.counts == {"answers valid": 1, "answer invalid": 2, "answers cut off": 1}

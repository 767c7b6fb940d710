"""`afterword ps`: the models of a running server, and its errors."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from afterword.cli import main


def ps(*words: str) -> Result:
    return CliRunner().invoke(main, ["ps", *words], env={"OPENAI_API_KEY": None})


def test_a_server_without_keys_shows_the_load_of_each_model(serve: Any) -> None:
    with serve("--parallel", "3", "--context", "1024", key=None) as server:
        head, row = ps("--url", server.url).stdout.splitlines()
        assert head.split() == ["NAME", "STATUS", "CONTEXT", "SEQUENCES", "RUNNING", "WAITING"]
        assert row.split() == [server.model, "ready", "1,024", "3", "0", "0"]
        found = json.loads(ps("--url", f"{server.url}/v1/", "--json").stdout)
        assert found["status"] == "ready"
        assert [model["id"] for model in found["models"]] == [server.model]


def test_a_further_name_of_a_model_has_the_load_of_its_engine(serve: Any, tmp_path: Path) -> None:
    defaults = tmp_path / "defaults.toml"
    defaults.write_text('[edits]\nmodel = "afterword-tiny"\n')
    with serve("--parallel", "3", "--defaults", str(defaults), key=None) as server:
        rows = [row.split() for row in ps("--url", server.url).stdout.splitlines()[1:]]
    assert sorted(row[0] for row in rows) == ["afterword-tiny", "edits"]
    assert [row[3:] for row in rows] == [["3", "0", "0"]] * 2


def test_a_server_with_keys_needs_one_and_shows_no_load(server: Any) -> None:
    refused = ps("--url", server.url)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "API key" in refused.stderr
    _, row = ps("--url", server.url, "--api-key", server.key).stdout.splitlines()
    assert row.split() == [server.model, "ready", "2,048", "-", "-", "-"]


def test_an_address_without_a_server_is_an_error_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    failed = ps("--url", f"http://127.0.0.1:{port}")
    assert (failed.exit_code, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
    assert "Start one with afterword serve" in failed.stderr
    assert ps("--url", "127.0.0.1").exit_code == 2

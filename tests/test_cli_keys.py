"""`afterword keys` and `afterword usage`: output and one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from afterword.cli import main
from afterword.config import Config
from afterword.keys.key import Allowance
from afterword.keys.key_store import KeyStore, UsageCounts, UsageKey, UsageUpdate

Command = Callable[..., Result]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "afterword" / "keys.db"


@pytest.fixture
def afterword(key_file: Path) -> Command:
    """Runs a command with a temporary default key file."""
    home = {"XDG_DATA_HOME": str(key_file.parent.parent)}
    return lambda *words, **env: CliRunner().invoke(main, words, env=home | env, prog_name="afterword")


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr


def test_create_prints_only_the_key_to_standard_output(afterword, key_file):
    result = afterword("keys", "create")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"aw_[0-9a-f]{8}_[A-Za-z0-9_-]{43}\n", result.stdout)
    assert "not shown again" in result.stderr
    assert [key.id for key in KeyStore(key_file).all()] == [result.stdout.split("_")[1]]


def test_a_key_has_the_given_limits(afterword):
    limits = ("--rpm", "60", "--tpm", "1000", "--concurrent", "2", "--quota", "5000")
    made = afterword("keys", "create", "--name", "alice", "--expires", "30d", *limits)
    (key,) = json.loads(afterword("keys", "list", "--json").stdout)
    assert (key["id"], key["name"], key["state"]) == (made.stdout.split("_")[1], "alice", "active")
    assert key["expires"] - key["created"] == 30 * 24 * 3600
    assert (key["requests"], key["tokens"], key["concurrent"], key["quota"], key["spent"]) == (60, 1000, 2, 5000, 0)
    assert "digest" not in key


def test_the_list_shows_all_keys_and_never_their_text(afterword):
    keys = [afterword("keys", "create", "--name", name).stdout.strip() for name in ("a", "b")]
    assert afterword("keys", "revoke", keys[0].split("_")[1]).exit_code == 0
    head, *rows = afterword("keys", "list").stdout.splitlines()
    assert head.split()[:2] == ["ID", "state"]
    assert sorted(row.split()[1] for row in rows) == ["active", "revoked"]
    assert not any(key[12:] in row for key in keys for row in rows)


def test_the_list_of_keys_fits_a_narrow_terminal(key_file):
    store = KeyStore(key_file, create=True)
    for name in ("alice", ""):
        store.create(name, 2_000_000_000, Allowance(60, 1_000_000, 2, 5_000_000_000))
    words = [sys.executable, "-m", "afterword", "keys", "list", "--keys-file", str(key_file)]
    reader, writer = os.openpty()
    subprocess.run(words, stdout=writer, env=os.environ | {"COLUMNS": "80"}, check=True)
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    for key in store.all():
        assert f"{key.id}  active  {key.name}".rstrip() in lines
    assert "tokens spent 0 of 5,000,000,000" in " ".join(shown.split())
    assert "ID" in subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout.decode().split()


@pytest.mark.parametrize("words", [("keys", "list"), ("keys", "revoke", "x"), ("usage",), ("serve", "--keys")])
def test_without_a_key_file_the_error_names_keys_create(afterword, key_file, words):
    assert "afterword keys create" in refusal(afterword(*words))
    assert not key_file.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create", "--expires", "soon"), "30d"),
        (("create", "--name", "a\nb"), "printable"),
        (("create", "--name", "x" * 65), "64"),
        (("revoke", "unknown"), "keys list"),
    ],
)
def test_invalid_arguments_are_one_line_errors(afterword, words, message):
    afterword("keys", "create")
    assert message in refusal(afterword("keys", *words))


@pytest.mark.parametrize("words", [("keys", "create"), ("keys", "list"), ("usage",), ("serve", "--keys")])
def test_a_file_that_others_can_read_is_refused_by_every_command(afterword, key_file, words):
    afterword("keys", "create")
    key_file.chmod(0o644)
    assert "chmod 600" in refusal(afterword(*words))


def test_a_path_that_cannot_be_written_is_a_one_line_error(afterword, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in refusal(afterword("keys", "create", "--keys-file", str(tmp_path / "file" / "keys.db")))


def test_the_key_file_can_be_set_by_option_or_environment(afterword, key_file, tmp_path):
    other = tmp_path / "other.db"
    assert afterword("keys", "create", "--keys-file", str(other)).exit_code == 0
    assert afterword("keys", "create", AFTERWORD_KEYS_FILE=str(other)).exit_code == 0
    assert len(KeyStore(other).all()) == 2
    assert not key_file.exists()


def test_usage_is_shown_by_key_user_and_day(afterword, key_file):
    text = afterword("keys", "create", "--name", "alice's").stdout
    store = KeyStore(key_file)
    name, user = text.split("_")[1], store.pseudonym("bob")
    used = {
        UsageKey(name, user, "2026-01-01"): UsageCounts(1, 2000, 3, 4),
        UsageKey(name, "", "2026-01-02"): UsageCounts(5, 6, 7, 0),
    }
    store.sync(UsageUpdate({}, used))
    assert afterword("usage").stdout.splitlines() == [
        "key       requests  prompt  cached  completion  name",
        f"{name}  6         2,006   4       10          alice's",
    ]
    assert [row["user"] for row in json.loads(afterword("usage", "--by", "user", "--json").stdout)] == [None, user]
    assert json.loads(afterword("usage", "--by", "day", "--user", "bob", "--json").stdout) == [
        {"day": "2026-01-01", "requests": 1, "prompt": 2000, "completion": 3, "cached": 4}
    ]
    assert "bob" not in afterword("usage", "--by", "user").stdout


def test_empty_usage_is_not_an_error(afterword):
    afterword("keys", "create")
    assert afterword("usage", "--json").stdout == "[]\n"
    assert afterword("usage").exit_code == 0


def test_a_key_file_is_sufficient_for_a_public_host(key_file):
    assert Config(host="0.0.0.0", keys_file=key_file).requires_key

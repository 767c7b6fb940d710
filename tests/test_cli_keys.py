"""`afterword keys` and `afterword usage` as a person meets them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from afterword.cli import main
from afterword.config import Config
from afterword.keys.key_store import KeyStore, UsageCounts, UsageKey, UsageUpdate

Command = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "data" / "afterword" / "keys.db"


@pytest.fixture
def afterword(place: Path) -> Command:
    """Runs a command where the default place is a temporary one."""
    home = {"XDG_DATA_HOME": str(place.parent.parent)}
    return lambda *words, **env: CliRunner().invoke(main, words, env=home | env, prog_name="afterword")


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, "one sentence"
    return result.stderr


def test_create_prints_the_key_alone_so_that_scripts_can_take_it(afterword, place):
    result = afterword("keys", "create")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"aw_[0-9a-f]{8}_[A-Za-z0-9_-]{43}\n", result.stdout)
    assert "not shown again" in result.stderr
    assert [key.id for key in KeyStore(place).all()] == [result.stdout.split("_")[1]]


def test_a_key_has_what_it_was_given(afterword):
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


@pytest.mark.parametrize("words", [("keys", "list"), ("keys", "revoke", "x"), ("usage",), ("serve", "--keys")])
def test_without_any_key_it_says_how_to_make_one(afterword, place, words):
    assert "afterword keys create" in refusal(afterword(*words))
    assert not place.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "--expires", "soon"), "30d"),
        (("create", "--name", "a\nb"), "printable"),
        (("create", "--name", "x" * 65), "64"),
        (("revoke", "nobody"), "keys list"),
    ],
)
def test_bad_words_are_one_sentence(afterword, words, said):
    afterword("keys", "create")
    assert said in refusal(afterword("keys", *words))


@pytest.mark.parametrize("words", [("keys", "create"), ("keys", "list"), ("usage",), ("serve", "--keys")])
def test_a_file_that_others_can_read_is_refused_by_every_command(afterword, place, words):
    afterword("keys", "create")
    place.chmod(0o644)
    assert "chmod 600" in refusal(afterword(*words))


def test_a_place_that_cannot_be_written_is_one_sentence(afterword, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in refusal(afterword("keys", "create", "--keys-file", str(tmp_path / "file" / "keys.db")))


def test_the_place_can_be_named_for_one_command_or_for_all(afterword, place, tmp_path):
    other = tmp_path / "other.db"
    assert afterword("keys", "create", "--keys-file", str(other)).exit_code == 0
    assert afterword("keys", "create", AFTERWORD_KEYS_FILE=str(other)).exit_code == 0
    assert len(KeyStore(other).all()) == 2
    assert not place.exists()


def test_usage_is_shown_by_key_user_and_day(afterword, place):
    text = afterword("keys", "create", "--name", "alice's").stdout
    store = KeyStore(place)
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


def test_nothing_used_is_no_error(afterword):
    afterword("keys", "create")
    assert afterword("usage", "--json").stdout == "[]\n"
    assert afterword("usage").exit_code == 0


def test_a_store_of_keys_is_enough_to_listen_beyond_this_machine(place):
    assert Config(host="0.0.0.0", keys_file=place).requires_key

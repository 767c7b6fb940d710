"""`--metrics-keys` and `--metrics-underscores`: counters for each API key, and names without colons."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from completion_requests import complete, wait_until
from prometheus_client.parser import text_string_to_metric_families

from afterword.keys.key import Allowance
from afterword.keys.key_store import KeyStore
from afterword.observability.key_counters import OTHER_KEYS, KeyCounters

_UNITS = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
"""Abbreviations that `promtool check metrics` refuses in names (promlint of client_golang, `LintUnitAbbreviations`)."""


def counted(counters: KeyCounters) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in counters.families("p_")
        for sample in family.samples
    }


def test_at_most_the_given_number_of_keys_is_counted_apart() -> None:
    counters = KeyCounters(2)
    for key in ("a", "b", "c", "d", "a", "c"):
        counters.add(key, 200, 3, 5)
    counters.add("b", 429)
    assert counted(counters) == {
        ("p_key_requests_total", "a", "2xx"): 2,
        ("p_key_requests_total", "b", "2xx"): 1,
        ("p_key_requests_total", "b", "4xx"): 1,
        ("p_key_requests_total", OTHER_KEYS, "2xx"): 3,
        ("p_key_tokens_total", "a", "prompt"): 6,
        ("p_key_tokens_total", "a", "generated"): 10,
        ("p_key_tokens_total", "b", "prompt"): 3,
        ("p_key_tokens_total", "b", "generated"): 5,
        ("p_key_tokens_total", OTHER_KEYS, "prompt"): 9,
        ("p_key_tokens_total", OTHER_KEYS, "generated"): 15,
    }


def test_without_the_option_keys_are_not_counted() -> None:
    counters = KeyCounters(0)
    counters.add("a", 200, 1, 1)
    assert counted(counters) == {}


def test_a_server_counts_its_keys_under_names_that_promtool_accepts(serve: Any, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db", create=True)
    free, text = store.create()
    limited, limited_text = store.create(allowance=Allowance(requests=1))
    options = ("--keys-file", str(store.path), "--metrics-keys", "1", "--metrics-underscores", "--parallel", "1")
    with serve(*options, key=None) as server, server.http(text) as http, server.http(limited_text) as other:
        usage = complete(http, prompt="Once", max_tokens=4, ignore_eos=True)["usage"]
        assert [other.get("/version").status_code for _ in range(2)] == [200, 429]

        def values() -> dict[tuple[str, ...], float]:
            families = text_string_to_metric_families(http.get("/metrics").text)
            return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

        prefix = "afterword_key_"
        wait_until(lambda: values().get((f"{prefix}requests_total", OTHER_KEYS, "4xx")) == 1)
        found = values()
        assert found[f"{prefix}requests_total", OTHER_KEYS, "2xx"] == 1
        assert found[f"{prefix}requests_total", free.id, "2xx"] >= 1
        assert found[f"{prefix}tokens_total", free.id, "prompt"] == usage["prompt_tokens"]
        assert found[f"{prefix}tokens_total", free.id, "generated"] == 4
        assert not [key for key in found if limited.id in key]
        for line in http.get("/metrics").text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split()
                assert re.fullmatch("[a-z][a-z0-9_]*", name), name
                assert name.endswith("_total") == (kind == "counter"), name
                assert not _UNITS & set(name.split("_")), name


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not installed")
def test_promtool_has_no_complaint_about_names_with_underscores(serve: Any) -> None:
    with serve("--metrics-underscores", "--parallel", "1", key=None) as server, server.http() as http:
        text = http.get("/metrics").text
    check = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (check.returncode, check.stdout + check.stderr) == (0, "")

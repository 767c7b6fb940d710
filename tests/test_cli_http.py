"""Tests of the command line of `--engine http`: the upstream's address and key, and settings without a meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afterword.cli import http_setup, main
from afterword.cli.model_setup import WantedModels
from afterword.config import EngineSettings
from afterword.engine.http.program import base_url
from afterword.engine.messages import LoadUpstream
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ModelManager
from afterword.errors import SettingError

URL = "http://127.0.0.1:8000"
DEFAULT = EngineSettings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    for name in ("config", "tokenizer"):
        (path / f"{name}.json").write_text(json.dumps({"max_position_embeddings": 77}))
    return path


def manager(folder: Path, settings: EngineSettings = DEFAULT, **options: Any) -> ModelManager:
    options = {"upstream": URL, "upstream_key_file": None, "keep_alive": 60.0} | options
    policy = QueuePolicy(queue_seconds=7.0, upstream_seconds=8.0)
    return http_setup.make_http_manager(WantedModels([str(folder)]), settings, options, policy, 20)


def load_message(models: ModelManager) -> LoadUpstream:
    (model,) = models
    message = model.definition.make_engine()._settings
    assert isinstance(message, LoadUpstream)
    return message


def test_the_worker_is_told_the_upstream_and_the_limits(folder, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    settings = EngineSettings(context=50, parallel=3, infill_template="{prefix}{suffix}", verbose=True)
    message = load_message(manager(folder, settings, upstream=f"{URL}/v1/", upstream_key_file=key))
    assert message == LoadUpstream(str(folder), URL, 3, 20, 8.0, 7.0, "secret", 50, "{prefix}{suffix}", True)


def test_the_sizes_are_known_before_the_first_load(folder):
    (model,) = manager(folder)
    assert (model.shape.context, model.shape.sequences) == (76, http_setup.SAMPLES)


@pytest.mark.parametrize(
    "url", [URL, f"{URL}/", f"{URL}/v1", "https://host/v1/", "http://[::1]:8000", "http://h/prefix"]
)
def test_addresses_of_servers_are_accepted(url):
    assert not base_url(url).endswith(("/", "/v1"))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:0", "http://[", "http://h?x=1"]
)
def test_other_addresses_are_refused(folder, url):
    with pytest.raises(SettingError, match=r"--upstream .* is not the URL of a server"):
        manager(folder, upstream=url)


@pytest.mark.parametrize(
    "url",
    [
        *("http://exämple..com", f"http://{'a' * 64}.com", "http://a b", "http://host:99999", "http://h#x"),
        *(f"{URL}\n", f"{URL}/v1\n", f" {URL}", "http://h\n.com", "http://h/\x00"),
    ],
)
def test_hosts_and_characters_that_no_connection_can_have_are_refused(folder, url):
    with pytest.raises(SettingError, match=r"--upstream .* is not the URL of a server") as caught:
        manager(folder, upstream=url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://user:secret@host", "http://secret@host:80/v1", "ftp://u:secret/@h", "x:secret@"]
)
def test_credentials_in_the_address_are_refused_and_not_repeated(folder, url):
    with pytest.raises(SettingError, match=r"no password.*--upstream-key-file") as caught:
        manager(folder, upstream=url)
    assert "secret" not in str(caught.value)


def test_the_upstream_must_be_given(folder):
    with pytest.raises(SettingError, match="--engine http needs --upstream URL"):
        manager(folder, upstream=None)


@pytest.mark.parametrize("content", ["", "two words", "two\nlines", "\x01", "ä"])
def test_a_file_without_a_key_is_refused(folder, tmp_path, content):
    key = tmp_path / "key"
    key.write_text(content)
    with pytest.raises(SettingError, match=r"--upstream-key-file .* one line with an API key"):
        manager(folder, upstream_key_file=key)
    with pytest.raises(SettingError, match=r"--upstream-key-file .* cannot be read"):
        manager(folder, upstream_key_file=tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"kv_type": "f16"}, "--kv-type"), ({"threads": 2}, "--threads")],
)
def test_settings_of_the_built_in_engine_are_refused(folder, settings, option):
    with pytest.raises(SettingError, match=f"{option} cannot be used with --engine http"):
        manager(folder, EngineSettings(**settings))


def test_a_folder_must_be_given():
    options = {"upstream": URL, "upstream_key_file": None, "keep_alive": None}
    with pytest.raises(SettingError, match="--engine http needs a MODEL"):
        http_setup.make_http_manager(WantedModels(), EngineSettings(), options, QueuePolicy(), 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--upstream", URL), "--upstream: give --engine http too"),
        (("--engine", "vllm", "--upstream", URL), "--upstream: give --engine http too"),
        (("--engine", "http", "--upstream", URL, "--vllm-python", "x"), "--vllm-python: give --engine vllm too"),
        (("--limit", "upstream_seconds=0.5"), "upstream_seconds must be at least 1"),
    ],
)
def test_options_of_another_engine_are_refused(folder, words, message, capsys):
    with pytest.raises(SystemExit):
        main(["serve", str(folder), *words])
    assert message in capsys.readouterr().err

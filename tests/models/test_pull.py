"""Tests of downloads from a simulated Hub in this process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import Mock
from urllib.parse import parse_qsl, unquote, urlsplit

import huggingface_hub
import pytest
from gguf_writer import TENSORS, cache, gguf, write
from huggingface_hub import constants, file_download

from afterword.errors import SettingError
from afterword.models.download_staging import partial_bytes
from afterword.models.fetch import DownloadObserver
from afterword.models.pull import parse_hub_spec, pull
from afterword.models.registry import installed, locate, parse_spec

GOOD = gguf()
COMMIT = "c" * 40


@dataclass
class Hub:
    """The state of the simulated Hub.

    - `files`: the files of each repository.
    - `listed`, `hashes`: sizes and SHA-256 that the Hub lists instead of the real ones.
    - `requests`: the received requests; `ranges`: the start offsets of range requests.
    - `resumes`: whether the Hub honours range requests.
    """

    files: dict[str, dict[str, bytes]]
    listed: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    resumes: bool = True


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download needs."""

    hub: Hub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/models":
            word = dict(parse_qsl(urlsplit(self.path).query))["search"].lower()
            return self.reply_json([{"id": name} for name in self.hub.files if word in name.lower()])
        if path == "api/models/owner/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if path == "api/models/owner/forbidden":
            return self.reply(403, b"")
        files = self.hub.files.get(path.removeprefix("api/models/"))
        if files is not None:
            siblings = [self.sibling(name, data) for name, data in files.items()]
            return self.reply_json({"id": path, "siblings": siblings})
        repository, _, name = path.partition("/resolve/main/")
        data = self.hub.files.get(repository, {}).get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name.replace("/", "")}{len(data)}"'}
        if self.command == "GET" and (start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            self.hub.ranges.append(int(start[1]))
            if self.hub.resumes:
                headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
                return self.reply(206, data[int(start[1]) :], headers)
        return self.reply(200, data, headers)

    do_HEAD = do_GET  # noqa: N815 - the name is given by http.server

    def sibling(self, name: str, data: bytes) -> dict[str, object]:
        size = self.hub.listed.get(name, len(data))
        digest = self.hub.hashes.get(name, hashlib.sha256(data).hexdigest())
        large = {"lfs": {"size": size, "sha256": digest, "pointerSize": 1}} if name.endswith(".gguf") else {}
        return {"rfilename": name, "size": size, **large}

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in an environment without other settings of the Hub's library."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one repository."""
    hub = Hub({"owner/repo": {"README.md": b"", "m-Q8_0.gguf": GOOD, "m-Q4_0.gguf": GOOD}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def error_message(text: str) -> str:
    with pytest.raises(SettingError) as caught:
        pull(parse_spec(text))
    return caught.value.message


def test_the_preferred_file_is_downloaded_once(hub: Hub, home: Path) -> None:
    model = pull(parse_spec("hf:owner/repo"))
    assert (model.id, model.source, model.path.name) == ("owner/repo:Q8_0", "hub", "m-Q8_0.gguf")
    assert model.path.read_bytes() == GOOD
    assert home in model.path.parents
    assert locate(parse_spec("hf:owner/repo")) == model
    assert model in installed()
    hub.requests.clear()
    assert pull(parse_spec("hf:owner/repo")) == model
    assert hub.requests == []


@pytest.mark.parametrize("wanted", ["q4_0", "m-Q4_0.gguf"])
def test_a_file_is_chosen_by_quantization_or_name(hub: Hub, wanted: str) -> None:
    assert pull(parse_spec(f"hf:owner/repo:{wanted}")).path.name == "m-Q4_0.gguf"


def test_all_parts_of_a_split_model_are_downloaded(hub: Hub) -> None:
    split = {"split.count": 2, "split.no": 0}
    parts = {
        "Q8_0/m-Q8_0-00001-of-00002.gguf": gguf(split, tensors={}),
        "Q8_0/m-Q8_0-00002-of-00002.gguf": gguf({**split, "split.no": 1}, TENSORS, values={}),
    }
    hub.files["owner/split"] = parts
    model = pull(parse_spec("hf:owner/split"))
    assert model.id == "owner/split:Q8_0"
    assert model.path.name == "m-Q8_0-00001-of-00002.gguf"
    hub.files["owner/half"] = dict(list(parts.items())[:1])
    assert "owner/half lacks Q8_0/m-Q8_0-00002-of-00002.gguf" in error_message("hf:owner/half")


def test_a_model_on_this_machine_needs_no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cache(home, "owner/repo", COMMIT, ["m-Q8_0.gguf"])
    assert pull(parse_spec("hf:owner/repo")).id == "owner/repo:Q8_0"
    path = write(home / "local.gguf", GOOD)
    assert pull(parse_spec(str(path))).path == path
    assert "hf:owner/repo:Q4_0 could not be downloaded. Check the connection" in error_message("hf:owner/repo:Q4_0")


def test_offline_mode_forbids_downloads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert error_message("hf:owner/repo").endswith("HF_HUB_OFFLINE forbids downloading it.")
    assert hub.requests == []


def test_a_damaged_copy_is_replaced(hub: Hub) -> None:
    path = pull(parse_spec("hf:owner/repo")).path
    path.resolve().write_bytes(GOOD[:-1])
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD


def test_a_file_of_another_size_is_refused(hub: Hub) -> None:
    hub.listed["m-Q8_0.gguf"] = len(GOOD) + 1
    message = error_message("hf:owner/repo")
    assert message.startswith(f"m-Q8_0.gguf has {len(GOOD)} bytes, but the Hub lists {len(GOOD) + 1}.")


def test_an_invalid_model_file_is_refused(hub: Hub) -> None:
    hub.files["owner/repo"]["m-Q8_0.gguf"] = b"<html>"
    assert "it seems to be a web page" in error_message("hf:owner/repo")


def test_no_matching_file(hub: Hub) -> None:
    assert error_message("hf:owner/repo:Q6_K") == (
        "owner/repo has no file that matches 'Q6_K'. Write hf:owner/repo:FILE with one of: m-Q4_0.gguf, m-Q8_0.gguf."
    )


def test_messages_for_refusals_of_the_hub(hub: Hub) -> None:
    assert error_message("hf:ownr/repo") == (
        "The Hub has no visible repository ownr/repo. Check the spelling (did you mean owner/repo?), "
        "or set HF_TOKEN if it is private."
    )
    assert "no visible repository zzz/zzz. Check the spelling, or" in error_message("hf:zzz/zzz")
    gated = error_message("hf:owner/gated")
    assert gated.startswith("owner/gated is gated. Request access at http://127.0.0.1:")
    assert gated.endswith("/owner/gated, then set HF_TOKEN.")
    assert "refused hf:owner/forbidden with status 403" in error_message("hf:owner/forbidden")


def test_a_disk_without_enough_free_space(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert "hf:owner/repo needs 0.00 GiB, but" in error_message("hf:owner/repo")
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_file_with_a_wrong_hash_is_not_kept(hub: Hub, home: Path) -> None:
    hub.hashes["m-Q8_0.gguf"] = hashlib.sha256(b"something else").hexdigest()
    assert error_message("hf:owner/repo").startswith("m-Q8_0.gguf has another SHA-256 than the Hub lists.")
    assert not list((home / "hub").glob("models--*")), "nothing came into the cache"
    assert sum("GET /owner/repo/resolve" in request for request in hub.requests) == 2, "it was tried again"
    hub.hashes.clear()
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD


@pytest.mark.parametrize("written", [0, 1, len(GOOD) // 2, len(GOOD) - 1])
def test_a_disk_that_becomes_full_during_a_download(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    get = file_download.http_get

    def fill(url: str, file: Any, **more: Any) -> None:
        get(url, FullDisk(file, written), **more)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", fill)
        assert error_message("hf:owner/repo").startswith("The disk is full. Free disk space")
        assert not list((home / "hub").glob("models--*")), "the cache is unchanged"
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD
    assert not list((home / "hub").glob(".pull--*"))


class FullDisk:
    """A file on a disk with `free` bytes of free space."""

    def __init__(self, file: Any, free: int) -> None:
        self.file, self.free = file, free

    def write(self, data: bytes) -> int:
        part = data[: max(0, self.free)]
        self.free -= len(data)
        self.file.write(part)
        if len(part) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_concurrent_pulls_of_the_same_file_all_succeed(hub: Hub, home: Path) -> None:
    """Even if file locks do not work; then the cache of the Hub's library would mix the bytes of the processes."""
    hub.files["owner/repo"]["m-Q8_0.gguf"] = large = gguf() + bytes(3 << 20)
    code = (
        "import contextlib, sys; from huggingface_hub import file_download; "
        "file_download.WeakFileLock = lambda *_, **__: contextlib.nullcontext(); "
        "from afterword.models.pull import pull; from afterword.models.registry import parse_spec; "
        "sys.stdout.write(str(pull(parse_spec('hf:owner/repo:Q8_0')).path))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {Path(path).read_bytes() == large for path in paths} == {True}
    assert not list((home / "hub").glob(".pull--*"))


def test_the_folder_of_a_dead_process_is_reused(hub: Hub, home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    for name in (
        f"owner--repo--{socket.gethostname()}--{ended.pid}",
        "owner--repo--elsewhere--1",
        "owner--other--here--1",
    ):
        write(home / "hub" / f".pull--{name}" / "left", b"")
    pull(parse_spec("hf:owner/repo"))
    assert len(list((home / "hub").glob(".pull--*"))) == 2, "other machines' and repositories' folders remain"


def test_bytes_of_interrupted_downloads_are_counted(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    prefix = f".pull--owner--repo--{socket.gethostname()}--"
    write(home / "hub" / f"{prefix}{ended.pid}" / "blobs" / "one.part", bytes(1000))
    write(home / "hub" / f"{prefix}{os.getpid()}" / "blobs" / "mine.part", bytes(200))
    write(home / "hub" / f"{prefix}{os.getppid()}" / "blobs" / "another.part", bytes(30))  # its process is alive
    (home / "hub" / f"{prefix}{ended.pid}" / "moved.part").symlink_to("elsewhere")  # a file that disappeared
    assert partial_bytes(home / "hub", "owner/repo") == 1200


def test_a_disk_that_becomes_full(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert error_message("hf:owner/repo").startswith("The disk is full. Free disk space")


# ---- interrupted downloads, progress and suggestions


class RecordingObserver(DownloadObserver):
    """Records all notifications."""

    def __init__(self) -> None:
        self.files: list[tuple[str, int, int]] = []
        self.bytes = 0
        self.choices: list[tuple[str, list[str]]] = []
        self.checked: list[str] = []

    def selected(self, name: str, among: Sequence[str]) -> None:
        self.choices.append((name, list(among)))

    def started(self, name: str, size: int, downloaded: int) -> None:
        self.files.append((name, size, downloaded))
        self.bytes = downloaded

    def received(self, count: int) -> None:
        self.bytes += count

    def checking(self, name: str) -> None:
        self.checked.append(name)


def interrupt_pull(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Pull, and fail after `kept` bytes of a file."""
    get = file_download.http_get

    def stop(url: str, file: Any, **more: Any) -> None:
        get(url, FullDisk(file, kept), **more)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", stop)
        error_message("hf:owner/repo")


@pytest.mark.parametrize("resumes", [True, False], ids=["resumed", "the Hub starts again"])
@pytest.mark.parametrize("kept", [1, len(GOOD) // 2, len(GOOD) - 1])
def test_an_interrupted_pull_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch, kept: int, resumes: bool) -> None:
    interrupt_pull(monkeypatch, kept)
    hub.resumes = resumes
    observer = RecordingObserver()
    assert pull(parse_spec("hf:owner/repo"), observer).path.read_bytes() == GOOD
    assert hub.ranges == [kept]
    assert observer.files == [("m-Q8_0.gguf", len(GOOD), kept)]
    assert observer.bytes == len(GOOD)


def test_a_partial_file_with_wrong_content_is_replaced(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_pull(monkeypatch, 100)
    (part,) = home.rglob("*.part")
    part.write_bytes(b"x" * 100)
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD
    assert hub.ranges == [100], "the second attempt begins at the start"


def test_a_partial_file_that_is_too_long_is_replaced(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_pull(monkeypatch, 100)
    (part,) = home.rglob("*.part")
    part.write_bytes(bytes(len(GOOD) + 1))
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD


def test_partial_downloads_reduce_the_needed_disk_space(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_pull(monkeypatch, len(GOOD) - 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(256 << 20) + 10))
    assert pull(parse_spec("hf:owner/repo")).path.read_bytes() == GOOD


def test_the_observer_is_notified(hub: Hub) -> None:
    observer = RecordingObserver()
    pull(parse_spec("hf:owner/repo"), observer)
    assert observer.choices == [("m-Q8_0.gguf", ["m-Q4_0.gguf"])]
    assert (observer.files, observer.bytes) == ([("m-Q8_0.gguf", len(GOOD), 0)], len(GOOD))
    assert observer.checked == ["m-Q8_0.gguf"]
    observer_of_named_file = RecordingObserver()
    pull(parse_spec("hf:owner/repo:Q4_0"), observer_of_named_file)
    assert observer_of_named_file.choices == []


def test_repositories_with_a_similar_name_are_suggested(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["maker/model"] = {"model.safetensors": b""}
    hub.files["other/Model-GGUF"] = {"m-Q8_0.gguf": GOOD}
    assert (
        error_message("hf:maker/model")
        == "maker/model contains no GGUF model. Repositories with GGUF files of this model: other/Model-GGUF."
    )
    assert parse_hub_spec("owner/repo:Q4_0") == parse_spec("hf:owner/repo:Q4_0")
    for text in ("model", "model:Q8_0"):
        with pytest.raises(SettingError, match=r"lacks the owner\. Repositories on the Hub: maker/model, other"):
            parse_hub_spec(text)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SettingError, match=r"model lacks the owner, and HF_HUB_OFFLINE forbids searching"):
            parse_hub_spec("model")
    with monkeypatch.context() as unreachable:
        search = Mock(side_effect=OSError("no route to host"))
        unreachable.setattr("huggingface_hub.utils.get_session", lambda: Mock(get=search))
        with pytest.raises(SettingError, match=r"the Hub could not be searched for it \(no route to host\)"):
            parse_hub_spec("model")
        assert search.call_count == 1, "the user waits for each attempt"
    for text in ("nothing-like-it", "afterword-tiny", "./model.gguf", "model.gguf"):
        with pytest.raises(SettingError, match="is not on the Hub"):
            parse_hub_spec(text)

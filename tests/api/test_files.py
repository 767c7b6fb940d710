"""`/v1/files`: an upload is stored completely or not at all, and each API key sees only its own files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from completion_requests import problem

ONE, OTHER = "sk-one-0123456789", "sk-other-0123456789"
LARGEST = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "batches"


@pytest.fixture(scope="module")
def files(serve: Any, folder: Path) -> Iterator[httpx.Client]:
    """A client with the first of two API keys, on a server with a small storage quota."""
    limits = ("--limit", f"max_upload={LARGEST}", "--limit", f"max_stored={4 * LARGEST}")
    where = ("--batch-dir", str(folder), "--api-key", OTHER)
    with serve("--parallel", "2", *limits, *where, key=ONE) as server, server.http() as client:
        yield client


@pytest.fixture
def sdk(files: httpx.Client) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False) as transport,
        openai.OpenAI(base_url=f"{files.base_url}/v1", api_key=ONE, max_retries=0, http_client=transport) as client,
    ):
        yield client


def upload(http: httpx.Client, content: bytes = b"{}\n", purpose: str = "batch", **more: Any) -> httpx.Response:
    parts = {"file": ("in.jsonl", content)} | more.pop("files", {})
    return http.post("/v1/files", data={"purpose": purpose} | more.pop("data", {}), files=parts, **more)


def test_no_folder_is_created_before_the_first_upload(files, folder):
    assert files.get("/v1/files").json()["data"] == []
    assert files.get("/v1/batches").json()["data"] == []
    problem(files.get("/v1/files/file-1"), 404)
    problem(files.get("/v1/batches/batch_1"), 404)
    problem(files.post("/v1/batches/batch_1/cancel"), 404)
    body = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
    problem(files.post("/v1/batches", json=body), 404)
    assert not folder.exists()


def test_the_official_client_uploads_and_downloads_files(sdk, files):
    content = b'{"prompt": "a"}\n' * 5000
    file = sdk.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("in.jsonl", len(content), "batch", "processed")
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).read() == content
    assert file.id in [each.id for each in sdk.files.list(purpose="batch")]
    assert sdk.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(file.id)


def test_a_file_expires_after_the_requested_time(sdk):
    file = sdk.files.create(
        file=("in.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert file.expires_at == file.created_at + 7200
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.create(file=("in.jsonl", b"{}"), purpose="batch").expires_at is None
    for each in sdk.files.list():
        sdk.files.delete(each.id)


def test_responses_match_the_openapi_document(files):
    document = files.get("/openapi.json").json()

    def check(name: str, value: object) -> None:
        described = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema_rs.validate(described, value)

    file = upload(files).json()
    check("File", file)
    check("Files", files.get("/v1/files").json())
    check("DeletedFile", files.delete(f"/v1/files/{file['id']}").json())


def test_files_are_listed_in_pages(files):
    names = [upload(files).json()["id"] for _ in range(3)]
    page = files.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in page["data"]] == [names[2], names[1]]
    assert page["has_more"]
    rest = files.get("/v1/files", params={"limit": 1, "after": page["last_id"]}).json()
    assert [file["id"] for file in rest["data"]] == [names[0]]
    oldest = files.get("/v1/files", params={"order": "asc", "limit": 1}).json()
    assert [file["id"] for file in oldest["data"]] == [names[0]]
    for name in names:
        files.delete(f"/v1/files/{name}")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=10001", "order=up", "purpose=x", "page=2", "limit=1&limit=2"]
)
def test_invalid_query_parameters_are_refused_by_name(files, query):
    assert problem(files.get(f"/v1/files?{query}"), 400)["param"] == query.partition("=")[0]


def test_another_key_cannot_see_a_file(files):
    file = upload(files).json()["id"]
    other = {"headers": {"Authorization": f"Bearer {OTHER}"}}
    for response in (
        files.get(f"/v1/files/{file}", **other),
        files.get(f"/v1/files/{file}/content", **other),
        files.delete(f"/v1/files/{file}", **other),
    ):
        assert problem(response, 404)["code"] == "not_found"
    assert files.get("/v1/files", **other).json()["data"] == []
    assert files.delete(f"/v1/files/{file}").json()["deleted"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"data": {"expires_after[seconds]": "3600"}}, "expires_after[anchor]"),
        ({"data": {"expires_after[anchor]": "created_at"}}, "expires_after[seconds]"),
        ({"data": {"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}}, "expires_after[anchor]"),
        ({"data": {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}}, "expires_after[seconds]"),
        ({"data": {"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e4"}}, "expires_after[seconds]"),
        ({"data": {"expires_after[days]": "1"}}, "expires_after[days]"),
        ({"files": {"other": ("a", b"b")}}, "file"),
        ({"data": {"purpose": "x" * 2000}}, "purpose"),
    ],
)
def test_an_invalid_form_field_is_refused_by_name(files, folder, more, param):
    assert problem(upload(files, **more), 400)["param"] == param
    assert not list((folder / "files").iterdir())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\nno header\r\n\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nb',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 100_000),
    ],
)
def test_a_malformed_form_is_refused_and_leaves_no_file(files, folder, kind, body):
    problem(files.post("/v1/files", content=body, headers={"Content-Type": kind}), 400)
    assert not list((folder / "files").iterdir())


def test_a_file_may_not_be_too_large(files, folder):
    assert upload(files, b"x" * LARGEST).status_code == 200
    problem(upload(files, b"x" * (LARGEST + 1)), 413)

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 10_000

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(files.post("/v1/files", content=chunks(), headers=kind), 413)
    assert len(list((folder / "files").iterdir())) == 1


def test_a_key_has_so_much_room_and_no_more(files):
    while (response := upload(files, b"x" * LARGEST)).status_code == 200:
        pass
    assert problem(response, 400)["code"] == "storage_limit_reached"
    for file in files.get("/v1/files").json()["data"]:
        files.delete(f"/v1/files/{file['id']}")


def test_concurrent_uploads_share_one_storage_quota(files, folder):
    """Ten concurrent uploads, each of which would fit alone. The refused ones leave no file."""
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: upload(files, b"x" * LARGEST), range(10)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 400}
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 400} == {
        "storage_limit_reached"
    }
    kept = list((folder / "files").iterdir())
    assert len(kept) == statuses.count(200) <= 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in kept)
    for file in files.get("/v1/files").json()["data"]:
        files.delete(f"/v1/files/{file['id']}")
    assert not list((folder / "files").iterdir())
    assert upload(files, b"x" * LARGEST).status_code == 200


def test_an_upload_may_have_one_line_per_chunk(files):
    """A client may send each line in its own chunk: here 20,000 chunks."""
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    rows = [head, *([b"{}\n"] * 20_000), b"\r\n--x--\r\n"]
    answer = files.post("/v1/files", content=iter(rows), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] == 60_000


@pytest.mark.parametrize("name", ["thesis.txt", "files/thesis.txt"])
def test_a_folder_with_other_files_is_refused_at_the_start(tmp_path, name):
    (tmp_path / "files").mkdir()
    (tmp_path / name).write_bytes(b"text")
    command = [sys.executable, "-m", "afterword", "serve", "--port", "0", "--batch-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--batch-dir" in done.stderr
    assert (tmp_path / name).read_bytes() == b"text"


def test_an_upload_may_be_larger_than_other_bodies(serve, tmp_path):
    where = ("--batch-dir", str(tmp_path / "batches"), "--limit", "max_body=1000")
    with serve("--parallel", "1", *where, key=None) as server, server.http() as client:
        problem(client.post("/v1/completions", json={"prompt": "x" * 2000}), 413)
        assert upload(client, b"x" * 2_000_000).json()["bytes"] == 2_000_000
        assert json.loads(client.get("/v1/files").content)["data"][0]["bytes"] == 2_000_000


def test_a_second_server_with_the_same_folder_refuses_uploads(serve, files, folder):
    upload(files)
    with serve("--parallel", "1", "--batch-dir", str(folder), key=None) as server, server.http() as client:
        assert "--batch-dir" in problem(upload(client), 507)["message"]
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200

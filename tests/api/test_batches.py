"""`/v1/batches` with the official client and a real server, which one test kills while a batch runs."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from completion_requests import problem, wait_until

from afterword.keys.key import Allowance
from afterword.keys.key_store import KeyStore

FINAL = ("completed", "failed", "cancelled", "expired")
CREATE: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"}


@contextmanager
def sdk(url: str, key: str = "none") -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False) as transport,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=transport) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def served(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    where = ("--batch-dir", str(tmp_path_factory.mktemp("batches")), "--limit", "max_batches=5")
    with serve("--parallel", "4", *where, key=None) as server:
        yield server


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with sdk(served.url) as client:
        yield client


@pytest.fixture
def http(served: Any) -> Iterator[httpx.Client]:
    with served.http() as client:
        yield client


def line(name: str, **body: Any) -> bytes:
    wrapped = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(wrapped).encode()


def create_batch(client: openai.OpenAI, *lines: bytes, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, **CREATE, **more)


def wait_for_end(client: openai.OpenAI, batch: Any) -> Any:
    wait_until(lambda: client.batches.retrieve(batch.id).status in FINAL)
    return client.batches.retrieve(batch.id)


def lines(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(each) for each in client.files.content(file).text.splitlines()]


def test_the_official_client_runs_a_batch(client, http):
    rows = [
        line(f"r{number}", prompt=f"Once {number}", max_tokens=3, n=0 if number == 4 else 1) for number in range(12)
    ]
    batch = create_batch(client, *rows, metadata={"run": "7"})
    assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    assert batch.expires_at - batch.created_at == 24 * 3600
    batch = wait_for_end(client, batch)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"run": "7"}, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (12, 11, 1)
    answers = lines(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [f"r{number}" for number in range(12) if number != 4]
    assert all(each["response"]["status_code"] == 200 for each in answers)
    used = sum(each["response"]["body"]["usage"]["completion_tokens"] for each in answers)
    assert batch.usage.output_tokens == used
    (error,) = lines(client, batch.error_file_id)
    assert (error["custom_id"], error["response"]["body"]["error"]["param"]) == ("r4", "n")
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    document = http.get("/openapi.json").json()
    for name, value in (("Batch", http.get(f"/v1/batches/{batch.id}")), ("Batches", http.get("/v1/batches"))):
        described = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema_rs.validate(described, value.json())


def test_a_batch_line_has_the_response_of_a_single_request(client, http):
    batch = wait_for_end(client, create_batch(client, line("a", prompt="Once upon", max_tokens=12, seed=5, logprobs=2)))
    row = lines(client, batch.output_file_id)[0]["response"]["body"]
    alone = http.post("/v1/completions", json={"prompt": "Once upon", "max_tokens": 12, "seed": 5, "logprobs": 2})
    assert row["choices"] == alone.json()["choices"]


def test_an_invalid_input_file_fails_with_its_line_numbers(client):
    batch = wait_for_end(
        client, create_batch(client, line("a", prompt="b"), b"{no", line("a", prompt="c"), line("d", stream=True))
    )
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
        ("stream_not_supported", 4),
    ]
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_a_cancelled_batch_ends_early_and_batches_are_listed_in_pages(client, http):
    batch = create_batch(
        client, *(line(str(number), prompt="a", max_tokens=400, ignore_eos=True) for number in range(400))
    )
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    file = batch.input_file_id
    assert problem(http.delete(f"/v1/files/{file}"), 409)["code"] == "file_in_use"
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait_for_end(client, batch)
    assert batch.status == "cancelled"
    assert 0 < len(lines(client, batch.output_file_id)) == batch.request_counts.completed < 400
    assert client.files.delete(file).deleted
    page = client.batches.list(limit=1)
    assert [each.id for each in page.data] == [batch.id]
    assert batch.id not in [each.id for each in client.batches.list(limit=1, after=batch.id).data]


def test_those_for_whom_somebody_waits_do_not_wait_for_batches(client, http):
    batch = create_batch(
        client, *(line(str(number), prompt="a", max_tokens=400, ignore_eos=True) for number in range(200))
    )
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    for _ in range(3):
        assert http.get("/ready").json()["running"] <= 2  # half of the sequences are for batches
        assert http.post("/v1/completions", json={"prompt": "b", "max_tokens": 2}).status_code == 200
    assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)
    wait_for_end(client, batch)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ],
)
def test_invalid_batch_fields_are_refused_by_name(http, change, param):
    assert problem(http.post("/v1/batches", json=CREATE | {"input_file_id": "file-1"} | change), 400)["param"] == param


def test_unknown_query_parameters_of_lists_are_refused(http):
    for query in ("limit=101", "limit=0", "status=failed"):
        assert problem(http.get(f"/v1/batches?{query}"), 400)["param"] == query.partition("=")[0]


def test_a_server_that_is_killed_goes_on_when_it_starts_again(tmp_path):
    command = [
        sys.executable,
        "-m",
        "afterword",
        "serve",
        "--port",
        "0",
        "--parallel",
        "4",
        "--batch-dir",
        str(tmp_path),
    ]

    @contextmanager
    def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                yield process, next(each.strip() for each in process.stdout if each.strip().startswith("http://"))
            finally:
                process.kill()

    rows = [line(str(number), prompt=f"Once {number}", max_tokens=20, ignore_eos=True) for number in range(60)]
    with server() as (process, url), sdk(url) as client:
        batch = create_batch(client, *rows)
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server() as (_, url), sdk(url) as client:
        batch = wait_for_end(client, batch)
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
        assert [each["custom_id"] for each in lines(client, batch.output_file_id)] == [str(n) for n in range(60)]


def test_batch_lines_are_charged_to_their_key_and_stop_at_its_quota(serve, tmp_path):
    store = KeyStore(tmp_path / "keys.db", create=True)
    key, text = store.create("a", allowance=Allowance(quota=200))
    where = ("--keys-file", str(tmp_path / "keys.db"), "--batch-dir", str(tmp_path / "batches"))
    with serve("--parallel", "2", *where, key=None) as server, sdk(server.url, text) as client:
        rows = [line(str(number), prompt="Once", max_tokens=20, ignore_eos=True) for number in range(20)]
        batch = wait_for_end(client, create_batch(client, *rows))
        assert batch.status == "completed"
        assert 0 < batch.request_counts.completed < 20
        codes = {each["response"]["body"]["error"]["code"] for each in lines(client, batch.error_file_id)}
        assert codes == {"insufficient_quota"}
    used = dict(store.usage("key"))[key.id]
    assert used.completion == batch.usage.output_tokens
    assert used.prompt + used.completion <= 200


def test_lines_of_a_revoked_key_are_refused(serve, tmp_path):
    store = KeyStore(tmp_path / "keys.db", create=True)
    key, text = store.create("a")
    _, other = store.create("b")
    where = ("--keys-file", str(tmp_path / "keys.db"), "--batch-dir", str(tmp_path / "batches"))
    with (
        serve("--parallel", "2", *where, key=None) as server,
        sdk(server.url, text) as client,
        sdk(server.url, other) as b,
    ):
        batch = create_batch(client, *(line(str(n), prompt="a", max_tokens=400, ignore_eos=True) for n in range(200)))
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
        with pytest.raises(openai.NotFoundError):
            b.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            b.batches.create(input_file_id=batch.input_file_id, **CREATE)
        store.revoke(key.id)
        folder = tmp_path / "batches" / "files"

        def complete_files() -> list[Path]:  # the input file, the output file and the error file
            return [path for path in folder.iterdir() if path.suffix != ".part"]

        wait_until(lambda: len(complete_files()) == 3)
        rows = [json.loads(row) for path in complete_files() for row in path.read_bytes().splitlines()]
        refused = [row for row in rows if row.get("response") and row["response"]["status_code"] == 401]
        assert refused
        assert {row["response"]["body"]["error"]["code"] for row in refused} == {"invalid_api_key"}


def test_a_full_disk_leaves_no_partial_upload(serve, tmp_path):
    """A limit of the size of the server's files has the same effect as a full disk: writes fail."""
    batches = tmp_path / "batches"
    rows = b"\n".join(line(str(number), prompt="a", max_tokens=1) for number in range(1000))
    with serve("--parallel", "1", "--batch-dir", str(batches), key=None) as server, server.http() as http:
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (50_000, hard))
        error = problem(http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", rows)}), 507)
        assert error["code"] == "storage_failed"
        assert str(tmp_path) not in error["message"]
        assert not list((batches / "files").iterdir())
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        response = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", rows)})
        assert response.json()["bytes"] == len(rows)


def test_the_error_for_an_unusable_folder_omits_its_path(serve, tmp_path):
    (tmp_path / "files").write_bytes(b"")
    with serve("--parallel", "1", "--batch-dir", str(tmp_path), key=None) as server, server.http() as http:
        response = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"{}")})
        assert str(tmp_path) not in problem(response, 507)["message"]

"""A Python client that openapi-python-client generates from `/openapi.json`: whole and streamed responses, and files.

Such a client has a class for each schema and a function for each operation. Its functions read whole responses only, so
a stream is opened with the client's own transport and the arguments that the function would send.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import httpx
import pytest

from docs_blocks import read

if find_spec("openapi_python_client") is None:
    pytest.skip("openapi_python_client is not installed: make clients", allow_module_level=True)

PACKAGE = "afterword_client"
ASKED = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0.0, "seed": 7}
LINE = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "One", "max_tokens": 2}}\n'


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").raise_for_status().json()
    return found


@pytest.fixture(scope="module")
def package(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The generated package. The generator leaves out what it does not understand, with a warning; there is none."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    # Without its formatters, which are programs of their own.
    (folder / "settings.json").write_text(json.dumps({"post_hooks": []}), encoding="utf-8")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none"]
    options = ["--config", "settings.json", "--output-path", PACKAGE]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout.upper() + done.stderr.upper()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(PACKAGE)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def models(package: ModuleType) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.models")


@pytest.fixture(scope="module")
def operation(package: ModuleType) -> Any:
    """The module of an operation, by tag and name."""
    return lambda tag, name: importlib.import_module(f"{package.__name__}.api.{tag}.{name}")


@pytest.fixture(scope="module")
def generated(package: ModuleType, server: Any) -> Iterator[Any]:
    """The generated client, with the API key of the server."""
    with package.AuthenticatedClient(base_url=server.url, token=server.key, httpx_args={"trust_env": False}) as client:
        yield client


def snake(name: str) -> str:
    return re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name)


def test_every_operation_has_a_function_in_its_group(document: dict[str, Any], operation: Any) -> None:
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    for each in operations:
        module = operation(each["tags"][0], snake(each["operationId"]))
        assert callable(module.sync_detailed), each["operationId"]
        assert callable(module.asyncio_detailed), each["operationId"]


def test_every_schema_has_a_class_that_keeps_its_examples(document: dict[str, Any], models: ModuleType) -> None:
    for name, schema in document["components"]["schemas"].items():
        made = getattr(models, name)
        for example in schema["examples"]:
            kept = made.from_dict(example).to_dict()
            assert {member: kept[member] for member in example} == example, name


def test_a_completion_with_log_probabilities_and_usage(
    generated: Any, models: ModuleType, operation: Any, http: httpx.Client
) -> None:
    body = models.CompletionRequest(**ASKED, logprobs=2)
    found = operation("completions", "create_completion").sync(client=generated, body=body)
    expected = http.post("/v1/completions", json=ASKED | {"logprobs": 2}).raise_for_status().json()
    assert isinstance(found, models.Completion)
    assert found.choices[0].text == expected["choices"][0]["text"]
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].logprobs.to_dict() == expected["choices"][0]["logprobs"]
    assert found.usage.to_dict() == expected["usage"]
    assert found.usage.completion_tokens == 12


def test_a_stream_and_its_usage(generated: Any, models: ModuleType, operation: Any, http: httpx.Client) -> None:
    body = models.CompletionRequest.from_dict(ASKED | {"stream": True, "stream_options": {"include_usage": True}})
    arguments = operation("completions", "create_completion")._get_kwargs(body=body)
    with generated.get_httpx_client().stream(**arguments) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [models.Chunk.from_dict(json.loads(event)) for event in events[:-1]]
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    expected = http.post("/v1/completions", json=ASKED).raise_for_status().json()
    assert "".join(texts) == expected["choices"][0]["text"]
    assert sum(map(bool, texts)) > 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    counts = {name: expected["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert {name: getattr(chunks[-1].usage, name) for name in counts} == counts


def test_the_example_of_the_document(
    package: ModuleType, serve: Any, capsys: pytest.CaptureFixture[str], http: httpx.Client
) -> None:
    (block,) = (each for each in read("docs/api.md") if PACKAGE in each.text and each.language == "python")
    with serve("--parallel", "2", key=None) as server:
        exec(compile(block.text.replace("http://127.0.0.1:8000", server.url), block.place, "exec"), {})
    asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    text = http.post("/v1/completions", json=asked).raise_for_status().json()["choices"][0]["text"]
    assert capsys.readouterr().out == f"{text} 8\n{text}"


def test_an_error_names_the_field(generated: Any, models: ModuleType, operation: Any) -> None:
    body = models.CompletionRequest(prompt="a", max_tokens=-1)
    found = operation("completions", "create_completion").sync_detailed(client=generated, body=body)
    assert found.status_code == 400
    assert isinstance(found.parsed, models.Error)
    assert found.parsed.error.param == "max_tokens"


def test_tokens_and_their_text(generated: Any, operation: Any) -> None:
    tokenize, detokenize = operation("tokenizer", "tokenize"), operation("tokenizer", "detokenize")
    bodies = [importlib.import_module(f"{PACKAGE}.models.{name}_body") for name in ("tokenize", "detokenize")]
    tokens = tokenize.sync(client=generated, body=bodies[0].TokenizeBody(prompt="The sea", add_special_tokens=False))
    text = detokenize.sync(client=generated, body=bodies[1].DetokenizeBody(tokens=tokens.tokens))
    assert tokens.count == len(tokens.tokens)
    assert text.prompt == "The sea"


def test_a_file_is_uploaded_listed_read_and_deleted(generated: Any, models: ModuleType, operation: Any) -> None:
    types = importlib.import_module(f"{PACKAGE}.types")
    upload = types.File(payload=LINE, file_name="in.jsonl", mime_type="application/jsonl")
    body = models.CreateFileBody.from_dict({"purpose": "batch", "file": None})
    body.file = upload
    made = operation("files", "create_file").sync(client=generated, body=body)
    assert made.bytes_ == len(LINE)
    assert made.id in [each.id for each in operation("files", "list_files").sync(client=generated).data]
    content = operation("files", "download_file").sync_detailed(id=made.id, client=generated)
    assert content.content == LINE
    assert operation("files", "delete_file").sync(id=made.id, client=generated).deleted is True

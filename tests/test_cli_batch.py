"""`afterword batch`: output, continuation after a stop, one-line errors, `--plan`, progress."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from afterword.batch.batch_job import Progress
from afterword.batch.journal import BatchCounts, Journal
from afterword.batch.output_lines import ServerReply
from afterword.cli import batch_run, main
from afterword.cli.batch_progress import facts, show_progress
from afterword.errors import BatchStopped

MakeReply = Callable[[dict[str, Any]], ServerReply]
ROWS = [
    {"prompt": "Once", "max_tokens": 3},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The sea", "max_tokens": 3}},
    {"prompt": "a", "n": 0},
]
EPOCH = {"SOURCE_DATE_EPOCH": "1700000000", "NO_PROXY": "127.0.0.1"}


def afterword(*words: object, **environment: str) -> Result:
    words = ("batch", *map(str, words))
    return CliRunner().invoke(main, words, env=EPOCH | environment, prog_name="afterword")


def refusal(*words: object) -> str:
    result = afterword(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{no\n")
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def answer(_: dict[str, Any]) -> ServerReply:
    return ServerReply(200, b'{"id":"x","usage":{"prompt_tokens":1,"completion_tokens":1}}')


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the model by a function that makes the replies."""

    def serve(choose: MakeReply = answer, fingerprint: str = "f") -> None:
        @asynccontextmanager
        async def asking(_: object) -> AsyncIterator[Any]:
            async def send(method: str, path: str, body: bytes) -> ServerReply:
                await asyncio.sleep(0)
                if method == "GET":
                    models = [{"id": "m", "system_fingerprint": fingerprint}]
                    return ServerReply(200, json.dumps({"data": models, "sequences": 2}).encode())
                return ServerReply(200, b'{"count":5}') if path == "/tokenize" else choose(json.loads(body))

            yield send

        monkeypatch.setattr(batch_run, "_open_client", asking)

    serve()
    return serve


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- with a model


def test_a_model_answers_every_line_in_order(source, output):
    result = afterword(source, "-o", output)
    assert result.exit_code == 0, result.output
    assert "4 lines, 2 of them errors" in result.stderr
    lines = read(output)
    assert [line["custom_id"] for line in lines] == ["row-1", "b", "row-3", None]
    assert [line["response"] and line["response"]["status_code"] for line in lines] == [200, 200, 400, None]
    assert lines[0]["response"]["body"]["created"] == 1700000000
    assert lines[2]["response"]["body"]["error"]["param"] == "n"
    assert sorted(path.name for path in output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]
    again = source.parent / "again.jsonl"
    assert afterword(source, "-o", again, "--concurrency", 1).exit_code == 0
    assert again.read_bytes() == output.read_bytes()


def test_a_batch_on_a_server_stops_without_an_api_key_and_runs_with_it(source, output, http):
    url, key = str(http.base_url), http.headers["authorization"].split()[1]
    stopped = afterword(source, "-o", output, "--url", url)
    assert stopped.exit_code == 75
    assert "API key" in stopped.stderr
    assert "Run the same command again" in stopped.stderr
    result = afterword(source, "-o", output, "--url", f"{url}/v1", "--json", OPENAI_API_KEY=key)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["rows"], printed["completed"], printed["failed"]) == (4, 2, 2)
    assert printed["completion_tokens"] == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in read(output)[:2]
    )


# ---- continuation


def test_a_complete_output_is_not_computed_again(source, output, fake):
    assert afterword(source, "-o", output).exit_code == 0
    before = output.read_bytes()

    def never(_: object) -> ServerReply:
        raise AssertionError

    fake(never)
    result = afterword(source, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert "already" in result.stderr
    assert json.loads(result.stdout)["completed"] == 3
    assert output.read_bytes() == before


def test_a_stopped_batch_exits_with_75_and_can_be_continued(source, output, fake):
    def full(request: dict[str, Any]) -> ServerReply:
        if request["prompt"] == "a":
            raise BatchStopped("The disk is full.")
        return answer(request)

    fake(full)
    result = afterword(source, "-o", output, "--concurrency", 1)
    assert result.exit_code == 75
    assert "The disk is full. Run the same command again to continue." in result.stderr
    assert not output.exists()
    fake()
    result = afterword(source, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["done_before"] >= 1
    assert len(read(output)) == 4


def test_ctrl_c_keeps_answers_and_says_how_to_continue(source, output, fake):
    def interrupt(request: dict[str, Any]) -> ServerReply:
        os.kill(os.getpid(), signal.SIGINT)
        return answer(request)

    fake(interrupt)
    result = afterword(source, "-o", output)
    assert result.exit_code == 130, result.output
    assert "Run the same command again" in result.stderr
    fake()
    assert afterword(source, "-o", output).exit_code == 0


def test_a_changed_input_is_refused(source, output, fake):
    stop_before_the_first_answer(source, output, fake)
    source.write_text(source.read_text() + "{}\n")
    assert "has changed since" in refusal(source, "-o", output)
    assert afterword(source, "-o", output, "--restart").exit_code == 0
    assert len(read(output)) == 5


def test_a_changed_model_is_refused(source, output, fake):
    stop_before_the_first_answer(source, output, fake)
    fake(fingerprint="g")
    assert "The model m or its settings have changed" in refusal(source, "-o", output)
    assert afterword(source, "-o", output, "--restart").exit_code == 0


def stop_before_the_first_answer(source: Path, output: Path, fake: Callable[..., None]) -> None:
    def stop(_: object) -> ServerReply:
        raise BatchStopped("Stopped.")

    fake(stop)
    assert afterword(source, "-o", output).exit_code == 75
    fake()


def test_a_second_process_is_refused(source, output, fake):
    stop_before_the_first_answer(source, output, fake)
    journal = Journal(Path(f"{output}.journal"))
    assert "Another process" in refusal(source, "-o", output)
    assert "Another process" in refusal(source, "-o", output, "--restart")
    journal.close()
    assert afterword(source, "-o", output).exit_code == 0


def test_another_file_is_not_overwritten(source, output, fake):
    output.write_text("mine\n")
    assert "is not the output of" in refusal(source, "-o", output)
    assert output.read_text() == "mine\n"
    assert afterword(source, "-o", output, "--restart").exit_code == 0
    assert len(read(output)) == 4


def test_another_file_under_the_journals_name_is_refused(source, output, fake):
    Path(f"{output}.journal").write_bytes(b"something else entirely, " * 100)
    assert "is not a journal" in refusal(source, "-o", output)
    assert afterword(source, "-o", output, "--restart").exit_code == 0


# ---- settings


def test_invalid_arguments_are_one_line_errors(source, output, tmp_path):
    assert "-o" in refusal(source)
    assert "is the input file" in refusal(source, "-o", source)
    assert "is not a regular file" in refusal(tmp_path / "none", "-o", output)
    assert "Give only one" in refusal(source, "model.gguf", "-o", output, "--url", "http://x")
    assert "http://HOST" in refusal(source, "-o", output, "--url", "localhost:8000")
    assert "cannot be opened" in refusal(source, "-o", tmp_path / "none" / "out")
    assert "does not exist" in refusal(source, "nothing-here.gguf", "-o", output)


def test_an_empty_input_has_an_empty_output(tmp_path, output, fake):
    (tmp_path / "in").write_bytes(b"\n\n")
    assert afterword(tmp_path / "in", "-o", output).exit_code == 0
    assert output.read_bytes() == b""


# ---- the plan


def test_a_plan_counts_and_lists_its_estimates(tmp_path, fake):
    source = tmp_path / "in"
    rows = [{"prompt": f"the same beginning {number}", "max_tokens": 10, "n": 2} for number in range(4)]
    rows += [{"prompt": [[1, 2, 3], [4]], "max_tokens": 10}, {"prompt": [1, 2, 9]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no\n")
    result = afterword(source, "--plan", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["rows"], printed["faulty"]) == (7, 1)
    assert printed["prompt_tokens"] == 4 * 5 + 4 + 3
    assert printed["most_completion_tokens"] == 4 * 2 * 10 + 2 * 10 + 16
    assert 3 * 4 <= printed["shared_tokens"] <= 3 * 5 + 2
    assert printed["timed"] == 1
    assert printed["estimates"] == ["shared_tokens", "seconds"]
    assert "7, of which 1 are faulty" in afterword(source, "--plan").stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_plan_of_a_large_file_is_estimated_from_a_sample(tmp_path, fake):
    source = tmp_path / "in"
    source.write_text("".join(json.dumps({"prompt": "a" * (1 + number % 9)}) + "\n" for number in range(1000)))
    printed = json.loads(afterword(source, "--plan", "--json").stdout)
    assert (printed["rows"], printed["sampled"]) == (1000, 256)
    assert "prompt_tokens" in printed["estimates"]
    assert 1 <= printed["timed"] <= 100, "a plan sends at most a tenth of the requests"
    progress = afterword(source, "--plan").stderr
    assert "from 256 lines" in progress
    assert progress.startswith(f"Reading {source}.\nCounting the tokens of 256 of 1,000 requests.\nSending ")


# ---- progress


def test_progress_has_rates_remaining_time_errors_and_the_reason_for_waiting(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1010.0)
    job = Progress(100, BatchCounts(succeeded=10), began=1000.0)
    job.done = BatchCounts(succeeded=28, failed=2, completion=500)
    text = facts(job)
    assert "2 lines/s" in text
    assert "50 tokens/s" in text
    assert "0:00:35 left" in text
    assert "2 errors" in text
    job.waiting_for = "the server does not respond"
    assert facts(job).endswith("the server does not respond")
    job.done = BatchCounts(succeeded=100)
    assert "left" not in facts(job)


def test_progress_without_a_terminal_is_printed_as_lines(capsys):
    async def main() -> None:
        job = Progress(100, BatchCounts(), began=time.monotonic())
        async with show_progress(job):
            job.began -= 31
            job.done = BatchCounts(succeeded=40)
        async with show_progress(job):
            pass

    asyncio.run(main())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("40 of 100 lines, ")

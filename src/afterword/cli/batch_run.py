"""Implements `afterword batch`: sends the requests of a file to a model or a server, and writes the output file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.batch_limits import BatchLimits
from afterword.batch.estimate import estimate
from afterword.batch.http_client import http_client
from afterword.batch.input_lines import read_lines
from afterword.batch.journal import BatchCounts, Journal, open_input
from afterword.batch.output_lines import SendRequest, ServerReply, batch_id
from afterword.cli import model_setup
from afterword.cli.batch_progress import show_progress
from afterword.cli.run import engine_settings, run_async
from afterword.completion.request_limits import RequestLimits
from afterword.config import Config
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.errors import BatchStopped, SettingError

MAX_LINE = BatchLimits().max_line
EXIT_RETRY_LATER = 75
"""The exit status of a batch that stopped and can be continued: EX_TEMPFAIL of sysexits.h."""
_DEFAULT_SEQUENCES = 16  # of a server that does not report them
_RETRY_SECONDS = 2.0  # between attempts to reach a server


@dataclass(frozen=True, slots=True)
class _Invocation:
    """The arguments of the command. `options`: the values of its options by name."""

    source: Path
    model: str | None
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        """The output file. Raises `SettingError` if `-o` is missing or names the input."""
        output: Path | None = self.options["output"]
        if output is None:
            raise SettingError("The output file is missing. Give it with -o.")
        if output.exists() and output.samefile(self.source):
            raise SettingError(f"-o {output} is the input file. Give another output file.")
        return output

    def print_result(self, text: str, facts: dict[str, Any]) -> None:
        """With `--json` write `facts` to standard output as JSON, otherwise `text` to standard error."""
        if self.options["as_json"]:
            click.echo(json.dumps(facts))
        else:
            click.echo(text, err=True)


def batch(source: Path, model: str | None, options: dict[str, Any]) -> int:
    """Run the command and return the exit status. `options`: values by option name. Raises `SettingError`."""
    invocation = _Invocation(source, model, options)
    if options["url"] and model:
        raise SettingError("MODEL and --url were both given. Give only one of them.")
    if not source.is_file():
        raise SettingError(
            f"{source} is not a regular file, or does not exist. The input is read twice, so it cannot be a pipe."
        )
    if options["plan"]:
        run_async(_plan(invocation))
        return 0
    output = invocation.output
    journal_path = output.with_name(output.name + ".journal")
    try:
        if options["restart"]:
            _delete_previous(journal_path, output)
        elif output.exists() and not journal_path.exists():
            return _check_existing_output(invocation)
        with closing(Journal(journal_path)) as journal:
            return _finish(invocation, journal)
    except BatchStopped as stopped:
        click.secho(f"afterword: {stopped.message} Run the same command again to continue.", err=True, fg="yellow")
        return EXIT_RETRY_LATER
    except KeyboardInterrupt:
        click.secho(
            "\nStopped. All answers so far are kept. Run the same command again to continue.", err=True, fg="yellow"
        )
        return 130


def _finish(invocation: _Invocation, journal: Journal) -> int:
    """Answer the remaining lines, write the output and delete the journal. Returns the exit status."""
    start = time.monotonic()
    before = journal.counts()
    facts = _scan_or_check(invocation.source, journal)
    rows = int(facts["rows"])
    if journal.counts().total < rows:
        run_async(_run_job(invocation, journal, facts))
    done = journal.counts()
    assert done.total == rows, f"{rows - done.total} lines have no answer"
    journal.write(invocation.output)
    journal.remove()
    invocation.print_result(*_outcome(invocation.output, done, before.total, time.monotonic() - start))
    return 0


def _scan_or_check(source: Path, journal: Journal) -> dict[str, str]:
    """Scan the input into a new journal, or check that an existing journal is of this input. Returns the facts.

    Raises `SettingError` if the input has changed.
    """
    digest = _digest(source)
    known = journal.facts
    if not known:
        epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
        created = int(epoch) if epoch.isdigit() else int(time.time())
        journal.scan(source, MAX_LINE, {"input": digest, "created": created})
        return journal.facts
    if known["input"] != digest:
        raise SettingError(
            f"{source} has changed since {journal.path} was started. Give another -o, or --restart to start again."
        )
    return known


async def _run_job(invocation: _Invocation, journal: Journal, facts: dict[str, str]) -> None:
    async with _open_client(invocation) as send:
        sequences = await _wait_until_ready(send, journal)
        concurrency = invocation.options["concurrency"] or 2 * sequences
        job = BatchJob(invocation.source, journal, int(facts["created"]), MAX_LINE, concurrency)
        progress = Progress(int(facts["rows"]), journal.counts())
        async with show_progress(progress):
            await job.run(send, progress)


@asynccontextmanager
async def _open_client(invocation: _Invocation) -> AsyncIterator[SendRequest]:
    """Open a client of the server at --url, or of the application in this process."""
    options = invocation.options
    if options["url"]:
        async with http_client(options["url"], options["api_key"], options["concurrency"] or 1024) as send:
            yield send
    else:
        async with _in_process_server(invocation.model, options) as send:
            yield send


@asynccontextmanager
async def _in_process_server(model: str | None, options: dict[str, Any]) -> AsyncIterator[SendRequest]:
    """Load a model and open a client of the application, without a socket."""
    from afterword.api.app import make_app  # imported late: the web framework takes long to import
    from afterword.api.in_process_client import in_process_client
    from afterword.api.service import Service

    names = [options["alias"]] if options["alias"] else []
    models = model_setup.make_model_manager(
        model_setup.WantedModels([model] if model else [], names), engine_settings(options), None, QueuePolicy()
    )
    try:
        await models.open()
        limits = RequestLimits(max_batch_answer=RequestLimits().max_answer)  # there is no other client
        yield in_process_client(make_app(Service(Config(limits=limits), models)))
    finally:
        await models.close()


async def _wait_until_ready(send: SendRequest, journal: Journal | None) -> int:
    """Wait until the server responds, and return the number of its sequences.

    Raises `SettingError` if its models are not those with which the journal was started.
    """
    models = await _get_with_retries(send, "/v1/models")
    if journal is not None:
        _check_models(_fingerprints(models), journal)
    return max(1, sequences_of(await send("GET", "/ready", b"")))


async def _get_with_retries(send: SendRequest, path: str) -> ServerReply:
    has_message = False
    while (reply := await send("GET", path, b"")).retry or reply.attempted:
        if not has_message:
            click.echo("Waiting for the server.", err=True)
        has_message = True
        await asyncio.sleep(_RETRY_SECONDS)
    return reply


def sequences_of(ready: ServerReply) -> int:
    """Read the number of sequences from the reply of `/ready`; 16 if it is missing, as on other servers."""
    try:
        found = json.loads(ready.body)["sequences"]
    except (ValueError, LookupError, TypeError):
        return _DEFAULT_SEQUENCES
    return found if isinstance(found, int) and found > 0 else _DEFAULT_SEQUENCES


def _fingerprints(models: ServerReply) -> dict[str, str]:
    """Return the fingerprints of a server's models by id, empty where the server reports none."""
    try:
        listed = json.loads(models.body)["data"]
        return {str(each["id"]): str(each.get("system_fingerprint", "")) for each in listed}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _check_models(current: dict[str, str], journal: Journal) -> None:
    """Write the models into a new journal, or compare them with those of an existing one. Raises `SettingError`.

    New models on a server are allowed. A changed fingerprint is not: later answers would differ from earlier ones.
    """
    known = journal.facts.get("models")
    if known is None:
        journal.set_facts({"models": json.dumps(current)})
        return
    changed = [name for name, fingerprint in json.loads(known).items() if current.get(name) != fingerprint]
    if changed:
        raise SettingError(
            f"The model {changed[0]} or its settings have changed since {journal.path} was started, or it is missing. "
            "Give another -o, or --restart to start again."
        )


def _digest(source: Path) -> str:
    with open_input(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete_previous(journal_path: Path, output: Path) -> None:
    """Delete journal and output. Raises `SettingError` if another process uses the journal."""
    if journal_path.exists():
        try:
            Journal(journal_path).remove()
        except SettingError as problem:
            if "Another process" in problem.message:
                raise
            journal_path.unlink()
    output.unlink(missing_ok=True)


def _check_existing_output(invocation: _Invocation) -> int:
    """Check an output without a journal. Raises `SettingError` if it is not the complete output of this input."""
    succeeded = _read_output(invocation.source, invocation.output)
    if succeeded is None:
        raise SettingError(
            f"{invocation.output} exists and is not the output of {invocation.source}. Give another -o, or --restart."
        )
    click.echo(f"{invocation.output} is complete already. --restart answers all lines again.", err=True)
    sums = BatchCounts(sum(succeeded), len(succeeded) - sum(succeeded))
    invocation.print_result(*_outcome(invocation.output, sums, sums.total, 0.0))
    return 0


def _read_output(source: Path, output: Path) -> bytearray | None:
    """Return for each input line 1 if its answer has no error, else 0; None if the output is not of this input."""
    succeeded = bytearray()
    with open_input(source) as lines, open_input(output) as answers:
        for line in read_lines(lines, MAX_LINE):
            try:
                answer = json.loads(answers.readline())
                if answer["id"] != batch_id(line.digest):
                    return None
                succeeded.append(answer["response"] is not None and answer["response"]["status_code"] < 300)
            except (ValueError, LookupError, TypeError):
                return None
        return None if answers.read(1) else succeeded


def _outcome(output: Path, done: BatchCounts, before: int, seconds: float) -> tuple[str, dict[str, Any]]:
    """Describe the result as a sentence and as JSON facts."""
    errors = f", {done.failed:,} of them errors" if done.failed else ""
    return f"{output}: {done.total:,} lines{errors}.", {
        "output": str(output),
        "rows": done.total,
        "completed": done.succeeded,
        "failed": done.failed,
        "done_before": before,
        "prompt_tokens": done.prompt,
        "cached_tokens": done.cached,
        "completion_tokens": done.completion,
        "seconds": round(seconds, 3),
    }


async def _plan(invocation: _Invocation) -> None:
    async with _open_client(invocation) as send:
        sequences = await _wait_until_ready(send, None)
        concurrency = invocation.options["concurrency"] or 2 * sequences
        click.echo(f"Reading {invocation.source}.", err=True)
        found = await estimate(invocation.source, MAX_LINE, send, concurrency, partial(click.echo, err=True))
    invocation.print_result(found.text, found.facts)

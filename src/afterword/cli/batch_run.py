"""What `afterword batch` does: a file and a model, or a server, to a file of answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
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
from afterword.config import Config
from afterword.engine.parent.supervisor import QueuePolicy
from afterword.errors import BatchStopped, SettingError

MAX_LINE = BatchLimits().max_line
EXIT_RETRY_LATER = 75
"""The exit status of a job that has stopped and can go on, as sysexits.h has it: a temporary failure."""
_DEFAULT_SEQUENCES = 16  # where a server does not say
_RETRY_SECONDS = 2.0  # seconds between two looks for a server that is not there


@dataclass(frozen=True, slots=True)
class _Invocation:
    """What was typed. `options` are the command's, by name."""

    source: Path
    model: str | None
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        """Where the answers go. Raises `SettingError`."""
        output: Path | None = self.options["output"]
        if output is None:
            raise SettingError("Say with -o where the answers go.")
        if output.exists() and output.samefile(self.source):
            raise SettingError(f"-o {output}: that is the input.")
        return output

    def print_result(self, text: str, facts: dict[str, Any]) -> None:
        """What came out: facts on standard output if they are asked for, else a text for a person."""
        if self.options["as_json"]:
            click.echo(json.dumps(facts))
        else:
            click.echo(text, err=True)


def batch(source: Path, model: str | None, options: dict[str, Any]) -> int:
    """Do a job. `options` are the command's, by name. Returns the exit status. Raises `SettingError`."""
    wish = _Invocation(source, model, options)
    if options["url"] and model:
        raise SettingError("Give a MODEL or --url, not both.")
    if not source.is_file():
        raise SettingError(f"{source} is not a file, or does not exist. It is read more than once.")
    if options["plan"]:
        run_async(_plan(wish))
        return 0
    output = wish.output
    place = output.with_name(output.name + ".journal")
    try:
        if options["restart"]:
            _forget(place, output)
        elif output.exists() and not place.exists():
            return _check_existing_output(wish)
        with closing(Journal(place)) as journal:
            return _finish(wish, journal)
    except BatchStopped as stopped:
        click.secho(f"afterword: {stopped.message} The same command goes on.", err=True, fg="yellow")
        return EXIT_RETRY_LATER
    except KeyboardInterrupt:
        click.secho("\nStopped. What is done is kept; the same command goes on.", err=True, fg="yellow")
        return 130


def _finish(wish: _Invocation, journal: Journal) -> int:
    """Do all that is left."""
    start = time.monotonic()
    before = journal.counts()
    facts = _scanned(wish.source, journal)
    rows = int(facts["rows"])
    if journal.counts().total < rows:
        run_async(_carry_out(wish, journal, facts))
    done = journal.counts()
    assert done.total == rows, f"{rows - done.total} rows have no answer"
    journal.write(wish.output)
    journal.remove()
    wish.print_result(*_outcome(wish.output, done, before.total, time.monotonic() - start))
    return 0


def _scanned(source: Path, journal: Journal) -> dict[str, str]:
    """What is known of the job, from its first start. Raises `SettingError` if it is another one."""
    digest = _digest(source)
    known = journal.facts
    if not known:
        epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
        created = int(epoch) if epoch.isdigit() else int(time.time())
        journal.scan(source, MAX_LINE, {"input": digest, "created": created})
        return journal.facts
    if known["input"] != digest:
        raise SettingError(
            f"{source} is not what it was when {journal.path} was begun. Give another -o, or --restart to begin again."
        )
    return known


async def _carry_out(wish: _Invocation, journal: Journal, facts: dict[str, str]) -> None:
    async with _asking(wish) as ask:
        sequences = await _wait_until_ready(ask, journal)
        at_once = wish.options["concurrency"] or 2 * sequences
        job = BatchJob(wish.source, journal, int(facts["created"]), MAX_LINE, at_once)
        progress = Progress(int(facts["rows"]), journal.counts())
        async with show_progress(progress):
            await job.run(ask, progress)


@asynccontextmanager
async def _asking(wish: _Invocation) -> AsyncIterator[SendRequest]:
    """The server at --url, or the same application in this process, without a socket."""
    options = wish.options
    if options["url"]:
        async with http_client(options["url"], options["api_key"], options["concurrency"] or 1024) as ask:
            yield ask
    else:
        async with _in_process_server(wish.model, options) as ask:
            yield ask


@asynccontextmanager
async def _in_process_server(model: str | None, options: dict[str, Any]) -> AsyncIterator[SendRequest]:
    """The application over a model, which is loaded for it."""
    from afterword.api.app import make_app  # the web framework takes a while to import
    from afterword.api.in_process_client import in_process_client
    from afterword.api.service import Service

    names = [options["alias"]] if options["alias"] else []
    models = model_setup.make_model_manager(
        [model] if model else [], names, engine_settings(options), None, QueuePolicy()
    )
    try:
        await models.open()
        yield in_process_client(make_app(Service(Config(), models)))
    finally:
        await models.close()


async def _wait_until_ready(ask: SendRequest, journal: Journal | None) -> int:
    """How many sequences the server has, once it is there. Its models must be those that the job was begun with."""
    models = await _get_with_retries(ask, "/v1/models")
    if journal is not None:
        _same_models(_fingerprints(models), journal)
    return max(1, sequences_of(await ask("GET", "/ready", b"")))


async def _get_with_retries(ask: SendRequest, path: str) -> ServerReply:
    told = False
    while (reply := await ask("GET", path, b"")).retry or reply.attempted:
        if not told:
            click.echo("Waiting for the server.", err=True)
        told = True
        await asyncio.sleep(_RETRY_SECONDS)
    return reply


def sequences_of(ready: ServerReply) -> int:
    """What `/ready` says of how many can be computed together; a guess where it says nothing."""
    try:
        found = json.loads(ready.body)["sequences"]
    except (ValueError, LookupError, TypeError):
        return _DEFAULT_SEQUENCES
    return found if isinstance(found, int) and found > 0 else _DEFAULT_SEQUENCES


def _fingerprints(models: ServerReply) -> dict[str, str]:
    """The models of a server and what could change their numbers, as far as it says."""
    try:
        listed = json.loads(models.body)["data"]
        return {str(each["id"]): str(each.get("system_fingerprint", "")) for each in listed}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _same_models(now: dict[str, str], journal: Journal) -> None:
    """What is added to a server does no harm; what has changed would make the rows' numbers different."""
    known = journal.facts.get("models")
    if known is None:
        journal.set_facts({"models": json.dumps(now)})
        return
    changed = [name for name, fingerprint in json.loads(known).items() if now.get(name) != fingerprint]
    if changed:
        raise SettingError(
            f"The model {changed[0]} is not there, or not with the settings, with which {journal.path} was begun. "
            "Give another -o, or --restart to begin again."
        )


def _digest(source: Path) -> str:
    with open_input(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(place: Path, output: Path) -> None:
    """Throw away what is there, unless somebody is at work on it."""
    if place.exists():
        try:
            Journal(place).remove()
        except SettingError as problem:
            if "Another process" in problem.message:
                raise
            place.unlink()
    output.unlink(missing_ok=True)


def _check_existing_output(wish: _Invocation) -> int:
    """The output is there and no journal: either all is done, or it is something else. Raises `SettingError`."""
    good = _answers(wish.source, wish.output)
    if good is None:
        raise SettingError(
            f"{wish.output} is there already and is not of {wish.source}. Give another -o, or --restart."
        )
    click.echo(f"{wish.output} has an answer to every row already. --restart makes them anew.", err=True)
    sums = BatchCounts(sum(good), len(good) - sum(good))
    wish.print_result(*_outcome(wish.output, sums, sums.total, 0.0))
    return 0


def _answers(source: Path, output: Path) -> bytearray | None:
    """For each row whether its answer is a good one; None if the output is not of this input."""
    good = bytearray()
    with open_input(source) as lines, open_input(output) as answers:
        for line in read_lines(lines, MAX_LINE):
            try:
                answer = json.loads(answers.readline())
                if answer["id"] != batch_id(line.digest):
                    return None
                good.append(answer["response"] is not None and answer["response"]["status_code"] < 300)
            except (ValueError, LookupError, TypeError):
                return None
        return None if answers.read(1) else good


def _outcome(output: Path, done: BatchCounts, before: int, seconds: float) -> tuple[str, dict[str, Any]]:
    """What came out, in words and as facts."""
    errors = f", {done.failed:,} of them errors" if done.failed else ""
    return f"{output}: {done.total:,} rows{errors}.", {
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


async def _plan(wish: _Invocation) -> None:
    """What a job would take."""
    async with _asking(wish) as ask:
        sequences = await _wait_until_ready(ask, None)
        found = await estimate(wish.source, MAX_LINE, ask, wish.options["concurrency"] or 2 * sequences)
    wish.print_result(found.text, found.facts)

"""What `afterword models` and `afterword pull` do, apart from the command line's declarations."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from afterword.models.catalogue import Entry, entries
from afterword.models.fetch import DownloadObserver
from afterword.models.file_names import printable
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Source, present

_SOURCES: dict[Source, str] = {"built-in": "built-in", "hub": "Hub", "ollama": "Ollama", "lmstudio": "LM Studio"}
_PAUSE = 10.0  # seconds between two lines where there is no terminal


def list_models(as_json: bool) -> None:
    """Print the models on this machine, and what is there of others."""
    if as_json:
        click.echo(json.dumps([_fields(entry) for entry in entries()], indent=2))
        return
    width = max((len(model.spec) for model in present()), default=0)
    click.echo(f"{'NAME':<{width}} {'SIZE':>10}  {'TYPE':<7} {'CONTEXT':>8}  FROM")
    broken = []
    for entry in entries():
        model, facts = entry.model, entry.facts
        if facts is None:
            broken.append(entry)
            continue
        context = facts.context_length or "?"
        line = f"{model.spec:<{width}} {_size(facts.size_bytes):>10}  {facts.file_type:<7} {context:>8}"
        click.echo(f"{line}  {_SOURCES[model.source]}")
    if broken:
        click.echo("\nThese cannot be used:")
    for entry in broken:
        click.echo(f"{entry.model.spec}: {entry.problem}")


def pull(text: str, as_json: bool) -> None:
    """Download a model and tell where it is."""
    from afterword.models.pull import parse_hub_spec
    from afterword.models.pull import pull as download  # the Hub's library takes half a second to import

    spec = parse_hub_spec(text)
    with _make_watcher(quiet=as_json) as watcher:
        model = download(spec, watcher)
    if as_json:
        fields = {"spec": model.spec, "id": model.id, "path": str(model.path)}
        click.echo(json.dumps(fields | {"size_bytes": read_facts(model.path).size_bytes}))
    else:
        click.echo(f"{model.id} is at {model.path}. Serve it with: afterword serve {model.spec}")


def _fields(entry: Entry) -> dict[str, Any]:
    model, facts = entry.model, entry.facts
    known = {
        "size_bytes": facts.size_bytes if facts else None,
        "file_type": facts.file_type if facts else None,
        "architecture": facts.architecture if facts else None,
        "context_length": facts.context_length if facts else None,
    }
    named = {"spec": model.spec, "id": model.id, "source": model.source, "path": printable(str(model.path))}
    return {**named, **known, "problem": entry.problem}


def _size(count: float) -> str:
    unit = "MiB" if count < 2**30 else "GiB"
    return f"{count / 2 ** (20 if unit == 'MiB' else 30):,.1f} {unit}"


@contextmanager
def _make_watcher(quiet: bool) -> Iterator[DownloadObserver]:
    """Whoever tells a person how it goes, on standard error."""
    if quiet:
        yield DownloadObserver()
    elif not sys.stderr.isatty():
        yield ProgressLines()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield ProgressBars(progress)


class _TextWatcher(DownloadObserver):
    """Says which file was taken."""

    def chosen(self, name: str, among: Sequence[str]) -> None:
        """Of several files that would do this one was taken."""
        self.say(f"Taking {name}, the best of {len(among) + 1} files; there are also {', '.join(among)}.")

    def say(self, text: str) -> None:
        """Show a line."""
        click.echo(text, err=True)


class ProgressBars(_TextWatcher):
    """A bar for each file, with rate and time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def started(self, name: str, size: int, have: int) -> None:
        """A file, of which a part may be here."""
        self._task = self._progress.add_task(name.rpartition("/")[2], total=size or None, completed=have)

    def received(self, count: int) -> None:
        """More of it."""
        self._progress.advance(self._task, count)

    def checking(self, name: str) -> None:
        """Its content is being compared."""
        if self._task is not None:
            self._progress.update(self._task, description=f"{name.rpartition('/')[2]}, checking")

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class ProgressLines(_TextWatcher):
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._name = ""
        self._size = self._have = self._had = 0
        self._began = self._told = 0.0

    def started(self, name: str, size: int, have: int) -> None:
        """A file, of which a part may be here."""
        self._name, self._size, self._have, self._had = name, size, have, have
        self._began = self._told = time.monotonic()
        self.say(f"{name}: {_size(size)}" + (f", of which {_size(have)} are here" if have else ""))

    def received(self, count: int) -> None:
        """More of it."""
        self._have += count
        now = time.monotonic()
        if now - self._told >= _PAUSE:
            self._told = now
            rate = max(1.0, (self._have - self._had) / (now - self._began))
            left = f", {(self._size - self._have) / rate:.0f} s left" if self._size else ""
            self.say(f"{self._name}: {_size(self._have)}, {_size(rate)}/s{left}")

    def checking(self, name: str) -> None:
        """Its content is being compared."""
        self.say(f"{name}: checking")

"""Implements `afterword models` and `afterword pull`."""

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
from afterword.models.registry import Source, parse_spec, present
from afterword.models.remove import remove

_SOURCES: dict[Source, str] = {"built-in": "built-in", "hub": "Hub", "ollama": "Ollama", "lmstudio": "LM Studio"}
_PAUSE = 10.0  # seconds between two progress lines without a terminal


def list_models(as_json: bool) -> None:
    """Print the models on this machine, and the files that cannot be used with the reason."""
    if as_json:
        click.echo(json.dumps([_as_json_fields(entry) for entry in entries()], indent=2))
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
        line = f"{model.spec:<{width}} {_format_size(facts.size_bytes):>10}  {facts.file_type:<7} {context:>8}"
        click.echo(f"{line}  {_SOURCES[model.source]}")
    if broken:
        click.echo("\nThese cannot be used:")
    for entry in broken:
        click.echo(f"{entry.model.spec}: {entry.problem}")


def pull(text: str, as_json: bool) -> None:
    """Download a model and print its path."""
    from afterword.models.pull import parse_hub_spec
    from afterword.models.pull import pull as download  # imported late: the Hub's library takes 0.5 s

    spec = parse_hub_spec(text)
    with _open_observer(quiet=as_json) as observer:
        model = download(spec, observer)
    if as_json:
        fields = {"spec": model.spec, "id": model.id, "path": str(model.path)}
        click.echo(json.dumps(fields | {"size_bytes": read_facts(model.path).size_bytes}))
    else:
        click.echo(f"{model.id} is at {model.path}. Serve it with: afterword serve {model.spec}")


def rm(text: str) -> None:
    """Remove a model from the Hub's cache."""
    removed, freed = remove(parse_spec(text))
    click.echo(f"Removed {', '.join(sorted({path.name for path in removed}))}: {_format_size(freed)} are free.")


def _as_json_fields(entry: Entry) -> dict[str, Any]:
    model, facts = entry.model, entry.facts
    known = {
        "size_bytes": facts.size_bytes if facts else None,
        "file_type": facts.file_type if facts else None,
        "architecture": facts.architecture if facts else None,
        "context_length": facts.context_length if facts else None,
    }
    named = {"spec": model.spec, "id": model.id, "source": model.source, "path": printable(str(model.path))}
    return {**named, **known, "problem": entry.problem}


def _format_size(count: float) -> str:
    unit = "MiB" if count < 2**30 else "GiB"
    return f"{count / 2 ** (20 if unit == 'MiB' else 30):,.1f} {unit}"


@contextmanager
def _open_observer(quiet: bool) -> Iterator[DownloadObserver]:
    """Open an observer that shows download progress on standard error: bars on a terminal, otherwise lines."""
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


class _TextObserver(DownloadObserver):
    """Base of both displays. It prints which file was selected."""

    def selected(self, name: str, among: Sequence[str]) -> None:
        self.print_line(f"Selected {name}, the best of {len(among) + 1} files; the others are {', '.join(among)}.")

    def print_line(self, text: str) -> None:
        """Print a line."""
        click.echo(text, err=True)


class ProgressBars(_TextObserver):
    """A bar for each file, with rate and remaining time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def started(self, name: str, size: int, downloaded: int) -> None:
        self._task = self._progress.add_task(name.rpartition("/")[2], total=size or None, completed=downloaded)

    def received(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def checking(self, name: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=f"{name.rpartition('/')[2]}, checking")

    def print_line(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class ProgressLines(_TextObserver):
    """A line every 10 s, for logs."""

    def __init__(self) -> None:
        self._name = ""
        self._size = self._received = self._resumed_at = 0
        self._started = self._last_line = 0.0

    def started(self, name: str, size: int, downloaded: int) -> None:
        self._name, self._size, self._received, self._resumed_at = name, size, downloaded, downloaded
        self._started = self._last_line = time.monotonic()
        self.print_line(
            f"{name}: {_format_size(size)}" + (f", {_format_size(downloaded)} already downloaded" if downloaded else "")
        )

    def received(self, count: int) -> None:
        self._received += count
        now = time.monotonic()
        if now - self._last_line >= _PAUSE:
            self._last_line = now
            rate = max(1.0, (self._received - self._resumed_at) / (now - self._started))
            left = f", {(self._size - self._received) / rate:.0f} s left" if self._size else ""
            self.print_line(f"{self._name}: {_format_size(self._received)}, {_format_size(rate)}/s{left}")

    def checking(self, name: str) -> None:
        self.print_line(f"{name}: checking")

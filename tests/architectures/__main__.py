"""`python -m tests.architectures`: judge tiny models of all architectures, and write docs/architectures.md.

Each model is judged in a process of its own, so a crash of the library is a row of the table. Results are kept in a
file of JSON lines; models that are in it are not judged again. Delete it, or name another one with `--results`, to
begin anew. Exit status 1: there is a fault.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from oracle.forms import FORMS, architecture_of

from . import ROOT, known, table
from .judge import Verdict

TYPES = ("Q8_0", "F16", "F32")
SECONDS = 600  # for one form


def main() -> int:
    options = _options().parse_args()
    verdicts = read(options.results) if options.results.exists() else {}
    wanted = {form: types_of(form, options.type) for form in names(options.only)}
    missing = {form: [kind for kind in types if (form, kind) not in verdicts] for form, types in wanted.items()}
    missing = {form: types for form, types in missing.items() if types}
    start = time.monotonic()
    with ThreadPoolExecutor(options.processes) as pool, options.results.open("ab") as results:
        runs = pool.map(lambda each: run(*each, options.requests), missing.items())
        for number, found in enumerate(runs, 1):
            for verdict in found:
                results.write(msgspec.json.encode(verdict) + b"\n")
                verdicts[verdict.form, verdict.file_type] = verdict
                print(f"{time.monotonic() - start:5.0f} s  {number}/{len(missing)}  {line(verdict)}", flush=True)
            results.flush()
    chosen = [verdicts[form, kind] for form, types in wanted.items() for kind in types]
    if options.markdown:
        table.write(table.PAGE, by_form(list(verdicts.values())))
    faulty = [verdict for verdict in chosen if verdict.faults]
    print(f"{len(chosen)} models, {len(faulty)} with faults")
    for verdict in faulty:
        print(line(verdict))
    return 1 if faulty else 0


def names(only: Sequence[str]) -> list[str]:
    """The forms to judge. `only`: names of forms, or of architectures, that replace all."""
    if only:
        return [each for name in only for each in FORMS if name in (each, architecture_of(each))] or list(only)
    return sorted({*FORMS, *(known.architectures() - {architecture_of(form) for form in FORMS})})


def types_of(form: str, only: Sequence[str] = ()) -> Sequence[str]:
    """The types of weights with which a form is judged. A file that is refused by its keys needs only one."""
    return (only or TYPES) if form in FORMS else TYPES[:1]


def run(form: str, file_types: Sequence[str], count: int) -> list[Verdict]:
    """Judge a form in a new process. If the process ends without a verdict, that is the fault."""
    command = [sys.executable, "-m", "tests.architectures.judge", form, ",".join(file_types), str(count)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [Verdict(form, each, faults=(f"It did not end within {SECONDS} s.",)) for each in file_types]
    verdicts = [msgspec.json.decode(each, type=Verdict) for each in done.stdout.splitlines()]
    last = (done.stderr.strip().splitlines() or [""])[-1].rpartition("/")[2]
    fault = f"The process ended with status {done.returncode}: {last}"
    return [*verdicts, *(Verdict(form, each, faults=(fault,)) for each in file_types[len(verdicts) :])]


def read(path: Path) -> dict[tuple[str, str], Verdict]:
    """The verdicts in a file of results, by form and type. Later lines replace earlier ones."""
    verdicts = [msgspec.json.decode(each, type=Verdict) for each in path.read_bytes().splitlines()]
    return {(verdict.form, verdict.file_type): verdict for verdict in verdicts}


def by_form(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    forms: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in sorted(verdicts, key=lambda each: each.form):
        forms[verdict.form].append(verdict)
    return forms


def line(verdict: Verdict) -> str:
    """A verdict as a line for a terminal."""
    name = f"{verdict.form} {verdict.file_type}"
    if verdict.refused:
        return f"{name}: refused: {verdict.refused}"
    found = (
        f"{verdict.promise}, library {verdict.largest:.2g} (its own {verdict.spread:.2g}), cached {verdict.cached}, "
        f"warm {verdict.warm}, crowd {verdict.crowd}/{verdict.requests}, drift {verdict.drift:.2g}"
    )
    return " ".join((f"{name}:", found, *(f"FAULT {fault}" for fault in verdict.faults)))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a form or architecture")
    parser.add_argument("--type", action="append", default=[], choices=TYPES, help="a type of weights")
    parser.add_argument("--requests", type=int, default=24, help="concurrent requests (24)")
    parser.add_argument("--processes", type=int, default=1, help="models that are judged at the same time (1)")
    parser.add_argument("--results", type=Path, default=ROOT / ".architectures.jsonl", help="file of results")
    parser.add_argument("--markdown", action="store_true", help=f"write the table of {table.PAGE.name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.chaos`: run the gates and print their results. `--nightly` uses the large sizes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .gate import Gate, Result, Trial, attempt, find_gates
from .table import Row, markdown, merge_into


def main() -> int:
    """Returns the exit status: 1 if a gate fails, or if it passes with its bug planted."""
    options = _options().parse_args()
    gates = [gate for gate in find_gates() if not options.only or gate.name in options.only]
    rows = []
    for row in _rows(gates, options):
        rows.append(row)
        if options.markdown and not row.planted:
            merge_into(options.markdown, [row])
    print(markdown(rows))
    return 0 if all(row.good for row in rows) else 1


def _rows(gates: list[Gate], options: argparse.Namespace) -> Iterator[Row]:
    for gate in gates:
        size = options.size or (gate.nightly if options.nightly else gate.commit)
        yield run_one(gate, Trial(size, options.seed, folder=options.pictures, say=_say))
        if options.faults:
            yield run_one(gate, Trial(gate.planted, options.seed, planted=gate.name, say=_say))


def run_one(gate: Gate, trial: Trial) -> Row:
    """Run a gate and return its row. An exception counts as a failure, with or without a planted bug."""
    start = time.monotonic()
    try:
        result = attempt(gate, trial)
    except Exception as problem:
        result = Result(bool(trial.planted), {"exception": f"{type(problem).__name__}: {problem}"[:200]})
    row = Row.of(gate, trial, result, time.monotonic() - start)
    _say(f"{row.line}\n")
    return row


def _say(text: str) -> None:
    """Print whole lines. Text without a line end is progress; only a terminal shows it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text.endswith("\n"):
        sys.stderr.write(text)
    sys.stderr.flush()


def _existing(name: str) -> Path:
    """A file that is there. Checked before the gates run, which may take hours."""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return Path(name)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--nightly", action="store_true", help="the large sizes")
    parser.add_argument("--only", action="append", metavar="G5", help="run only this gate; repeat for several")
    parser.add_argument(
        "--faults", action="store_true", help="also run each gate with its planted bug, which it must catch"
    )
    parser.add_argument("--size", type=int, help="a size that replaces the gates' own sizes")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (1)")
    parser.add_argument(
        "--markdown", type=_existing, metavar="FILE", help="update the gates' rows of the table in this file"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="the folder in which gates write pictures (SVG)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.sim --seeds 5000`: simulate, and say which seeds broke an invariant. They are kept in seeds.txt."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from .seeds import keep
from .world import Outcome, simulate


def outcomes(first: int, count: int, events: int, processes: int) -> Iterator[Outcome]:
    """Simulate so many seeds, several at a time, in order."""
    work = partial(simulate, events=events)
    if processes == 1:
        yield from map(work, range(first, first + count))
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(work, range(first, first + count), chunksize=8)


def main() -> int:
    """The exit status: 1 if a seed broke an invariant."""
    options = _options().parse_args()
    broken = 0
    for done, outcome in enumerate(outcomes(options.first, options.seeds, options.events, options.processes), 1):
        if options.trace:
            print(outcome.seed, outcome.trace)
        if outcome.broken:
            broken += 1
            _say("")
            print(f"seed {outcome.seed}: {outcome.broken}")
            keep(outcome)
        if done % 8 == 0:
            _say(f"{done} of {options.seeds} seeds, {broken} broken")
    _say("")
    print(f"{options.seeds} seeds from {options.first}, {options.events} events each: {broken} broke an invariant")
    return 1 if broken else 0


def _say(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--events", type=int, default=200, help="what happens in each (200)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (one a core)")
    parser.add_argument("--trace", action="store_true", help="print what names all that happened")
    return parser


if __name__ == "__main__":
    sys.exit(main())

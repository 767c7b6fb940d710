"""`python -m tests.sim --seeds 5000` simulates seeds and prints those that break an invariant.

It adds them to seeds.txt.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from .seeds import save
from .simulation import Outcome, simulate


def outcomes(first: int, count: int, events: int, processes: int) -> Iterator[Outcome]:
    """Simulate `count` seeds in `processes` processes. Yields their outcomes in order."""
    work = partial(simulate, events=events)
    if processes == 1:
        yield from map(work, range(first, first + count))
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(work, range(first, first + count), chunksize=8)


def main() -> int:
    """Run the simulations. Returns the exit status: 1 if a seed broke an invariant."""
    options = _options().parse_args()
    broken = 0
    for done, outcome in enumerate(outcomes(options.first, options.seeds, options.events, options.processes), 1):
        if options.trace:
            print(outcome.seed, outcome.trace)
        if outcome.broken:
            broken += 1
            _show("")
            print(f"seed {outcome.seed}: {outcome.broken}")
            save(outcome)
        if done % 8 == 0:
            _show(f"{done} of {options.seeds} seeds, {broken} broken")
    _show("")
    print(f"{options.seeds} seeds from {options.first}, {options.events} events each: {broken} broke an invariant")
    return 1 if broken else 0


def _show(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--events", type=int, default=200, help="random events per seed (default: 200)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--trace", action="store_true", help="print the hash of all events of each seed")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.cluster`: compare ways of routing on 1 to 512 simulated replicas. --help lists what can be set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.cluster.picture import picture, table
from bench.cluster.replica import Rates
from bench.cluster.routing import ROUTERS
from bench.cluster.simulation import simulate, summary
from bench.cluster.trace import Shape, make_trace

ASSUMPTIONS = """\
Assumed:
- Requests arrive as a Poisson process, in proportion to the replicas. So does the number of shared prefixes.
- A replica computes one prompt at a time. While sequences decode, prompts and decode steps have half of the time each.
- A prefix is cached from the moment at which a request with it gets a slot. Parts of prefixes are not cached.
- The router knows the load of all replicas at once. Network and router take no time. No replica fails.\
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = vars(_options().parse_args(arguments))
    shape, rates = _made(Shape, options), _made(Rates, options)
    found = []
    for replicas in options["replicas"]:
        trace = make_trace(shape, replicas, options["seed"])
        for name, make_router in ROUTERS.items():
            found.append(summary(name, replicas, simulate(trace, replicas, rates, make_router())))
    print(table(found))
    print(f"\n{shape}\n{rates}\nseed {options['seed']}\n{ASSUMPTIONS}")
    if options["picture"]:
        title = f"Simulated: {shape.rate:g} requests/s and {shape.prefixes} prefixes a replica"
        options["picture"].write_text(picture(found, title), encoding="utf-8")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 512], metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a picture (SVG)")
    for kind in (Shape, Rates):
        for field in fields(kind):
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=type(field.default), default=field.default, help=f"({field.default})")
    return parser


def _made(kind: type[Any], options: dict[str, Any]) -> Any:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


if __name__ == "__main__":
    sys.exit(main())

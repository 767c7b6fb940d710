"""`python -m bench.replicas COMMAND…`: the CPU time of a streamed token by kind of process, or the replay of a trace.

COMMAND is `afterword serve` or `afterword deploy` with a small model, such as the built-in one, and without keys. Eight
clients stream 200 tokens each, in several rounds. The processes of the command are counted: front is everything but the
workers, in which the model runs. Ray's controller and agents are not counted.

With `--replay RULE` the command is `afterword deploy` with two replicas of the built-in model and this rule. A trace is
sent to them and simulated with measured rates; the table has both.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import httpx
import psutil

from bench.cluster.picture import table
from bench.cluster.replay import SHAPE, compared
from bench.cluster.routing import ROUTERS

KINDS = {
    "afterword.engine": "worker",
    "haproxy -": "HAProxy",
    "ray::ServeReplica": "replica",
    "ray::ProxyActor": "Ray's proxy",
    "afterword serve": "server",
}
"""What a command line contains, and the kind of such a process. The first that applies counts."""
CLIENTS, TOKENS = 8, 200


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the command, measure, and end it."""
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=5, help="seconds before the first round (5)")
    parser.add_argument("--replay", choices=list(ROUTERS), metavar="RULE", help=f"one of {', '.join(ROUTERS)}")
    parser.add_argument("--slots", type=int, default=16, help="of each replica, for --replay (16)")
    for name in ("own", "output"):
        value = getattr(SHAPE, name)
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"tokens of each request, for --replay ({value})"
        )
    parser.add_argument("--seed", type=int, default=1, help="of the trace, for --replay (1)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    with started(options.command) as (url, process):
        time.sleep(options.pause)  # HAProxy learns of the last replica
        if options.replay:
            print(_replay(url, options))
        else:
            print("\n".join(report(_measured(url, process, options.rounds))))


@contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run a command that prints its URL, and end it after the block. Returns the URL and the id of its process."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)))
            yield found[0], process.pid
        finally:
            process.terminate()


def _replay(url: str, options: argparse.Namespace) -> str:
    shape = replace(SHAPE, own=options.own, output=options.output)
    rates, found = asyncio.run(compared(url, options.replay, shape, options.slots, options.seed))
    return f"{table(found)}\n\n{shape}\n{rates}\nseed {options.seed}"


def _measured(url: str, command: int, rounds: int) -> list[dict[str, float]]:
    """Milliseconds a token by kind of process, for each round after one that is not counted."""
    _round(url, 0)
    measured = []
    for number in range(1, rounds + 1):
        before = cpu_seconds(command)
        tokens = _round(url, number)
        used = cpu_seconds(command)
        measured.append({kind: 1000 * (used[kind] - before[kind]) / tokens for kind in used})
    return measured


def cpu_seconds(command: int) -> Counter[str]:
    """The CPU time of a process and those below it, by kind."""
    root, found = psutil.Process(command), Counter[str]()
    for process in (root, *root.children(recursive=True)):
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        kind = next((kind for part, kind in KINDS.items() if part in line), None)
        if kind:
            found[kind] += times.user + times.system
    return found


def report(rounds: Sequence[dict[str, float]]) -> list[str]:
    """The medians and ranges in milliseconds a token."""
    sums = [
        each | {"front": sum(value for kind, value in each.items() if kind != "worker"), "all": sum(each.values())}
        for each in rounds
    ]
    lines = []
    for kind in dict.fromkeys(name for each in sums for name in each):
        values = [each.get(kind, 0.0) for each in sums]
        lines.append(f"{kind}: {median(values):.3f} ms ({min(values):.3f} to {max(values):.3f})")
    return lines


def _round(url: str, number: int) -> int:
    """Stream with all clients at once. Returns the tokens."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return sum(clients.map(lambda client: _stream(url, number * CLIENTS + client), range(CLIENTS)))


def _stream(url: str, seed: int) -> int:
    body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "seed": seed, "stream": True, "ignore_eos": True}
    with (
        httpx.Client(timeout=300, trust_env=False) as http,
        http.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        response.raise_for_status()
        return sum(line.startswith("data: {") for line in response.iter_lines())


if __name__ == "__main__":
    main()

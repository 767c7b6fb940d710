"""`python -m bench.infill MODEL`: how long an editor waits for a suggestion while its user types.

The cursor is in the middle of a file of 2,000 tokens. One character is typed and a request is sent; before its answer
comes, the next character is typed: the editor closes the connection and sends the next request, whose times are
measured. This happens 50 times with the same file. Both servers get each key stroke in turn, so that other load on the
machine concerns both: Afterword's `/infill`, and llama-server's with `--cache-reuse 256` and, for a layout with the
suffix first, `--spm-infill`. A ratio is the median of the ratios of all key strokes.

With the prefix first, both servers compute the suffix again at each key stroke, and llama-server computes that of a
cancelled request to its end. That takes several times as long as with the suffix first, so the measurement ends after
`--minutes` and states the number of key strokes. What is going on is printed to the standard error stream.

The requests have the fields of llama.vim, but are streamed, greedy, and all have the same number of tokens. The batch
size of llama-server is so large that it leaves out no part of the file. All other options go to `afterword serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom

from afterword.engine.llama.infill_families import FAMILIES
from bench import report
from bench.client import Client, Exchange, Json, NotPossible
from bench.scenarios import Measure, Numbers
from bench.server import started_server

OURS, PEER = "afterword", "llama-server"
CACHE_REUSE = 256  # the value of llama-server's own presets for editors (`--fim-qwen-1.5b-default`)
MEASURES = (
    Measure("first token", "s"),
    Measure("whole middle", "s"),
    Measure("computed prompt tokens", "tokens"),
)
_WORDS = "total count line width name value index first last price items result part number text size".split()  # noqa: SIM905
_READY = 1800  # seconds until the other server must be ready


@dataclass(frozen=True, slots=True)
class Typing:
    """What a user does. `lines`: of the file. `keys`: pairs of a cancelled and a measured request for each of `files`.

    `wait`: seconds from a request until it is cancelled. `length`: tokens of a middle. `seconds`: after which no
    further pair begins after the first one.
    """

    lines: int
    keys: int
    files: int
    wait: float
    length: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Texts:
    """A file with the cursor in it, and what is typed there: two characters for each pair of requests."""

    before: str
    after: str
    typed: str

    def body(self, count: int, length: int) -> Json:
        """The request after so many typed characters."""
        return body_of(self.before + self.typed[:count], self.after, length)


def source_lines(numbers: Random, count: int) -> str:
    """Lines that look like Python. They are different in each round, so that no round finds its file in a cache."""
    lines = []
    for _ in range(count):
        left, right, other = numbers.choices(_WORDS, k=3)
        lines.append(f"    {left}_{numbers.randrange(1000)} = {right} + {other}[{numbers.randrange(100)}]\n")
    return "".join(lines)


def body_of(before: str, after: str, length: int) -> Json:
    """The request for a cursor between two texts. The line before the cursor is sent apart, as llama.vim does."""
    start = before.rfind("\n") + 1
    return {
        "id_slot": 0,
        "input_prefix": before[:start],
        "input_suffix": after,
        "input_extra": [],
        "prompt": before[start:],
        "n_predict": length,
        "stop": [],
        "n_indent": 0,
        # Without "infill", which ends the text where no token is likely: with random weights it would end every text.
        "samplers": ["top_k", "top_p", "temperature"],
        "top_k": 40,
        "top_p": 0.9,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": True,
    }


def texts_of(typing: Typing, seed: int) -> Texts:
    """The file of a seed."""
    numbers = Random(seed)
    before, after = (source_lines(numbers, typing.lines // 2) for _ in range(2))
    return Texts(before, after, source_lines(numbers, typing.keys))  # a line has more than two characters


async def open_file(client: Client, texts: Texts, length: int) -> Numbers:
    """The figures of the first request, which finds nothing in a cache."""
    return await _finish(await client.begin("/infill", texts.body(0, length), fresh=True), length)


async def press_key(client: Client, texts: Texts, number: int, typing: Typing) -> Numbers:
    """The figures of the request that follows a cancelled one.

    Raises `NotPossible` if the middle has another length than the one asked for.
    """
    given_up = await client.begin("/infill", texts.body(2 * number + 1, typing.length), fresh=True)
    await asyncio.sleep(typing.wait)
    given_up.close()
    exchange = await client.begin("/infill", texts.body(2 * number + 2, typing.length), fresh=True)
    return await _finish(exchange, typing.length)


async def lines_of(url: str, tokens: int) -> int:
    """The lines of a file with so many tokens. `url`: of Afterword."""
    client, tried = Client(url), 20
    answer = await client.ask("/tokenize", {"prompt": source_lines(Random(0), tried)})
    await client.close()
    return round(tokens * tried / answer.events[0][1]["count"])


async def _finish(exchange: Exchange, length: int) -> Numbers:
    """Seconds to the first event and to the last one, and the tokens of the prompt that were computed."""
    try:
        await exchange.over()
        answer = exchange.read()
    finally:
        exchange.close()
    last = answer.events[-1][1]
    if last["tokens_predicted"] != length:
        raise NotPossible(f"generated {last['tokens_predicted']} tokens where {length} were requested")
    first = answer.events[0][0] - answer.started
    figures = first, answer.ended - answer.started, float(last["timings"]["prompt_n"])
    return {measure.name: figure for measure, figure in zip(MEASURES, figures, strict=True)}


@contextmanager
def started_peer(model: Path, options: Sequence[str]) -> Iterator[str]:
    """llama-server's URL, as soon as it is ready. `python -m bench serve` installs it if necessary, and starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench", "serve", PEER, "--model", str(model), "--port", str(port), *options]
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parent.parent, stderr=subprocess.DEVNULL) as process:
        try:
            asyncio.run(_wait_until_ready(f"http://127.0.0.1:{port}", process))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    client, end = Client(url), time.monotonic() + _READY
    while time.monotonic() < end and process.poll() is None:
        try:
            await client.ask("/health")
            break
        except (OSError, NotPossible):
            await asyncio.sleep(0.2)
    else:
        raise NotPossible(f"`python -m bench serve {PEER}` did not start it")
    await client.close()


async def is_suffix_first(url: str, template: str | None) -> bool:
    """Whether the layout has the suffix before the prefix: an operator's template, or that of the model's family."""
    if template is None:
        client = Client(url)
        (model,) = (await client.ask("/v1/models")).events[0][1]["data"]
        await client.close()
        template = next((each.template for each in FAMILIES if each.name == model["infill_family"]), "{prefix}{suffix}")
    return template.index("{suffix}") < template.index("{prefix}")


async def measure(urls: dict[str, str], typing: Typing, seed: int) -> dict[str, list[report.Outcome]]:
    """The figures of each key stroke: equally many for all servers that answer. Each second one has the reverse order.

    A server that fails gets no further requests; its last outcome is the reason.
    """
    found: dict[str, list[report.Outcome]] = {name: [] for name in urls}
    clients = {name: Client(url) for name, url in urls.items()}
    end = time.monotonic() + typing.seconds

    async def take(name: str, figures: Awaitable[Numbers]) -> Numbers | None:
        try:
            return await figures
        except NotPossible as problem:
            found[name].append(str(problem))
            _say(f"{name}: {problem}")
            del clients[name]
            return None

    for number in range(typing.files):
        texts = texts_of(typing, seed + number)
        for name, client in [*clients.items()]:
            _say(f"file {number + 1}, {name}: {_times(await take(name, open_file(client, texts, typing.length)))}")
        for key in range(typing.keys):
            if number + key and time.monotonic() > end:
                _say(f"the time is over after {key} of {typing.keys} key strokes")
                return found
            for name, client in [*clients.items()][:: -1 if key % 2 else 1]:
                figures = await take(name, press_key(client, texts, key, typing))
                if figures is not None:
                    found[name].append(figures)
                _say(f"file {number + 1}, key {key + 1} of {typing.keys}, {name}: {_times(figures)}")
    return found


def _times(figures: Numbers | None) -> str:
    if figures is None:
        return "not possible"
    return ", ".join(f"{measure.name} {figures[measure.name]:.3g} {measure.unit}" for measure in MEASURES)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.infill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file with infill tokens")
    parser.add_argument("--template", help="the layout, as for `afterword serve --infill-template` (the model's own)")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the file (2,000)")
    parser.add_argument("--keys", type=int, default=50, help="measured requests for each file (50)")
    parser.add_argument("--wait", type=float, default=0.05, help="seconds until a request is cancelled (0.05)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a middle (16)")
    parser.add_argument("--rounds", type=int, default=1, help="files, one after the other (1)")
    parser.add_argument("--minutes", type=float, default=6, help="minutes after which no further key is typed (6)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each server (2)")
    parser.add_argument("--slots", type=int, default=4, help="sequences of each server (4)")
    parser.add_argument("--alone", action="store_true", help="measure Afterword only")
    parser.add_argument("--seed", type=int, help="seed of the files (a random one)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of both servers."""
    options, further = _options().parse_known_args(arguments)
    context = 2 * options.tokens
    common = ["--threads", str(options.threads), "--context", str(context)]
    ours = [str(options.model), *common, "--parallel", str(options.slots), *further]
    if options.template:
        ours += ["--infill-template", options.template]
    seed = SystemRandom().getrandbits(32) if options.seed is None else options.seed
    _say("starting afterword")
    with started_server(ours) as server:
        urls = {OURS: f"http://127.0.0.1:{server.port}"}
        lines = asyncio.run(lines_of(urls[OURS], options.tokens))
        typing = Typing(lines, options.keys, options.rounds, options.wait, options.length, 60 * options.minutes)
        if options.alone:
            found = asyncio.run(measure(urls, typing, seed))
        else:
            # It keeps a quarter of a batch for the suffix and the current line.
            theirs = [*common, "--slots", str(options.slots), "--batch-size", str(4 * context)]
            theirs += ["--cache-reuse", str(CACHE_REUSE)]
            if asyncio.run(is_suffix_first(urls[OURS], options.template)):
                theirs.append("--spm-infill")
            _say(f"starting {PEER}, which is compiled the first time")
            with started_peer(options.model, theirs) as url:
                urls[PEER] = url
                found = asyncio.run(measure(urls, typing, seed))
    base = OURS if options.alone else PEER
    count = max(map(len, found.values()))
    print(report.table(report.rows(f"typing, {count} times", MEASURES, found), [*urls], base))


if __name__ == "__main__":
    # so that `timeout` ends both servers too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()

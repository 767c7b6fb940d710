"""`python -m bench.restart MODEL`: the time to the first token of a long prompt after kill -9 and a start.

The prompt is computed once by a server with an empty `--cache-dir` (cold), and once by the next server, after SIGKILL,
from the files of the first one (warm). `again`: once more, from memory. All other options go to `afterword serve`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from pathlib import Path
from random import Random

from bench.server import started_server

_SETTLED = 1.5  # seconds without a new file, after which everything is written


def main() -> None:
    """Print the times of every round, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.restart", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the prompt (20,000)")
    parser.add_argument("--rounds", type=int, default=1)
    options, further = parser.parse_known_args()
    print(f"{'cold, s':>10}{'warm, s':>10}{'ratio':>8}{'cached':>8}{'start, s':>10}{'again, s':>10}{'MB':>8}")
    for round_number in range(options.rounds):
        prompt = Random(round_number).choices(range(300, 3000), k=options.tokens)
        with tempfile.TemporaryDirectory() as folder:
            words = [options.model, "--cache-dir", folder, "--context", str(options.tokens + 64), *further]
            with started_server(words) as first:
                cold, _ = _first_token(first.port, prompt)
                size = _settled_size(Path(folder))
            with started_server(words) as second:
                warm, cached = _first_token(second.port, prompt)
                again, _ = _first_token(second.port, prompt)
            print(
                f"{cold:10.2f}{warm:10.3f}{warm / cold:8.4f}{cached:8}"
                f"{second.seconds:10.2f}{again:10.3f}{size / 1e6:8.0f}   first start {first.seconds:.2f} s",
                flush=True,
            )


def _first_token(port: int, prompt: list[int]) -> tuple[float, int]:
    """Seconds from the request to the response with one token, and the cached tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    begun = time.monotonic()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    taken = time.monotonic() - begun
    connection.close()
    return taken, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def _settled_size(folder: Path) -> int:
    """Wait until no more files are written. Returns the bytes of all files."""
    before, since = -1, time.monotonic()
    while time.monotonic() < since + _SETTLED:
        time.sleep(0.05)
        size = sum(path.stat().st_size for path in folder.glob("*.part"))
        if size != before:
            before, since = size, time.monotonic()
    return before


if __name__ == "__main__":
    main()

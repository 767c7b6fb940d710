"""`python -m bench.memory MODEL`: the memory that full slots take, beside what their tokens need.

The server has 16 slots of the context on which the model was trained. After short requests in all slots, 16 prompts are
computed at once. The growth of the worker's memory is compared with the bytes of the keys and values of their tokens.
Other options go to `afterword serve`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import psutil

from afterword.models.gguf_facts import read_facts
from bench.server import started_server

SLOTS = 16
SHORT = 32  # tokens of the first requests
_SETTLED = 3.0  # seconds; an idle worker gives memory back once a second


def main() -> None:
    """Print the memory before and after, and the ratio of its growth to what the tokens need."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each prompt (1,024)")
    options, further = parser.parse_known_args()
    facts = read_facts(options.model)
    with started_server([options.model, "--parallel", str(SLOTS), *further]) as server:
        worker = max(psutil.Process(server.pid).children(), key=lambda child: child.memory_info().rss)
        _compute(server.port, Random(0), [SHORT] * SLOTS)
        _compute(server.port, Random(1), [options.tokens])
        _compute(server.port, Random(2), [SHORT] * SLOTS)
        before = _settled(worker)
        _compute(server.port, Random(3), [options.tokens] * SLOTS)
        after = _settled(worker)
    tokens = SLOTS * (options.tokens - SHORT)
    needed = tokens * facts.kv_bytes_per_token()
    print(f"{SLOTS} slots of {facts.context_length:,} tokens; {tokens:,} tokens more in them")
    print(f"the worker's memory: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
    print(f"growth / need: {(after - before) / 1e6:.1f} MB / {needed / 1e6:.1f} MB = {(after - before) / needed:.3f}")


def _compute(port: int, random: Random, lengths: list[int]) -> None:
    """Send prompts of these lengths at once, and wait for all responses."""
    prompts = [random.choices(range(300, 3000), k=length) for length in lengths]
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: _request(port, prompt), prompts))


def _request(port: int, prompt: list[int]) -> None:
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"The server answered {response.status}: {content[:500].decode(errors='replace')}")


def _settled(worker: psutil.Process) -> int:
    """The worker's resident memory in bytes, after it had time to give memory back."""
    time.sleep(_SETTLED)
    return int(worker.memory_info().rss)


if __name__ == "__main__":
    main()

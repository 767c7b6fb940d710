"""llama-server with its own grammars, measured as `bench.grammar` measures Afterword's: 16 texts at a time."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.process_tree import ending

START_SECONDS = 1800
"""The first start compiles the server."""


class NotWritten(Exception):
    """The server refused a request or ended a text early. The message is the reason."""


class LlamaServer:
    """A running llama-server, asked for texts of equal length by several threads. `timeout`: seconds of a response."""

    def __init__(self, url: str, texts: int, timeout: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=False)
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(texts)
        self._texts = texts

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        self._http.close()

    def seconds(self, grammar: Mapping[str, Any], tokens: int) -> float:
        """The time in which the server writes all texts with so many tokens each."""
        rng = random.Random(1)
        prompts = [[rng.randrange(5, 1000) for _ in range(8)] for _ in range(self._texts)]
        body = {"n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0.8, "top_p": 0.95}
        bodies = [{**body, **grammar, "prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
        began = time.perf_counter()
        for answer in self._pool.map(self._answer, bodies):
            if (written := answer["tokens_predicted"]) != tokens:
                raise NotWritten(f"a text has {written} tokens")
        return time.perf_counter() - began

    def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = self._http.post("/completion", json=body)
        except httpx.TimeoutException:
            raise NotWritten(f"no response in {self._timeout:g} s") from None
        except httpx.TransportError as why:
            raise NotWritten(f"no response: {type(why).__name__}") from None
        if response.status_code != 200:
            raise NotWritten(" ".join(response.text.split())[:150])
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def llama_server(model: Path, threads: int, texts: int, timeout: float) -> Iterator[LlamaServer]:
    """Start llama-server on a model with one slot for each text, and end it afterwards. `timeout`: of a response."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = ["--threads", str(threads), "--slots", str(texts), "--context", "2048"]
    command = [sys.executable, "-m", "bench", "serve", "llama-server", "--model", str(model), "--port", str(port), *how]
    with ending(psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url)
        server = LlamaServer(url, texts, timeout)
        try:
            yield server
        finally:
            server.close()


def _wait_until_ready(process: psutil.Popen, url: str) -> None:
    latest = time.monotonic() + START_SECONDS
    while time.monotonic() < latest and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("llama-server did not start: python -m bench serve llama-server says why")

"""The proxies of the deploy guide in front of a real server, with the guide's own configuration, where installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from docs_blocks import read


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def proxy(kind: str, upstream: str, folder: Path) -> Iterator[str]:
    """The configuration at a free port and without TLS."""
    (text,) = (block.text for block in read("docs/guides/deploy.md") if block.language == kind)
    port = free_port()
    text = text.replace("127.0.0.1:8000", upstream.removeprefix("http://"))
    if kind == "nginx":
        text = re.sub(r"(?m)^ *ssl_\w+ .*\n", "", text).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        text = f"daemon off; pid {folder}/pid; error_log stderr; events {{}} http {{ access_log off; {text} }}"
        command = ["nginx", "-e", "stderr", "-c"]
    else:
        text = "{\n\tadmin off\n}\n" + text.replace("completions.example.org", f"http://127.0.0.1:{port}")
        command = ["caddy", "run", "--adapter", "caddyfile", "--config"]
    path = folder / "proxy.conf"
    path.write_text(text, encoding="utf-8")
    environment = os.environ | {"HOME": str(folder)}
    with subprocess.Popen([*command, str(path)], env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(transport=httpx.HTTPTransport(retries=8), trust_env=False) as client:
                client.get(f"{url}/health").raise_for_status()
            yield url
        finally:
            process.terminate()


@pytest.mark.parametrize(("kind", "program"), [("nginx", "nginx"), ("caddyfile", "caddy")])
def test_tokens_come_as_they_are_made_and_leaving_ends_the_work(
    kind: str, program: str, serve: Any, tmp_path: Path
) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    log = tmp_path / "log.jsonl"
    options = ("--parallel", "8", "--proxy", "127.0.0.1", "--log", str(log))
    body = {"prompt": "Once", "max_tokens": 2000, "n": 8, "ignore_eos": True, "stream": True}
    with serve(*options, key=None) as server, proxy(kind, server.url, tmp_path) as url, server.http() as direct:
        with (
            httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body, headers={"X-Forwarded-For": "203.0.113.9"}) as answer,
        ):
            assert next(answer.iter_lines()).startswith("data: {")
            assert direct.get("/ready").json()["running"] > 0, "the first token came while the others were made"
        while direct.get("/ready").json()["running"]:
            pass
    (line,) = (entry for entry in map(json.loads, log.read_text().splitlines()) if entry["route"] == "/v1/completions")
    assert line["generated_tokens"] < 8 * 2000
    assert line["peer"] == "127.0.0.1", "what a caller says of itself is not believed"

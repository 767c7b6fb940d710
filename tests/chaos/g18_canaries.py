"""G18: prompts and API keys appear in no log, output, error, process table or file."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from afterword.api.routes import completions
from afterword.completion import request

from .client import ClientConnection, Reply, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .server import Server

AT_ONCE = 8
NUMBERS = ("n", "temperature", "echo", "logit_bias", "stream_options", "seed", "logprobs", "stop_token_ids")
FIELDS = ("prompt", "suffix", "user", "stop", "cache_salt", *NUMBERS)
SECRET = "canary-of-the-operator"

Body = dict[str, Any]


def run(trial: Trial) -> Result:
    key = f"sk-canary-{Random(trial.seed).getrandbits(128):032x}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys, log = folder / "keys", folder / "log"
        keys.write_text(key)
        keys.chmod(0o600)
        variables = {"HF_TOKEN": SECRET, "OPENAI_API_KEY": SECRET, "TMPDIR": name}
        arguments = ("--parallel", "8", "--context", "256", "--api-key-file", str(keys), "--log", str(log))
        with trial.serve(*arguments, scripted=True, variables=variables, key=None) as server:
            errors = asyncio.run(_provoke(server.with_key(key), trial))
            seen = _processes(server) | {"stderr": server.stderr_bytes}
        seen |= {"log": log.read_bytes(), "files": _files(folder, keys)}
        lines = len(seen["log"].splitlines())
    hits = [source for source, content in (seen | {"errors": errors}).items() if b"canary" in content]
    return Result(
        not hits and lines >= trial.size, {"sources": len(seen) + 1, "log lines": lines, "hits": ", ".join(hits) or 0}
    )


def _processes(server: Server) -> dict[str, bytes]:
    """The facts that the system shows about the server's processes, without the server's own environment."""
    children = psutil.Process(server.pid).children(recursive=True)
    files = {f"arguments of {process.pid}": Path(f"/proc/{process.pid}/cmdline") for process in children}
    files |= {f"environment of {process.pid}": Path(f"/proc/{process.pid}/environ") for process in children}
    files["arguments"] = Path(f"/proc/{server.pid}/cmdline")
    return {source: _read(path) for source, path in files.items()}


def _read(path: Path) -> bytes:
    """The bytes of the file; empty if this user may not read it."""
    try:
        return path.read_bytes()
    except PermissionError:
        return b""


def _files(folder: Path, keys: Path) -> bytes:
    """The names and contents of files that the server left in its folder for temporary files."""
    found = [path for path in folder.rglob("*") if path.is_file() and path != keys]
    return b"\n".join(str(path).encode() + path.read_bytes() for path in found)


async def _provoke(server: Server, trial: Trial) -> bytes:
    """Send valid and invalid requests with canaries in every text, then kill the worker. Returns all errors' bodies."""
    errors: list[bytes] = []

    async def send_item(connection: ClientConnection, body: Body | bytes) -> None:
        reply = await connection.ask(body)
        errors.append(_content(reply))

    await run_concurrently(server, _bodies(trial), send_item, AT_ONCE)
    await _wrong_keys(server, errors)
    _no_http(server)
    asking = [
        asyncio.create_task(ClientConnection(server).ask(_good(f"canary-{number}", stream=True))) for number in range(4)
    ]
    await asyncio.sleep(0.05)
    server.worker().kill()
    errors += [_content(await each) for each in asking]
    async with asyncio.timeout(30):
        while (await asyncio.to_thread(server.load))["status"] != "ready":
            await asyncio.sleep(0.1)
    return b"\n".join(errors)


def _content(reply: Reply) -> bytes:
    """The body of an error; empty for a completion, which may contain its own prompt."""
    return b"" if reply.status == 200 else reply.body


async def _wrong_keys(server: Server, errors: list[bytes]) -> None:
    for key in ("sk-canary-canary-canary", "canary", "canary " * 100, "sk-canary-\xe9"):
        connection = ClientConnection(server.with_key(key))
        reply = await connection.ask({"prompt": "x"})
        errors.append(reply.body.replace(b"sk-canar", b""))  # the first 8 characters are shown, as the API does
        connection.leave()


def _no_http(server: Server) -> None:
    """Send bytes that are not a request."""
    for data in (
        b"canary canary\r\n\r\n",
        b"GET /canary HTTP/9.9\r\ncanary: canary\r\n\r\n",
        b"\x16\x03\x01canary",
        b"canary" * 9999,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as line:
            line.sendall(data)
            line.settimeout(0.2)
            try:
                line.recv(100)
            except OSError:
                continue


def _good(text: str, **more: Any) -> Body:
    texts = {
        "prompt": f"{text}\n{text}",
        "suffix": text,
        "user": text,
        "cache_salt": text,
        "stop": [text, "\x1b[31m" + text],
    }
    return {**texts, "max_tokens": 8, **more}


def _bodies(trial: Trial) -> Iterator[Body | bytes]:
    random = Random(trial.seed)
    for number in range(trial.size):
        text = f"canary-{random.getrandbits(64):016x}"
        trial.say(f"G18 {number}")
        wrong = random.choice(({"text": text}, [text, 5], [[text]]))
        yield random.choice(
            (
                _good(text),
                _good(text, stream=True),
                _good(text) | {"max_tokens": 10**6},
                _good(text) | {random.choice(FIELDS): wrong},
                _good(text) | {random.choice(NUMBERS): text},
                json.dumps(_good(text)).encode()[: random.randint(1, 60)],
            )
        )


def log_what_is_refused(patch: pytest.MonkeyPatch) -> None:
    """A realistic mistake of a developer who looks for a bug."""

    def parse(body: bytes, limits: Any) -> request.CompletionRequest:
        try:
            return request.parse(body, limits)
        except Exception:
            import logging

            logging.getLogger("afterword").warning("refused: %r", body[:200])
            raise

    patch.setattr(completions, "parse", parse)


GATE = Gate(
    name="G18",
    goal="no text and no key in logs, output, errors, arguments, environments, files",
    unit="requests with canaries",
    commit=500,
    nightly=20_000,
    run=run,
    fault=Fault("refused bodies are logged", "server", log_what_is_refused),
    planted=60,
)

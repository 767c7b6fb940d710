"""The fenced blocks of the documents, and how each is checked. `test_docs_commands.py` is the test that uses it.

Shell blocks are run, page by page, from top to bottom, in a copy of the repository's folder that is theirs, beside a
server of the built-in model. Python blocks are run. Configuration is read by its own program where that is installed,
else by a parser. A second word after the language (```` ```json in.jsonl ````) is a file that later blocks find.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "src" / "afterword" / "models" / "builtin" / "afterword-tiny.gguf"
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
SECONDS = 240
"""The time limit for one block of a document; a busy machine needs less."""

SUBSTITUTIONS = {
    # text in the documents: text that is run instead
    r"(127\.0\.0\.1|localhost):8000": "{address}",
    r"(/?[\w.]+/)*model\.gguf": "{model}",
    r"\.venv/bin/": "",
    r"\bYOUR_KEY\b": "none",
    r"\b1f0a9c3e\b": "$(afterword keys list --json | python -c 'import json, sys; print(json.load(sys.stdin)[0][\"id\"])')",  # noqa: E501
    r"--tasks hellaswag\b": "--include_path . --tasks choices",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it begins, its language, the file that it is (or ""), its text."""

    page: str
    line: int
    language: str
    file: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def name(self) -> tuple[str, str]:
        """The page and the first line: what tables of blocks know it by."""
        return self.page, self.text.partition("\n")[0].strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a block: empty if it is correct, else the error."""

    block: Block
    problem: str


def pages(root: Path = ROOT) -> list[str]:
    """The documents with checked blocks."""
    named = ["README.md", "CONTRIBUTING.md", "bench/README.md", "training/README.md"]
    return named + [str(path.relative_to(root)) for path in sorted((root / "docs").rglob("*.md"))]


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in their order."""
    found = []
    for match in FENCE.finditer(text):
        words = [*match["info"].split(), "", ""]
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, words[0], words[1], body))
    return found


def read(page: str) -> list[Block]:
    return blocks(page, (ROOT / page).read_text(encoding="utf-8"))


class Workplace:
    """A copy of the repository's files, a home folder, and commands, some of which are substitutes.

    `afterword serve` is started for real, on a free port, and ended when it prints that it serves. Arguments that were
    tried before (recorded in the folder `started`) are not tried again, unless they name files in a home. `make` prints
    its commands without running them, since they take minutes. `curl` fails on an HTTP error.
    """

    def __init__(self, folder: Path, address: str, hub: str, started: Path) -> None:
        self.folder = folder / "here"
        self._values = {"address": address, "model": str(BUILTIN)}
        self._bin = folder / "bin"
        home = folder / "home"
        for each in (self.folder, self._bin, home):
            each.mkdir(parents=True)
        for entry in ROOT.iterdir():
            if not entry.name.startswith("."):
                (self.folder / entry.name).symlink_to(entry)
        self._command("afterword", sys.executable, AFTERWORD)
        self._command("make", "sh", f'exec {shutil.which("make")} -n "$@"')
        self._command("curl", "sh", f'exec {shutil.which("curl")} --fail "$@"')
        for module in ("lm_eval", "llm"):  # where clients are installed, their scripts are not on the path
            self._command(module, "sh", f'exec python -m {module} "$@"')
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERWORD_", "XDG_", "HF_"))}
        path = os.pathsep.join([str(self._bin), str(Path(sys.executable).parent), os.environ["PATH"]])
        named = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub, "PATH": path}
        plain = {"no_proxy": "*", "NO_PROXY": "*", "PYTHONWARNINGS": "ignore", "STARTED": str(started)}
        self.environment = kept | named | plain

    def _command(self, name: str, interpreter: str, text: str) -> None:
        path = self._bin / name
        path.write_text(f"#!{shutil.which(interpreter)}\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def substituted(self, text: str) -> str:
        for pattern, replacement in SUBSTITUTIONS.items():
            words = replacement
            for name, value in self._values.items():
                words = words.replace(f"{{{name}}}", value)
            text = re.sub(pattern, lambda _, words=words: words, text)  # type: ignore[misc]
        return text

    def run(self, *command: str, stdin: str = "") -> str:
        """Nothing, or what a command says when it fails."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(stdin, SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return f"did not end in {SECONDS} s"
        return f"status {process.returncode}\n{said[-4000:]}" if process.returncode else ""


AFTERWORD = """\
import hashlib, os, pathlib, re, signal, subprocess, sys
words = sys.argv[1:]
command = [sys.executable, "-m", "afterword", *words]
if words[:1] != ["serve"] or {"--help", "--print-limits"} & set(words):
    os.execv(sys.executable, command)
mark = pathlib.Path(os.environ["STARTED"], hashlib.sha256(repr(words).encode()).hexdigest())
if mark.exists() and not any("hf:" in word or "key" in word for word in words):
    sys.exit(0)
with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
    greeted = any(re.search(r"http://\\S+$", line) for line in server.stdout)
    server.send_signal(signal.SIGTERM)
if greeted:
    mark.touch()
sys.exit(0 if greeted else server.returncode or 1)
"""


# ---- one kind of check a language


def shell(block: Block, place: Workplace) -> str:
    return place.run("bash", "-euo", "pipefail", "-c", place.substituted(block.text))


def console(block: Block, place: Workplace) -> str:
    lines = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    return place.run("bash", "-euo", "pipefail", "-c", place.substituted("\n".join(lines)))


def python(block: Block, place: Workplace) -> str:
    return place.run(sys.executable, "-", stdin=place.substituted(block.text))


def parsed(reader: Callable[[str], object]) -> Callable[[Block, Workplace], str]:
    """A check that a text can be read."""

    def check(block: Block, _: Workplace) -> str:
        try:
            reader(block.text)
        except ValueError as problem:
            return str(problem)
        except (yaml.YAMLError, configparser.Error) as problem:
            return str(problem)
        return ""

    return check


def lines_of_json(text: str) -> object:
    return [json.loads(line) for line in text.splitlines() if line]


def unit(block: Block, place: Workplace) -> str:
    """A systemd unit or another file of its syntax."""
    problem = parsed(configparser.RawConfigParser(strict=False, interpolation=None).read_string)(block, place)
    if problem or "[Service]" not in block.text or not shutil.which("systemd-analyze"):
        return problem
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", block.text)  # theirs is not here
    path = place.folder / "checked.service"
    path.write_text(text, encoding="utf-8")
    return place.run("systemd-analyze", "verify", "--recursive-errors=no", str(path))


def nginx(block: Block, place: Workplace) -> str:
    inner = block.text if re.search(r"(?m)^(server|upstream|map)\b", block.text) else f"server {{ {block.text} }}"
    if block.text.count("{") != block.text.count("}"):
        return "unbalanced braces"
    if not shutil.which("nginx"):
        return ""
    path = place.folder / "nginx.conf"
    inner = re.sub(r"(?m)^\s*ssl_certificate(_key)? .*$|\bssl\b|\bhttp2\b", "", inner)  # the files are not here
    inner = re.sub(r"listen\s+443\s*;", "listen 127.0.0.1:8443;", inner)
    path.write_text(
        f"pid {place.folder}/nginx.pid;\nevents {{}}\nhttp {{ access_log off; {inner} }}\n", encoding="utf-8"
    )
    return place.run("nginx", "-t", "-q", "-e", "stderr", "-c", str(path))


def caddy(block: Block, place: Workplace) -> str:
    if block.text.count("{") != block.text.count("}"):
        return "unbalanced braces"
    if not shutil.which("caddy"):
        return ""
    path = place.folder / "Caddyfile"
    path.write_text(block.text, encoding="utf-8")
    return place.run("caddy", "validate", "--adapter", "caddyfile", "--config", str(path))


def lua(block: Block, place: Workplace) -> str:
    if block.text.count("{") != block.text.count("}"):
        return "unbalanced braces"
    compiler = shutil.which("luac") or shutil.which("luac5.4")
    return place.run(compiler, "-p", "-", stdin=block.text) if compiler else ""


CHECKS: Mapping[str, Callable[[Block, Workplace], str]] = {
    "sh": shell,
    "console": console,
    "python": python,
    "toml": parsed(tomllib.loads),
    "json": parsed(json.loads),
    "jsonl": parsed(lines_of_json),
    "yaml": parsed(yaml.safe_load),
    "ini": unit,
    "systemd": unit,
    "nginx": nginx,
    "caddyfile": caddy,
    "lua": lua,
    "text": lambda _block, _place: "",  # what a program says, or a drawing
}


def check(block: Block, place: Workplace) -> Outcome:
    """Check one block; if it is a file, leave it where later blocks find it."""
    if block.file:
        (place.folder / block.file).write_text(place.substituted(block.text), encoding="utf-8")
    return Outcome(block, CHECKS[block.language](block, place))


def spelled(block: Block, place: Workplace) -> Outcome:
    """As much of a check as a block allows that cannot be run here: whether its language can read it."""
    match block.language:
        case "sh":
            problem = place.run("bash", "-n", "-c", block.text)
        case "python":
            problem = place.run(sys.executable, "-c", "import ast, sys; ast.parse(sys.stdin.read())", stdin=block.text)
        case _:
            problem = ""
    return Outcome(block, problem)

"""The command line: settings to a running server, or to an answer in the terminal. Sees all rooms."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import psutil

from afterword import __version__, cli_keys, limits
from afterword.completion.choice import Delta
from afterword.completion.limits import STRICT, Limits
from afterword.completion.plan import make_plan
from afterword.completion.request import parse
from afterword.completion.run import run, tokenize
from afterword.config import (
    GRID,
    PAIRED_TYPES,
    REPACKED_TYPES,
    SMALL_MODEL,
    Config,
    EngineSettings,
    advice,
    is_loopback,
    promise,
)
from afterword.door.limits import DoorLimits
from afterword.engine import frames
from afterword.engine.protocol import Card, Promise
from afterword.engine.supervisor import Policy, Supervisor
from afterword.errors import AfterwordError, SettingError
from afterword.keys.key import given_keys
from afterword.keys.ring import Ring
from afterword.keys.store import Store, default_path
from afterword.log import open_lines
from afterword.models.gguf import Facts, read_facts
from afterword.models.memory import available_memory, choose_shape
from afterword.models.registry import HubFile, Model, installed, locate, parse_spec

F = TypeVar("F", bound=Callable[..., Any])
SECONDS = click.FloatRange(0, 86_400)
_KV_BYTES = {"exact": 2, "f16": 2, "f32": 4}


class _Commands(click.Group):
    """Our errors are sentences for the person at the terminal, not tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AfterwordError as error:
            click.secho(f"afterword: {error.message}", err=True, fg="red")
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"auto_envvar_prefix": "AFTERWORD", "show_default": True})
@click.version_option(__version__, prog_name="afterword")
def main() -> None:
    """OpenAI's text Completions API on models that you run yourself.

    Every option can also be set in the environment: --port of serve is AFTERWORD_SERVE_PORT.
    """


def engine_options(command: F) -> F:
    """The options of every command that runs a model."""
    options = [
        click.option("--context", type=int, help="Tokens of one sequence.  [default: from the model and the memory]"),
        click.option(
            "--parallel", type=int, help="Sequences computed together.  [default: 16, or what fits in memory]"
        ),
        click.option("--threads", type=int, help="Threads that compute.  [default: one a core; 1 for small models]"),
        click.option("--batch", type=int, default=256, help="Most tokens of a prompt computed in one pass."),
        click.option(
            "--kv-type",
            type=click.Choice(["exact", "f16", "f32"]),
            help="Keys and values; see docs/reproducibility.md.  [default: exact where it is known to be, else f16]",
        ),
        click.option("--gpu-layers", type=int, default=0, help="Layers computed by a GPU; -1 for all of them."),
        click.option("--verbose", is_flag=True, help="Show what llama.cpp logs."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@click.option("--alias", help="Name of the model in requests.  [default: from the file]")
@click.option(
    "--api-key",
    multiple=True,
    envvar="AFTERWORD_API_KEY",
    help="A key that opens the server; can be repeated.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file with a key a line.")
@click.option("--keys", is_flag=True, help="Let in who has a key of afterword keys create.")
@click.option("--keys-file", type=click.Path(path_type=Path), envvar=cli_keys.KEYS_FILE, help="Keys kept elsewhere.")
@click.option("--wrong-keys", type=click.IntRange(min=0), default=20, help="Most a minute from one address; 0: any.")
@click.option("--shared-cache", is_flag=True, help="Use what was computed for one key for others too.")
@click.option("--log", type=click.Path(path_type=Path), help="Add a line of JSON a request to a file; - is stderr.")
@click.option("--allow-open", is_flag=True, help="Listen beyond this machine without any key.")
@click.option("--cors-origin", multiple=True, help="A web page's origin that may use the server; can be repeated.")
@click.option("--allowed-host", multiple=True, help="A name that the server answers to; * for any; can be repeated.")
@click.option(
    "--proxy", multiple=True, help="Address of a reverse proxy, which says for whom it asks; can be repeated."
)
@click.option("--drain-delay", type=SECONDS, default=0.0, help="Seconds to go on after SIGTERM, for a load balancer.")
@click.option("--grace", type=SECONDS, default=30.0, help="Seconds that answers have to end when the server does.")
@click.option("--limit", multiple=True, help="NAME=NUMBER of the limits that --print-limits lists; can be repeated.")
@click.option("--print-limits", is_flag=True, help="List the limits and what they are, and do no more.")
@click.option("--plain-text", is_flag=True, help="Text that spells a special token is plain text.")
@click.option("--max-queue", type=click.IntRange(min=1), default=4096, help="Most prompts that wait.")
@click.option("--max-logprobs", type=click.IntRange(0, 1000), default=20, help="Most alternatives a token.")
@click.option("--max-stop", type=click.IntRange(min=1), default=16, help="Most stop strings.")
@click.option("--strict", is_flag=True, help="Refuse what OpenAI refuses; its limits, no extension fields.")
@click.option(
    "--ignore-unknown", is_flag=True, help="Accept unknown fields; the header x-afterword-ignored lists them."
)
@engine_options
def serve(
    model: str | None,
    host: str,
    port: int,
    alias: str | None,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    keys: bool,
    keys_file: Path | None,
    wrong_keys: int,
    shared_cache: bool,
    log: Path | None,
    allow_open: bool,
    cors_origin: tuple[str, ...],
    allowed_host: tuple[str, ...],
    proxy: tuple[str, ...],
    drain_delay: float,
    grace: float,
    limit: tuple[str, ...],
    print_limits: bool,
    plain_text: bool,
    max_queue: int,
    max_logprobs: int,
    max_stop: int,
    strict: bool,
    ignore_unknown: bool,
    **engine: Any,
) -> None:
    """Serve MODEL: a GGUF file, hf:owner/repo[:file or quant], or nothing for the built-in model."""
    given = limits.parse(limit)
    requests = STRICT if strict else Limits(max_logprobs=max_logprobs, max_stop=max_stop)
    requests = limits.with_limits(requests, given)
    door = limits.with_limits(DoorLimits(max_per_peer=None if is_loopback(host) else 64), given)
    policy = limits.with_limits(Policy(queue=max_queue), given)
    limits.refuse_unknown(given)
    if print_limits:
        click.echo(limits.listed(requests, door, policy))
        return
    config = Config(
        host=host,
        port=port,
        keys=given_keys(api_key, api_key_file),
        keys_file=keys_file or (default_path() if keys else None),
        shared_cache=shared_cache,
        wrong_keys=wrong_keys,
        log=log,
        allow_open=allow_open,
        cors_origins=cors_origin,
        allowed_hosts=allowed_host,
        proxies=proxy,
        drain_delay=drain_delay,
        grace=grace,
        special_text=not plain_text,
        limits=replace(requests, ignore_unknown=ignore_unknown),
        door=door,
    )
    _run(_serve(model, alias, config, EngineSettings(**engine), policy))


@main.command()
@click.argument("prompt")
@click.option("--model", help="As for serve.")
@click.option("--suffix", help="Text after the gap to fill.")
@click.option("--max-tokens", type=int, default=128, help="Most tokens to write.")
@click.option("--temperature", type=float, default=1.0, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, help="Draw from the likeliest tokens with this much mass.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="Text to stop before; can be repeated.")
@click.option("--echo", is_flag=True, help="Print the prompt too.")
@engine_options
def complete(prompt: str, model: str | None, **options: Any) -> None:
    """Continue PROMPT (- reads standard input) in the terminal, without a server."""
    names = ("suffix", "max_tokens", "temperature", "top_p", "seed", "echo")
    body = {name: options.pop(name) for name in names}
    stop = options.pop("stop")
    text = sys.stdin.read() if prompt == "-" else prompt
    body |= {"prompt": text, "stop": list(stop) or None, "stream": True}
    _run(_complete(model, json.dumps(body).encode(), EngineSettings(**({"parallel": 1} | _given(options)))))


@main.command()
def models() -> None:
    """List the models on this machine that serve can use by name."""
    for model in installed():
        size = model.path.stat().st_size / 2**20
        spec = model.id if model.source == "built-in" else f"hf:{model.id}"
        click.echo(f"{spec:<60} {size:10,.1f} MiB  {model.source}")


@main.command()
@click.argument("spec")
def pull(spec: str) -> None:
    """Download a model: hf:owner/repo, hf:owner/repo:Q4_K_M or hf:owner/repo:file.gguf."""
    from afterword.models.pull import pull as download  # the Hub's library takes half a second to import

    parsed = parse_spec(spec)
    if not isinstance(parsed, HubFile):
        raise SettingError(f"{spec} is not on the Hub; write hf:owner/repo.")
    model = download(parsed)
    click.echo(f"{model.id} is at {model.path}. Serve it with: afterword serve {spec}")


main.add_command(cli_keys.keys)
main.add_command(cli_keys.usage)


# ---- what the commands do


async def _serve(spec: str | None, alias: str | None, config: Config, settings: EngineSettings, policy: Policy) -> None:
    from afterword.api.app import make_app
    from afterword.api.life import Life
    from afterword.api.service import Served, Service
    from afterword.door.server import Door
    from afterword.door.signals import Told

    model, facts, engine = _prepare(spec, settings, policy)
    store = Store(config.keys_file, patience=1) if config.keys_file else None
    ring = Ring(config.keys, store, config.wrong_keys)
    served = Served(alias or model.id, int(model.path.stat().st_mtime), engine)
    life = Life()
    with _listen(config) as listener, open_lines(config.log) as log, Told(life.drain) as told:
        port = listener.getsockname()[1]
        app = make_app(Service(config, served, ring, log, life))
        async with ring.kept(), Door(app, listener, config.door, config.proxies) as door, _ended(engine):
            if not await told.unless(engine.open()):
                return
            click.echo(greeting(served.id, engine.card, config, port))
            if not settings.gpu_layers and (tip := advice(facts.file_type)):
                click.echo(f"\n{tip}")
            await told.first.wait()
            await door.drain(0 if told.person else config.drain_delay, config.grace, told.again)


async def _complete(spec: str | None, body: bytes, settings: EngineSettings) -> None:
    request = parse(body, Limits())
    async with _ended(_prepare(spec, settings, Policy())[2]) as engine:
        await engine.open()
        plan = make_plan(request, engine.card, await tokenize(request, engine), secrets.randbits(64))
        async for item in run(plan, engine):
            if isinstance(item, Delta):
                sys.stdout.write(item.text)
                sys.stdout.flush()
        sys.stdout.write("\n")


def _prepare(spec: str | None, settings: EngineSettings, policy: Policy) -> tuple[Model, Facts, Supervisor]:
    """A model and its engine, which is not open yet."""
    model = locate(parse_spec(spec))
    facts = read_facts(model.path)
    return model, facts, Supervisor(open_frame(model, facts, settings), policy)


@asynccontextmanager
async def _ended(engine: Supervisor) -> AsyncIterator[Supervisor]:
    """An engine that is closed afterwards, opened or not."""
    try:
        yield engine
    finally:
        await engine.close()


def open_frame(model: Model, facts: Facts, settings: EngineSettings) -> frames.Open:
    """Settings with nothing left to choose. Raises `SettingError` if they cannot be met."""
    best = promise(facts.file_type, facts.experts, "exact", settings.gpu_layers)
    kv_type = settings.kv_type or ("exact" if best == "exact" else "f16")
    promised = promise(facts.file_type, facts.experts, kv_type, settings.gpu_layers)
    shape = choose_shape(facts, available_memory(), settings.context, settings.parallel, _KV_BYTES[kv_type])
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return frames.Open(
        path=str(model.path),
        context=shape.context,
        sequences=shape.parallel,
        threads=settings.threads or (1 if facts.size_bytes < SMALL_MODEL else cores),
        chunk=settings.batch,
        kv_type=kv_type,
        gpu_layers=settings.gpu_layers,
        verbose=settings.verbose,
        grid=1 if promised == "exact" else GRID,
        repack=promised == "none" or facts.file_type in REPACKED_TYPES,
        pairs=promised == "exact" and facts.file_type in PAIRED_TYPES,
        promise=promised,
    )


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise SettingError(f"Cannot listen on {config.host} port {config.port}: {error.strerror}.") from None


_PROMISES: dict[Promise, str] = {
    "exact": "The same request gives the same bytes, and a token the same numbers read or generated.",
    "reproducible": "The same request gives the same bytes.",
    "none": "Numbers can differ in their last digits with who else is served (docs/reproducibility.md).",
}


def greeting(name: str, card: Card, config: Config, port: int) -> str:
    """What a person needs to know when the server is up, with a curl line that works."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{port}"
    key = "-H 'Authorization: Bearer YOUR_KEY' " if config.guarded else ""
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 40})
    return f"""\
Afterword {__version__} serves {name} ({card.parameters / 1e6:,.1f} M parameters) at

  {url}

up to {card.sequences} sequences of {card.context} tokens together. {_PROMISES[card.promise]} Try it:

  curl {url}/v1/completions {key}\\
    -H 'Content-Type: application/json' -d {shlex.quote(body)}

docs/api.md explains every field, afterword serve --help every setting. Ctrl+C stops."""


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _run(work: Coroutine[Any, Any, None]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        import uvloop
    except ImportError:  # not on every system
        asyncio.run(work)
    else:
        uvloop.run(work)

"""What `afterword serve` and `afterword complete` do, apart from the command line's declarations, which start fast."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import secrets
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import click

from afterword import __version__, hosting, limits
from afterword.api import pieces, wire
from afterword.batch.limits import BatchLimits
from afterword.cli.loading import shown
from afterword.completion.choice import Delta, fold
from afterword.completion.limits import STRICT, Limits
from afterword.completion.plan import make_plan
from afterword.completion.request import parse
from afterword.completion.run import Usage, run, tokenize
from afterword.config import Config, EngineSettings, is_loopback
from afterword.door.limits import DoorLimits
from afterword.engine.protocol import Promise
from afterword.engine.roster import Host, Roster
from afterword.engine.supervisor import Policy, Supervisor
from afterword.errors import SettingError
from afterword.keys.key import given_keys
from afterword.keys.limits import KeyLimits
from afterword.keys.ring import Ring
from afterword.keys.store import Store, default_path
from afterword.log import open_lines
from afterword.tasks import switch_threads_soon
from afterword.times import as_time

E = TypeVar("E", Roster, Supervisor)
_ENGINE = ("context", "parallel", "threads", "batch", "kv_type", "gpu_layers", "reproducible", "verbose")
_LIMITS = {"max_logprobs": "max_logprobs", "max_stop": "max_stop", "queue": "max_queue"}
"""Limits that have options of their own. Whatever is set, by either name, goes before what `--strict` sets."""


def serve(specs: Sequence[str], options: dict[str, Any]) -> None:
    """Serve models until a signal says to end. `options` are the command's, by name."""
    own = {name: options[option] for name, option in _LIMITS.items() if options[option] is not None}
    given = own | limits.parse(options["limit"])
    requests = limits.with_limits(STRICT if options["strict"] else Limits(), given)
    door = limits.with_limits(DoorLimits(max_per_peer=None if is_loopback(options["host"]) else 64), given)
    policy = limits.with_limits(Policy(), given)
    batch = limits.with_limits(BatchLimits(), given)
    keys = limits.with_limits(KeyLimits(options["wrong_keys"]), given)
    limits.refuse_unknown(given)
    if options["print_limits"]:
        listed = limits.as_json if options["as_json"] else limits.listed
        click.echo(listed(requests, door, policy, batch, keys))
        return
    config = Config(
        host=options["host"],
        port=options["port"],
        keys=given_keys(options["api_key"], options["api_key_file"]),
        keys_file=options["keys_file"] or (default_path() if options["keys"] else None),
        shared_cache=options["shared_cache"],
        log=options["log"],
        metrics_prefix=options["metrics_prefix"],
        metrics_open=options["metrics_open"],
        traces=options["traces"],
        allow_open=options["allow_open"],
        cors_origins=options["cors_origin"],
        allowed_hosts=options["allowed_host"],
        proxies=options["proxy"],
        drain_delay=options["drain_delay"],
        grace=options["grace"],
        batch_dir=options["batch_dir"],
        special_text=not options["plain_text"],
        limits=replace(requests, ignore_unknown=options["ignore_unknown"]),
        door=door,
        batch=batch,
        key_limits=keys,
    )
    models = hosting.roster(specs, options["alias"], engine_settings(options), options["keep_alive"], policy)
    carried_out(_serve(models, config))


def complete(prompt: str, spec: str | None, options: dict[str, Any], server: tuple[str, str | None] | None) -> None:
    """Continue a text on standard output. `options` are the command's, by name. `server`: its URL and its key."""
    names = ("suffix", "max_tokens", "temperature", "top_p", "seed", "echo")
    body = {name: options[name] for name in names}
    text = sys.stdin.read() if prompt == "-" else prompt
    body |= {"prompt": text, "stop": list(options["stop"]) or None, "stream": True}
    if server:
        from afterword.cli.ask import ask

        ask(*server, body | {"model": spec}, options["as_json"])
        return
    parallel = 1 if options["parallel"] is None else options["parallel"]
    settings = replace(engine_settings(options), parallel=parallel)
    carried_out(_complete(spec, json.dumps(body).encode(), settings, options["as_json"]))


def engine_settings(options: dict[str, Any]) -> EngineSettings:
    """Those of a command's options that are the engine's."""
    return EngineSettings(**{name: options[name] for name in _ENGINE})


async def _serve(models: Roster, config: Config) -> None:
    from afterword.api.app import make_app  # the web framework takes a while to import, and complete does without
    from afterword.api.batches import asking
    from afterword.api.life import Life
    from afterword.api.service import Service
    from afterword.batch.manager import Manager, default_folder
    from afterword.batch.shelf import Shelf
    from afterword.door.server import Door
    from afterword.door.signals import Told
    from afterword.metrics import Metrics
    from afterword.traces import open_traces

    store = Store(config.keys_file, patience=1) if config.keys_file else None
    ring = Ring(config.keys, store, config.key_limits)
    life = Life()
    with (
        _listen(config) as listener,
        open_lines(config.log) as log,
        open_traces(config.traces) as traces,
        Told(life.drain) as told,
    ):
        port = listener.getsockname()[1]
        metrics = Metrics((host.id for host in models), config.metrics_prefix)
        shelf = Shelf(config.batch_dir or default_folder())
        shelf.check()
        batches = Manager(shelf, config.batch)
        service = Service(config, models, ring, log, life, metrics, batches, traces)
        app = make_app(service)
        door = Door(app, listener, config.door, config.proxies)
        metrics.turned_away = door.turned_away
        async with ring.kept(), door, _ended(models):
            async with shown({host.id: partial(_loaded, host) for host in models}):
                opened = await told.unless(models.open())
            if not opened:
                return
            gc.freeze()  # what is here stays: later collections, which stop the process, do not visit it
            async with batches.kept(asking(app, service)):
                click.echo(greeting(models, config, port))
                await told.first.wait()
            await door.drain(0 if told.person else config.drain_delay, config.grace, told.again)


async def _complete(spec: str | None, body: bytes, settings: EngineSettings, as_json: bool) -> None:
    request = parse(body, Limits())
    model, engine = hosting.one(spec, settings, Policy())
    deltas: list[Delta] = []
    usage = Usage(0, 0)
    async with _ended(engine):
        async with shown({model.id: lambda: engine.loaded}):
            await engine.open()
        plan = make_plan(request, engine.card, await tokenize(request, engine), secrets.randbits(64))
        async for item in run(plan, engine):
            if isinstance(item, Usage):
                usage = item
            elif as_json:
                deltas.append(item)
            else:
                sys.stdout.write(item.text)
                sys.stdout.flush()
    if as_json:
        head = wire.Head(wire.new_id(), int(time.time()), model.id, engine.card.fingerprint)
        sys.stdout.write(pieces.completion(head, [fold(deltas)], usage).decode())
    sys.stdout.write("\n")
    sys.stdout.flush()


def _loaded(host: Host) -> float:
    return 1.0 if host.up else host.engine.loaded if host.engine else 0.0


@asynccontextmanager
async def _ended(engine: E) -> AsyncIterator[E]:
    """An engine or several, closed afterwards, opened or not."""
    try:
        yield engine
    finally:
        await engine.close()


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


def greeting(models: Roster, config: Config, port: int) -> str:
    """What a person needs to know when the server is up, with a curl line that works."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{port}"
    key = "-H 'Authorization: Bearer YOUR_KEY' " if config.guarded else ""
    hosts = list(models)
    body = json.dumps({"model": hosts[0].id, "prompt": "Once upon a time", "max_tokens": 40})
    names = " and ".join(filter(None, (", ".join(host.id for host in hosts[:-1]), hosts[-1].id)))
    described = "\n".join(_described(host, len(hosts) > 1) for host in hosts)
    return f"""\
Afterword {__version__} serves {names} at

  {url}

{described}{_coming_and_going(models.keep_alive)} Try it:

  curl {url}/v1/completions {key}\\
    -H 'Content-Type: application/json' -d {shlex.quote(body)}

In a browser it is a page to write on. {url}/docs explains every field, afterword serve --help every setting.
Ctrl+C stops."""


def _described(host: Host, named: bool) -> str:
    size = f"{host.up.card.parameters / 1e6:,.1f} M parameters, up" if host.up else "up"
    text = f"{size} to {host.offer.sequences} sequences of {host.offer.context} tokens together."
    tip = f" {host.offer.tip}" if host.offer.tip else ""
    return f"{f'{host.id}: ' if named else ''}{text} {_PROMISES[host.promise]}{tip}"


def _coming_and_going(keep_alive: float | None) -> str:
    if keep_alive is None:
        return ""
    return f"\nA model is loaded when a request asks for it and unloaded {as_time(keep_alive)} after the last one."


def carried_out(work: Coroutine[Any, Any, None]) -> None:
    """Run something until it is over, with the fastest event loop there is."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    switch_threads_soon()
    try:
        import uvloop
    except ImportError:  # not on every system
        asyncio.run(work)
    else:
        uvloop.run(work)

"""Implements `afterword serve` and `afterword complete`: builds their parts, and runs the event loop."""

from __future__ import annotations

import errno
import gc
import json
import logging
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from afterword.api.responses import incremental, serialization
from afterword.batch.batch_limits import BatchLimits
from afterword.cli import http_setup, model_setup, vllm_setup
from afterword.cli.load_progress import show_loading
from afterword.cli.model_defaults import read_model_defaults
from afterword.cli.startup_message import startup_message
from afterword.completion.choice import Delta, fold
from afterword.completion.plan import make_plan
from afterword.completion.request import parse
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.completion.run import Usage, run, tokenize
from afterword.config import Config, EngineSettings, is_loopback
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ManagedModel, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.errors import SettingError
from afterword.keys.key import static_keys
from afterword.keys.key_limits import KeyLimits
from afterword.keys.key_registry import KeyRegistry
from afterword.keys.key_store import KeyStore, default_path
from afterword.observability.request_log import open_request_log
from afterword.settings import limit_table
from afterword.settings.durations import format_duration
from afterword.system.tasks import run_loop, switch_threads_soon
from afterword.transport.transport_limits import TransportLimits

if TYPE_CHECKING:
    from afterword.api.service import Service

E = TypeVar("E", ModelManager, Supervisor)
_ENGINE = (
    "context",
    "parallel",
    "threads",
    "batch",
    "kv_type",
    "gpu_layers",
    "reproducible",
    "infill_template",
    "speculate",
    "draft_model",
    "verbose",
)
_ENGINE_OF = {"vllm_python": "vllm", "vllm_flags": "vllm", "upstream": "http", "upstream_key_file": "http"}
"""Options that have a meaning for one engine only."""

_LIMITS = {"max_logprobs": "max_logprobs", "max_stop": "max_stop", "queue": "max_queue"}
"""Options that set a limit, by the limit's name. Both `--limit` and these options take precedence over `--strict`."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """The tables of limits that the options of `afterword serve` set."""

    requests: RequestLimits
    transport: TransportLimits
    queue: QueuePolicy
    batch: BatchLimits
    keys: KeyLimits


def serve(specs: Sequence[str], options: dict[str, Any]) -> None:
    """Serve models until a signal. `options`: the values of the command's options by name. Raises `SettingError`."""
    if options["print_limits"]:
        limits = _limits(options)
        listed = limit_table.limits_as_json if options["as_json"] else limit_table.limits_as_text
        click.echo(listed(limits.requests, limits.transport, limits.queue, limits.batch, limits.keys))
        return
    run_async(_serve(*server_parts(specs, options)))


def server_parts(specs: Sequence[str], options: dict[str, Any]) -> tuple[ModelManager, Config]:
    """The models and the settings of a server, from the options of `afterword serve`. Raises `SettingError`.

    No model is loaded.
    """

    def make_models(queue: QueuePolicy, requests: RequestLimits) -> ModelManager:
        settings = replace(
            engine_settings(options), cache_dir=options["cache_dir"], cache_bytes=int(options["cache_size"] * 10**9)
        )
        return _models(specs, options, settings, queue, requests.max_logprobs)

    return parts_with_models(options, make_models)


def parts_with_models(
    options: dict[str, Any], make_models: Callable[[QueuePolicy, RequestLimits], ModelManager]
) -> tuple[ModelManager, Config]:
    """The parts of a server with other models than those that the options name. Raises `SettingError`."""
    limits = _limits(options)
    config = Config(
        host=options["host"],
        port=options["port"],
        keys=static_keys(options["api_key"], options["api_key_file"]),
        keys_file=options["keys_file"] or (default_path() if options["keys"] else None),
        shared_cache=options["shared_cache"],
        log=options["log"],
        metrics_prefix=options["metrics_prefix"],
        metrics_underscores=options["metrics_underscores"],
        metrics_keys=options["metrics_keys"],
        metrics_open=options["metrics_open"],
        traces=options["traces"],
        allow_open=options["allow_open"],
        cors_origins=options["cors_origin"],
        allowed_hosts=options["allowed_host"],
        proxies=options["proxy"],
        drain_delay=options["drain_delay"],
        grace=options["grace"],
        batch_dir=options["batch_dir"],
        lora_dir=options["lora_dir"],
        lora_keys=options["lora_key"],
        special_text=not options["plain_text"],
        infill_trim=options["infill_trim"],
        bos_before_ids=options["bos_before_ids"],
        infill_rerank=options["infill_fallback"] == "rerank",
        limits=replace(limits.requests, ignore_unknown=options["ignore_unknown"]),
        transport=limits.transport,
        batch=limits.batch,
        key_limits=limits.keys,
    )
    models = make_models(limits.queue, limits.requests)
    if options["defaults"]:
        served = [managed_model.id for managed_model in models]
        config = replace(config, defaults=read_model_defaults(options["defaults"], served, config.limits))
    return models, config


def _limits(options: dict[str, Any]) -> _Limits:
    own = {name: options[option] for name, option in _LIMITS.items() if options[option] is not None}
    given = own | limit_table.parse_limits(options["limit"])
    max_per_peer = None if is_loopback(options["host"]) else 64
    limits = _Limits(
        requests=limit_table.with_limits(STRICT if options["strict"] else RequestLimits(), given),
        transport=limit_table.with_limits(TransportLimits(max_per_peer=max_per_peer), given),
        queue=limit_table.with_limits(QueuePolicy(), given),
        batch=limit_table.with_limits(BatchLimits(), given),
        keys=limit_table.with_limits(KeyLimits(options["wrong_keys"]), given),
    )
    limit_table.check_all_used(given)
    return limits


def _models(
    specs: Sequence[str], options: dict[str, Any], settings: EngineSettings, policy: QueuePolicy, max_logprobs: int
) -> ModelManager:
    wanted = model_setup.WantedModels(specs, options["alias"], options["lora"], options["lora_dir"] is not None)
    for name, engine in _ENGINE_OF.items():
        if options[name] and options["engine"] != engine:
            file = " Before a file whose name begins with - write ./, as in ./-m.gguf." if name == "vllm_flags" else ""
            raise SettingError(f"--{name.replace('_', '-')}: give --engine {engine} too.{file}")
    if options["engine"] == "vllm":
        return vllm_setup.make_vllm_manager(wanted, settings, options, policy)
    if options["engine"] == "http":
        return http_setup.make_http_manager(wanted, settings, options, policy, max_logprobs)
    return model_setup.make_model_manager(wanted, settings, options["keep_alive"], policy)


def complete(prompt: str, spec: str | None, options: dict[str, Any], server: tuple[str, str | None] | None) -> None:
    """Write the continuation of `prompt` to standard output.

    `options`: values by option name. `server`: URL and API key of a server that is used instead of a model.
    """
    names = ("suffix", "max_tokens", "temperature", "top_p", "seed", "echo")
    body = {name: options[name] for name in names}
    text = sys.stdin.read() if prompt == "-" else prompt
    body |= {"prompt": text, "stop": list(options["stop"]) or None, "stream": True}
    if server:
        from afterword.cli.remote_complete import complete_remotely

        complete_remotely(*server, body | {"model": spec}, options["as_json"])
        return
    parallel = 1 if options["parallel"] is None else options["parallel"]
    settings = replace(engine_settings(options), parallel=parallel)
    run_async(_complete(spec, json.dumps(body).encode(), settings, options["as_json"]))


def engine_settings(options: dict[str, Any]) -> EngineSettings:
    """Return the engine settings among a command's options."""
    return EngineSettings(**{name: options[name] for name in _ENGINE})


async def _serve(models: ModelManager, config: Config) -> None:
    from afterword.api.app import make_app  # imported late: complete does not need the web framework
    from afterword.api.readiness import Readiness
    from afterword.api.routes.batches import make_batch_client
    from afterword.batch.file_store import FileStore
    from afterword.batch.manager import BatchManager, default_folder
    from afterword.observability.traces import open_traces
    from afterword.transport.server import TransportServer
    from afterword.transport.shutdown_signals import ShutdownSignals

    readiness = Readiness()
    with (
        _open_listener(config) as listener,
        open_request_log(config.log) as log,
        open_traces(config.traces) as traces,
        ShutdownSignals(readiness.drain) as shutdown_signals,
    ):
        port = listener.getsockname()[1]
        file_store = FileStore(config.batch_dir or default_folder())
        file_store.check()
        batches = BatchManager(file_store, config.batch)
        service = replace(
            make_service(config, models), request_log=log, readiness=readiness, batches=batches, traces=traces
        )
        app = make_app(service)
        transport_server = TransportServer(app, listener, config.transport, config.proxies)
        service.metrics.rejected = transport_server.rejected
        async with service.key_registry.syncing(), transport_server, closing(models):
            async with show_loading(
                {managed_model.id: partial(_loaded_share, managed_model) for managed_model in models}
            ):
                opened = await shutdown_signals.run_until_signal(models.open())
            if not opened:
                return
            gc.freeze()  # later garbage collections, which pause the process, skip the objects made so far
            async with batches.running(make_batch_client(app, service)):
                click.echo(startup_message(models, config, port))
                await shutdown_signals.first.wait()
                if shutdown_signals.interactive:
                    click.echo(waiting_message(sum(each.users for each in models), config.grace), err=True, nl=False)
            await transport_server.drain(
                0 if shutdown_signals.interactive else config.drain_delay, config.grace, shutdown_signals.second
            )


def make_service(config: Config, models: ModelManager) -> Service:
    """The objects that the routes of one process use, with its key registry and its metrics."""
    from afterword.api.service import Service
    from afterword.observability.metrics import Metrics

    store = KeyStore(config.keys_file, patience=1) if config.keys_file else None
    key_registry = KeyRegistry(config.keys, store, config.key_limits)
    further = (each.name for each in config.defaults)
    names = dict.fromkeys((*(managed_model.id for managed_model in models), *further))
    metrics = Metrics(names, config.metrics_names_begin, config.metrics_keys)
    return Service(config, models, key_registry, metrics=metrics)


def waiting_message(requests: int, grace: float) -> str:
    """The line that says what Ctrl+C waits for; empty if no request runs."""
    if not requests:
        return ""
    running = "1 running request" if requests == 1 else f"{requests} running requests"
    return f"\nWaiting up to {format_duration(grace)} for {running}. Ctrl+C again ends the server at once.\n"


async def _complete(spec: str | None, body: bytes, settings: EngineSettings, as_json: bool) -> None:
    request = parse(body, RequestLimits())
    model, engine = model_setup.single_model(spec, settings, QueuePolicy())
    deltas: list[Delta] = []
    usage = Usage(0, 0)
    async with closing(engine):
        async with show_loading({model.id: lambda: engine.loaded}):
            await engine.open()
        plan = make_plan(request, engine.model_info, await tokenize(request, engine), secrets.randbits(64))
        async for item in run(plan, engine):
            if isinstance(item, Usage):
                usage = item
            elif as_json:
                deltas.append(item)
            else:
                sys.stdout.write(item.text)
                sys.stdout.flush()
    if as_json:
        head = serialization.ResponseHead(
            serialization.new_id(), int(time.time()), model.id, engine.model_info.fingerprint
        )
        sys.stdout.write(incremental.completion(head, [fold(deltas)], usage).decode())
    sys.stdout.write("\n")
    sys.stdout.flush()


def _loaded_share(managed_model: ManagedModel) -> float:
    return 1.0 if managed_model.loaded_engine else managed_model.engine.loaded if managed_model.engine else 0.0


@asynccontextmanager
async def closing(engine: E) -> AsyncIterator[E]:
    """Close the engine or model manager after the block, even if it was not opened."""
    try:
        yield engine
    finally:
        await engine.close()


def _open_listener(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address there
        other = f"--port {config.port + 1 if config.port < 65535 else 8000}"
        advice = (
            f' Name another port: {other}, or make serve ARGS="{other}".' if error.errno == errno.EADDRINUSE else ""
        )
        raise SettingError(f"Cannot listen on {config.host} port {config.port}: {reason}.{advice}") from None


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """Set up logging and threads, and run a coroutine to its end."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    switch_threads_soon()
    run_loop(work)

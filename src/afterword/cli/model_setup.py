"""From specs and settings to engines that can be opened: which files, how much memory each, how they compute.

Opens nothing but the files' headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from afterword.config import CHUNK_GRID, ONE_SEQUENCE, SMALL_MODEL, EngineSettings, WeightTypes, advice
from afterword.engine import messages
from afterword.engine.messages import KvType
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.parent.supervisor import QueuePolicy, Supervisor
from afterword.engine.parent.worker_process import gpu_memory
from afterword.engine.protocol import Promise
from afterword.errors import SettingError
from afterword.models.file_names import check_utf8
from afterword.models.gguf_facts import Facts, parts, read_facts
from afterword.models.memory_fit import ComputeOptions, ModelShape, choose_shapes, usual_context
from afterword.models.registry import Model, locate, parse_spec
from afterword.system.resources import available_memory, cores

_KV_BYTES = {"exact": 2, "f16": 2, "f32": 4}
_BUSY_MODELS = 2  # models that come and go: so many are reckoned to be busy at once


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A model, how it is to be loaded, and the bytes of memory that this takes."""

    model: Model
    facts: Facts
    load_message: messages.LoadModel
    memory_bytes: int


def single_model(spec: str | None, settings: EngineSettings, policy: QueuePolicy) -> tuple[Model, Supervisor]:
    """A model and its engine, which is not open yet. Raises `SettingError`."""
    model, facts = _found(spec)
    return model, Supervisor(load_message(model, facts, settings), policy)


def make_model_manager(
    specs: Sequence[str],
    aliases: Sequence[str],
    settings: EngineSettings,
    keep_alive: float | None,
    policy: QueuePolicy,
) -> ModelManager:
    """The models of a server, none of them loaded; without a spec the built-in one. Raises `SettingError`."""
    models = [_found(spec) for spec in specs or (None,)]
    names = _names([model.id for model, _ in models], aliases)
    definitions = [
        ModelDefinition(
            id=name,
            created=int(placed.model.path.stat().st_mtime),
            make_engine=partial(Supervisor, partial(refreshed_load_message, placed, settings), policy),
            context=placed.load_message.context,
            sequences=placed.load_message.sequences,
            promise=placed.load_message.promise,
            memory_bytes=placed.memory_bytes,
            advice=advice("" if settings.gpu_layers else placed.facts.file_type, placed.facts.architecture),
        )
        for name, placed in zip(names, fit_models(models, settings, take_turns=keep_alive is not None), strict=True)
    ]
    return ModelManager(definitions, keep_alive=keep_alive, policy=policy, free=partial(_available_memory, settings))


def load_message(model: Model, facts: Facts, settings: EngineSettings) -> messages.LoadModel:
    """Settings with nothing left to choose. Raises `SettingError` if they cannot be met."""
    return fit_models([(model, facts)], settings)[0].load_message


def fit_models(
    models: Sequence[tuple[Model, Facts]], settings: EngineSettings, take_turns: bool = False
) -> list[PlacedModel]:
    """How models that share a machine are to be loaded. Raises `SettingError` if they do not fit.

    `take_turns`: they need not be there together. If they can be, each with its whole context, they are fitted for
    that; else each gets the memory that it would have alone.
    """
    wanted = [(facts, _run(facts, settings)) for _, facts in models]
    threads = _threads(min(len(models), _BUSY_MODELS if take_turns else len(models)))
    return [
        PlacedModel(model, facts, _load_message(model, facts, settings, shape, threads), shape.needed_bytes)
        for (model, facts), shape in zip(models, _shapes(wanted, settings, take_turns), strict=True)
    ]


def refreshed_load_message(placed: PlacedModel, settings: EngineSettings) -> messages.LoadModel:
    """How the model is to be loaded now: as planned, unless its file is another. Raises `SettingError`.

    Clients were told of the context, so another file gets the same number and length of sequences, or is refused.
    """
    facts = read_facts(placed.model.path)
    if facts == placed.facts:
        return placed.load_message
    planned = placed.load_message
    kept = replace(settings, context=planned.context, parallel=planned.sequences, threads=planned.threads)
    return load_message(placed.model, facts, kept)


def _run(facts: Facts, settings: EngineSettings) -> ComputeOptions:
    kv_type = _kv_type(settings)
    plain = kv_type == "f32" or (kv_type == "f16" and not settings.gpu_layers)  # else attention is flash attention
    return ComputeOptions(_KV_BYTES[kv_type], settings.batch, plain)


def _shapes(
    wanted: Sequence[tuple[Facts, ComputeOptions]], settings: EngineSettings, take_turns: bool
) -> list[ModelShape]:
    choose = partial(
        choose_shapes,
        available_bytes=_available_memory(settings),
        context=settings.context,
        parallel=settings.parallel,
        spare=int(settings.reproducible),
    )
    try:
        shapes = choose(wanted)
    except SettingError:
        if not take_turns:
            raise
    else:
        whole = all(shape.context >= usual_context(facts) for shape, (facts, _) in zip(shapes, wanted, strict=True))
        if whole or settings.context or not take_turns:
            return shapes
    return [choose([each])[0] for each in wanted]


def _available_memory(settings: EngineSettings) -> int:
    """Bytes that models may take: of the GPUs where they hold all layers, else of the machine."""
    return (settings.gpu_layers == -1 and gpu_memory()) or available_memory()


def _threads(busy: int) -> int:
    """For each of so many models: threads beyond the cores would wait for each other most of the time."""
    return max(1, cores() // busy)


def _load_message(
    model: Model, facts: Facts, settings: EngineSettings, shape: ModelShape, threads: int
) -> messages.LoadModel:
    kv_type = _kv_type(settings)
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    promised, without = _promises(weights, kv_type, settings)
    return messages.LoadModel(
        path=str(model.path),
        context=shape.context,
        sequences=1 if facts.architecture in ONE_SEQUENCE else shape.parallel,
        threads=settings.threads or (1 if facts.size_bytes < SMALL_MODEL else threads),
        chunk=settings.batch,
        kv_type=kv_type,
        gpu_layers=settings.gpu_layers,
        verbose=settings.verbose,
        # Where lengths of passes choose kernels, they are all one.
        grid=settings.batch if settings.reproducible else CHUNK_GRID,
        repack=without == "none" or weights.repacked,
        use_kernels=weights.uses_kernels,
        fixed_shape=settings.reproducible,
        promise=promised,
        promise_without_kernels=without,
        parts=tuple(map(str, parts(model.path, facts))),
    )


def _promises(weights: WeightTypes, kv_type: KvType, settings: EngineSettings) -> tuple[Promise, Promise]:
    """The most that can be promised with products of our own, and without them."""
    if settings.gpu_layers:
        promised = weights.promise_on_gpu(kv_type, settings.gpu_layers, settings.reproducible)
        return promised, promised
    without = weights.promise(kv_type, own_products=False)
    return weights.promise(kv_type, own_products=True) if weights.uses_kernels else without, without


def _found(spec: str | None) -> tuple[Model, Facts]:
    model = locate(parse_spec(spec))
    return model, read_facts(model.path)


def _kv_type(settings: EngineSettings) -> KvType:
    """On a CPU attention that never multiplies a masked cell, and is the fastest, also where nothing is promised."""
    return settings.kv_type or ("f16" if settings.gpu_layers else "exact")


def _names(ids: Sequence[str], aliases: Sequence[str]) -> list[str]:
    """What requests call the models: the aliases in their order, then the files' own names."""
    if len(aliases) > len(ids):
        raise SettingError(f"There are {len(aliases)} aliases and {len(ids)} models; give each one, in their order.")
    names = [*aliases, *ids[len(aliases) :]]
    for alias in aliases:
        check_utf8(alias)
    (name, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise SettingError(f"{count} models would be called {name}; give each a name with --alias, in their order.")
    return names

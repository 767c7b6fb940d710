"""Makes supervisors and the model manager from model specs and settings.

Decides for each model its file, context, number of sequences, threads, memory and promise. Reads only the headers of
the model files, and starts no worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from msgspec import structs

from afterword.cli.adapters import with_adapters
from afterword.cli.draft_model import LocatedDraft, check_vocabularies, find_draft
from afterword.config import CHUNK_GRID, ONE_SEQUENCE, SMALL_MODEL, EngineSettings, WeightTypes, advice
from afterword.engine import messages
from afterword.engine.kernels.compiled import memory_on_demand
from afterword.engine.messages import KvType
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.parent.worker_process import gpu_memory
from afterword.engine.protocol import Promise
from afterword.errors import SettingError
from afterword.models.adapter_file import check_adapter
from afterword.models.file_names import check_utf8
from afterword.models.gguf_facts import Facts, parts, read_facts
from afterword.models.memory_fit import ComputeOptions, ModelShape, choose_shapes, usual_context
from afterword.models.registry import Adapter, Model, locate, parse_spec
from afterword.system.resources import available_memory, cores

_KV_BYTES = {"exact": 2, "f16": 2, "f32": 4}
_BUSY_MODELS = 2  # with --keep-alive: models that are assumed to compute at the same time


@dataclass(frozen=True, slots=True)
class FittedModel:
    """A model, the message that loads it, and the memory that it needs then, in bytes."""

    model: Model
    facts: Facts
    load_message: messages.LoadModel
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class WantedModels:
    """What the command line says about models. Without `specs` it is the built-in model.

    `adapters`: values of `--lora`, see `cli.adapters`. `further_adapters`: requests may load further ones.
    """

    specs: Sequence[str] = ()
    aliases: Sequence[str] = ()
    adapters: Sequence[str] = ()
    further_adapters: bool = False


def single_model(spec: str | None, settings: EngineSettings, policy: QueuePolicy) -> tuple[Model, Supervisor]:
    """Return a model and its supervisor, which is not opened. Raises `SettingError`."""
    model, facts = _locate(spec)
    return model, Supervisor(load_message(model, facts, settings), policy)


def make_model_manager(
    wanted: WantedModels,
    settings: EngineSettings,
    keep_alive: float | None,
    policy: QueuePolicy,
) -> ModelManager:
    """Return the manager of a server's models; none is loaded.

    `keep_alive`: seconds until an unused model is unloaded, None for never. Raises `SettingError`.
    """
    located = [_locate(spec) for spec in wanted.specs or (None,)]
    names = names_in_requests([model.id for model, _ in located], wanted.aliases)
    facts = {model.path: facts for model, facts in located}
    settings = replace(settings, share_weights=bool(wanted.adapters) or wanted.further_adapters)
    if wanted.further_adapters and len(located) != 1:
        raise SettingError(f"--lora-dir adds adapters to one model, but {len(located)} models are served.")
    served = with_adapters([model for model, _ in located], names, wanted.adapters)
    fitted = fit_models(
        [(model, facts[model.path]) for model in served], settings, unload_unused=keep_alive is not None
    )
    return ModelManager(
        [_definition(each, settings, policy) for each in fitted],
        keep_alive=keep_alive,
        policy=policy,
        free=partial(_available_memory, settings),
        define_adapter=_FurtherAdapters(fitted[0], settings, policy).define if wanted.further_adapters else None,
    )


def _definition(fitted: FittedModel, settings: EngineSettings, policy: QueuePolicy) -> ModelDefinition:
    return ModelDefinition(
        id=fitted.model.id,
        parent=fitted.model.adapter.base if fitted.model.adapter else None,
        created=int((fitted.model.adapter or fitted.model).path.stat().st_mtime),
        make_engine=partial(Supervisor, partial(refreshed_load_message, fitted, settings), policy),
        context=fitted.load_message.context,
        sequences=fitted.load_message.sequences,
        capacity=fitted.load_message.capacity,
        trained_context=fitted.facts.context_length,
        promise=fitted.load_message.promise,
        memory_bytes=fitted.memory_bytes,
        advice=advice("" if settings.gpu_layers else fitted.facts.file_type, fitted.facts.architecture),
    )


@dataclass(frozen=True, slots=True)
class _FurtherAdapters:
    """Defines models with further adapters, which have the context of their base."""

    base: FittedModel
    settings: EngineSettings
    policy: QueuePolicy

    def define(self, name: str, path: Path, available: int) -> ModelDefinition:
        """See `ModelManager`. Raises `SettingError`."""
        check_adapter(path, self.base.facts.architecture)
        planned = self.base.load_message
        settings = replace(self.settings, context=planned.context, threads=planned.threads)
        model = replace(self.base.model, id=name, adapter=Adapter(path, 1.0, self.base.model.id))
        (fitted,) = fit_models([(model, self.base.facts)], settings, available=available)
        return _definition(fitted, settings, self.policy)


def load_message(model: Model, facts: Facts, settings: EngineSettings) -> messages.LoadModel:
    """Make the message that loads a model, with every setting decided. Raises `SettingError` if it does not fit."""
    return fit_models([(model, facts)], settings)[0].load_message


def fit_models(
    models: Sequence[tuple[Model, Facts]],
    settings: EngineSettings,
    unload_unused: bool = False,
    available: int | None = None,
) -> list[FittedModel]:
    """Decide how models that share a machine are loaded. Raises `SettingError` if they do not fit into memory.

    `unload_unused`: unused models are unloaded, so not all have to be loaded at the same time. If all of them fit
    together with their whole context, they share the memory; otherwise each is fitted to the memory that it would have
    alone. `available`: bytes of memory for all of them; None: what the machine has.
    """
    draft = find_draft(settings.draft_model)
    if draft:
        check_vocabularies(draft, {model.path for model, _ in models})
    wanted = [(_own_memory(model, facts), _compute_options(model, facts, settings, draft)) for model, facts in models]
    threads = _threads(min(len(models), _BUSY_MODELS if unload_unused else len(models)))
    fitted = []
    for (model, facts), shape in zip(models, _shapes(wanted, settings, unload_unused, available), strict=True):
        message = _load_message(model, facts, settings, shape, threads)
        if draft and shape.options.draft:
            message = structs.replace(message, draft=_draft_message(draft, settings, shape, threads))
        fitted.append(FittedModel(model, facts, message, shape.needed_bytes))
    return fitted


def _can_verify(facts: Facts, settings: EngineSettings) -> bool:
    """Whether drafts can be verified, so that a draft model is worth its memory; see `core.verification.can_verify`."""
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    return not facts.state_bytes and _promises(weights, _kv_type(settings), settings)[0] == "exact"


def _own_memory(model: Model, facts: Facts) -> Facts:
    """The facts with the bytes that the model takes itself: those of its base are in memory once."""
    return replace(facts, size_bytes=model.adapter.path.stat().st_size) if model.adapter else facts


def refreshed_load_message(fitted: FittedModel, settings: EngineSettings) -> messages.LoadModel:
    """Return the message that loads the model now. It is made anew if the file was replaced. Raises `SettingError`.

    Clients know the context, so a replaced file gets the same number and length of sequences, or is refused.
    """
    facts = read_facts(fitted.model.path)
    if facts == fitted.facts:
        return fitted.load_message
    planned = fitted.load_message
    kept = replace(settings, context=planned.context, parallel=planned.sequences, threads=planned.threads)
    changed = load_message(fitted.model, facts, kept)
    if planned.capacity is None or (changed.capacity is not None and changed.capacity < planned.capacity):
        return changed
    return structs.replace(changed, capacity=planned.capacity)


def _compute_options(
    model: Model, facts: Facts, settings: EngineSettings, draft: LocatedDraft | None
) -> ComputeOptions:
    kv_type = _kv_type(settings)
    plain = kv_type == "f32" or (kv_type == "f16" and not settings.gpu_layers)  # otherwise flash attention
    on_demand = kv_type == "exact" and not settings.gpu_layers and memory_on_demand()
    drafts = None
    if draft and _can_verify(facts, settings):
        drafts = replace(draft.facts, size_bytes=0) if model.adapter else draft.facts  # in memory once, as its base
    return ComputeOptions(_KV_BYTES[kv_type], settings.batch, plain, on_demand, drafts)


def _shapes(
    wanted: Sequence[tuple[Facts, ComputeOptions]],
    settings: EngineSettings,
    unload_unused: bool,
    available: int | None,
) -> list[ModelShape]:
    choose = partial(
        choose_shapes,
        available_bytes=_available_memory(settings) if available is None else available,
        context=settings.context,
        parallel=settings.parallel,
        spare=int(settings.reproducible),
    )
    try:
        shapes = choose(wanted)
    except SettingError:
        if not unload_unused:
            raise
    else:
        whole = all(shape.context >= usual_context(*each) for shape, each in zip(shapes, wanted, strict=True))
        if whole or settings.context or not unload_unused:
            return shapes
    return [choose([each])[0] for each in wanted]


def _available_memory(settings: EngineSettings) -> int:
    """Return the bytes that models may use: of the GPUs if they hold all layers, otherwise of the machine."""
    return (settings.gpu_layers == -1 and gpu_memory()) or available_memory()


def _threads(busy: int) -> int:
    """Return the threads of each of `busy` models. More threads than cores would mostly wait for each other."""
    return max(1, cores() // busy)


def _load_message(
    model: Model, facts: Facts, settings: EngineSettings, shape: ModelShape, threads: int
) -> messages.LoadModel:
    kv_type = _kv_type(settings)
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    promise, promise_without_kernels = _promises(weights, kv_type, settings)
    one_sequence = facts.architecture in ONE_SEQUENCE
    return messages.LoadModel(
        path=str(model.path),
        context=shape.context,
        sequences=1 if one_sequence else shape.parallel,
        threads=settings.threads or (1 if facts.size_bytes < SMALL_MODEL else threads),
        chunk=settings.batch,
        joins_prompts=facts.experts > 0,
        kv_type=kv_type,
        gpu_layers=settings.gpu_layers,
        verbose=settings.verbose,
        cache_dir=str(settings.cache_dir.absolute()) if settings.cache_dir else "",
        cache_bytes=settings.cache_bytes,
        # On a GPU the length of a forward pass selects the kernels, so with --reproducible all lengths are equal.
        grid=settings.batch if settings.reproducible else CHUNK_GRID,
        repack=promise_without_kernels == "none" or weights.repacked,
        use_kernels=weights.uses_kernels,
        fixed_shape=settings.reproducible,
        snapshot_bytes=0 if one_sequence else shape.snapshot_bytes,
        promise=promise,
        promise_without_kernels=promise_without_kernels,
        parts=tuple(map(str, parts(model.path, facts))),
        capacity=shape.capacity,
        infill_template=settings.infill_template,
        speculate=settings.speculate or "ngram",
        adapter=str(model.adapter.path) if model.adapter else "",
        adapter_scale=model.adapter.scale if model.adapter else 1.0,
        pack_weights=not settings.share_weights,
        token_bytes=shape.token_bytes if shape.options.on_demand else 0,
    )


def _draft_message(
    draft: LocatedDraft, settings: EngineSettings, shape: ModelShape, threads: int
) -> messages.LoadModel:
    """Return the message that loads the draft model, with as many sequences as the model for which it drafts."""
    context = min(shape.context, draft.facts.context_length or shape.context)
    own = replace(settings, cache_dir=None, infill_template="")
    return _load_message(draft.model, draft.facts, own, replace(shape, facts=draft.facts, context=context), threads)


def _promises(weights: WeightTypes, kv_type: KvType, settings: EngineSettings) -> tuple[Promise, Promise]:
    """Return the strongest promise with Afterword's kernels, and without them."""
    if settings.gpu_layers:
        promise = weights.promise_on_gpu(kv_type, settings.gpu_layers, settings.reproducible)
        return promise, promise
    without = weights.promise(kv_type, with_kernels=False)
    return weights.promise(kv_type, with_kernels=True) if weights.uses_kernels else without, without


def _locate(spec: str | None) -> tuple[Model, Facts]:
    model = locate(parse_spec(spec))
    return model, read_facts(model.path)


def _kv_type(settings: EngineSettings) -> KvType:
    """Return the type of keys and values.

    The default on a CPU is `exact`, also without a promise: its attention never multiplies a masked cell, and is the
    fastest.
    """
    return settings.kv_type or ("f16" if settings.gpu_layers else "exact")


def names_in_requests(ids: Sequence[str], aliases: Sequence[str]) -> list[str]:
    """Return the models' names in requests: the aliases in their order, then the ids of the remaining models."""
    if len(aliases) > len(ids):
        raise SettingError(
            f"There are {len(aliases)} aliases and {len(ids)} models. Give at most one --alias per model."
        )
    names = [*aliases, *ids[len(aliases) :]]
    for alias in aliases:
        check_utf8(alias)
    (name, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise SettingError(
            f"{count} models would be called {name}. Give each model a name with --alias, in their order."
        )
    return names

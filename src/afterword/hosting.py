"""From specs and settings to engines that can be opened: which files, how much memory each, how they compute.

Opens nothing but the files' headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from afterword.config import GRID, ONE_SEQUENCE, SMALL_MODEL, EngineSettings, Weights, advice
from afterword.engine import frames
from afterword.engine.frames import KvType
from afterword.engine.process import card_memory
from afterword.engine.protocol import Promise
from afterword.engine.roster import Offer, Roster
from afterword.engine.supervisor import Policy, Supervisor
from afterword.errors import SettingError
from afterword.machine import available_memory, cores
from afterword.models.gguf import Facts, parts, read_facts
from afterword.models.memory import Run, Shape, choose_shapes, usual_context
from afterword.models.names import check_utf8
from afterword.models.registry import Model, locate, parse_spec

_KV_BYTES = {"exact": 2, "f16": 2, "f32": 4}
_BUSY = 2  # models that come and go: so many are reckoned to be busy at once


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model, how it is to be loaded, and the bytes of memory that this takes."""

    model: Model
    facts: Facts
    opened: frames.Open
    needs: int


def one(spec: str | None, settings: EngineSettings, policy: Policy) -> tuple[Model, Supervisor]:
    """A model and its engine, which is not open yet. Raises `SettingError`."""
    model, facts = _found(spec)
    return model, Supervisor(open_frame(model, facts, settings), policy)


def roster(
    specs: Sequence[str], aliases: Sequence[str], settings: EngineSettings, keep_alive: float | None, policy: Policy
) -> Roster:
    """The models of a server, none of them loaded; without a spec the built-in one. Raises `SettingError`."""
    models = [_found(spec) for spec in specs or (None,)]
    names = _names([model.id for model, _ in models], aliases)
    offers = [
        Offer(
            id=name,
            created=int(fitted.model.path.stat().st_mtime),
            make=partial(Supervisor, partial(renewed, fitted, settings), policy),
            context=fitted.opened.context,
            sequences=fitted.opened.sequences,
            promise=fitted.opened.promise,
            needs=fitted.needs,
            tip=advice("" if settings.gpu_layers else fitted.facts.file_type, fitted.facts.architecture),
        )
        for name, fitted in zip(names, fit(models, settings, take_turns=keep_alive is not None), strict=True)
    ]
    return Roster(offers, keep_alive=keep_alive, policy=policy, free=partial(_room, settings))


def open_frame(model: Model, facts: Facts, settings: EngineSettings) -> frames.Open:
    """Settings with nothing left to choose. Raises `SettingError` if they cannot be met."""
    return fit([(model, facts)], settings)[0].opened


def fit(models: Sequence[tuple[Model, Facts]], settings: EngineSettings, take_turns: bool = False) -> list[Fitted]:
    """How models that share a machine are to be loaded. Raises `SettingError` if they do not fit.

    `take_turns`: they need not be there together. If they can be, each with its whole context, they are fitted for
    that; else each gets the memory that it would have alone.
    """
    wanted = [(facts, _run(facts, settings)) for _, facts in models]
    threads = _threads(min(len(models), _BUSY if take_turns else len(models)))
    return [
        Fitted(model, facts, _frame(model, facts, settings, shape, threads), shape.needed_bytes)
        for (model, facts), shape in zip(models, _shapes(wanted, settings, take_turns), strict=True)
    ]


def renewed(fitted: Fitted, settings: EngineSettings) -> frames.Open:
    """How the model is to be loaded now: as planned, unless its file is another. Raises `SettingError`.

    Clients were told of the context, so another file gets the same number and length of sequences, or is refused.
    """
    facts = read_facts(fitted.model.path)
    if facts == fitted.facts:
        return fitted.opened
    planned = fitted.opened
    kept = replace(settings, context=planned.context, parallel=planned.sequences, threads=planned.threads)
    return open_frame(fitted.model, facts, kept)


def _run(facts: Facts, settings: EngineSettings) -> Run:
    kv_type = _kv_type(settings)
    plain = kv_type == "f32" or (kv_type == "f16" and not settings.gpu_layers)  # else attention is flash attention
    return Run(_KV_BYTES[kv_type], settings.batch, plain)


def _shapes(wanted: Sequence[tuple[Facts, Run]], settings: EngineSettings, take_turns: bool) -> list[Shape]:
    choose = partial(
        choose_shapes,
        available_bytes=_room(settings),
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


def _room(settings: EngineSettings) -> int:
    """Bytes that models may take: of the GPUs where they hold all layers, else of the machine."""
    return (settings.gpu_layers == -1 and card_memory()) or available_memory()


def _threads(busy: int) -> int:
    """For each of so many models: threads beyond the cores would wait for each other most of the time."""
    return max(1, cores() // busy)


def _frame(model: Model, facts: Facts, settings: EngineSettings, shape: Shape, threads: int) -> frames.Open:
    kv_type = _kv_type(settings)
    weights = Weights(facts.architecture, facts.matrix_types, facts.experts)
    promised, without = _promises(weights, kv_type, settings)
    return frames.Open(
        path=str(model.path),
        context=shape.context,
        sequences=1 if facts.architecture in ONE_SEQUENCE else shape.parallel,
        threads=settings.threads or (1 if facts.size_bytes < SMALL_MODEL else threads),
        chunk=settings.batch,
        kv_type=kv_type,
        gpu_layers=settings.gpu_layers,
        verbose=settings.verbose,
        # Where lengths of passes choose kernels, they are all one.
        grid=settings.batch if settings.reproducible else GRID,
        repack=without == "none" or weights.repacked,
        own_products=weights.own_products,
        full=settings.reproducible,
        promise=promised,
        promise_without=without,
        parts=tuple(map(str, parts(model.path, facts))),
    )


def _promises(weights: Weights, kv_type: KvType, settings: EngineSettings) -> tuple[Promise, Promise]:
    """The most that can be promised with products of our own, and without them."""
    if settings.gpu_layers:
        promised = weights.promise_on_gpu(kv_type, settings.gpu_layers, settings.reproducible)
        return promised, promised
    without = weights.promise(kv_type, own_products=False)
    return weights.promise(kv_type, own_products=True) if weights.own_products else without, without


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

"""Tests of loading and unloading models, in virtual time and without processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ManagedModel, ModelDefinition, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.protocol import Load
from afterword.errors import LoadFailed, Overloaded, QueueTimeout, SettingError
from scripted_engine import MODEL_INFO as SCRIPTED
from sim import virtual

LOADING, ENDING = 10.0, 2.0  # seconds
MODEL_INFO = msgspec.structs.replace(SCRIPTED, promise="reproducible")


@dataclass
class FakeSupervisor:
    """A supervisor that only waits. Loading raises the machine's fault for the model, if there is one."""

    machine: FakeMachine
    name: str
    needs: int
    state: str = "starting"
    load: Load = field(default_factory=Load)
    restarts: int = 0
    model_info = MODEL_INFO

    async def open(self) -> None:
        assert not self.machine.alive(self.name), "two engines of one model"
        self.machine.engines.append(self)
        assert sum(engine.needs for engine in self.machine.engines) <= self.machine.memory
        await asyncio.sleep(LOADING)
        if fault := self.machine.faults.pop(self.name, None):
            raise fault
        self.state = "ready"

    async def close(self) -> None:
        self.state = "closed"
        await asyncio.sleep(ENDING)
        self.machine.engines.remove(self)

    def check_capacity(self) -> None:
        if self.state == "closed":
            raise Overloaded("The engine is closed.")


@dataclass
class FakeMachine:
    """Holds the engines. `faults`: the exception of the next load of a model. `taken`: memory of other programs."""

    memory: int = 100
    taken: int = 0
    engines: list[FakeSupervisor] = field(default_factory=list)
    faults: dict[str, Exception] = field(default_factory=dict)

    def alive(self, name: str) -> list[FakeSupervisor]:
        return [engine for engine in self.engines if engine.name == name]

    def manager(self, *names: str, keep_alive: float | None = 60, needs: int = 10, **policy: Any) -> ModelManager:
        definitions = [ModelDefinition(name, 0, self.maker(name, needs), memory_bytes=needs) for name in names]
        free = self.memory
        return ModelManager(
            definitions, keep_alive=keep_alive, policy=QueuePolicy(**policy), free=lambda: free - self.taken
        )

    def maker(self, name: str, needs: int) -> Callable[[], Supervisor]:
        return lambda: FakeSupervisor(self, name, needs)  # type: ignore[return-value]


def run(test: Callable[[FakeMachine], Coroutine[Any, Any, None]], machine: FakeMachine | None = None) -> None:
    virtual.run(test(machine or FakeMachine()))


def states(models: ModelManager) -> list[str]:
    return [managed_model.state for managed_model in models]


async def use(models: ModelManager, name: str, seconds: float) -> None:
    """Acquire a model, use it, release it. Its engine must stay the same and ready."""
    managed_model = named(models, name)
    engine = await models.acquire(managed_model)
    try:
        for _ in range(10):
            assert engine is managed_model.engine
            assert engine.state == "ready"
            await asyncio.sleep(seconds / 10)
        assert engine.state == "ready"
    finally:
        models.release(managed_model)


def named(models: ModelManager, name: str) -> ManagedModel:
    managed_model = models.get(name)
    assert managed_model is not None
    return managed_model


def test_without_keep_alive_all_models_are_loaded_at_the_start():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b", keep_alive=None)
        assert states(models) == ["starting", "starting"]
        opening = asyncio.create_task(models.open())
        await asyncio.sleep(LOADING + 1)
        assert states(models) == ["ready", "starting"]
        await use(models, "a", 1)  # the first model can be used already
        with pytest.raises(Overloaded) as caught:
            await models.acquire(named(models, "b"))
        assert caught.value.code == "loading"
        await opening
        await asyncio.sleep(10**6)
        assert states(models) == ["ready", "ready"]
        await models.close()
        assert machine.engines == []

    run(test)


def test_a_failed_load_at_the_start_is_raised():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b", keep_alive=None)
        machine.faults["b"] = SettingError("b is no model.")
        with pytest.raises(SettingError, match="b is no model"):
            await models.open()
        await models.close()
        assert machine.engines == []

    run(test)


def test_the_first_request_loads_a_model_and_it_is_unloaded_when_unused():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b")
        await models.open()
        assert states(models) == ["unloaded", "unloaded"]
        work = [asyncio.create_task(use(models, "a", 100)) for _ in range(5)]
        await asyncio.sleep(LOADING / 2)
        assert (states(models), named(models, "a").load.waiting) == (["starting", "unloaded"], 5)
        await asyncio.gather(*work)
        assert [engine.name for engine in machine.engines] == ["a"]
        assert named(models, "a").model_info == MODEL_INFO
        assert named(models, "a").promise == MODEL_INFO.promise, "the promise of the engine, not of the definition"
        await asyncio.sleep(59)
        await use(models, "a", 1)  # restarts the timer
        await asyncio.sleep(59)
        assert states(models) == ["ready", "unloaded"]
        await asyncio.sleep(2 + ENDING)
        assert states(models) == ["unloaded", "unloaded"]
        assert machine.engines == []
        assert named(models, "a").model_info == MODEL_INFO  # kept after unloading

    run(test)


def test_a_request_during_unloading_gets_a_new_engine():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=0)
        await use(models, "a", 1)
        await asyncio.sleep(ENDING / 2)
        (dying,) = machine.engines
        assert dying.state == "closed"
        await use(models, "a", 1)
        assert machine.engines != [dying]

    run(test)


def test_a_request_just_before_unloading_keeps_the_engine():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b")
        await use(models, "a", 1)
        loading = asyncio.create_task(use(models, "b", 200))
        await asyncio.sleep(59.5)
        (engine,) = machine.alive("a")
        await use(models, "a", 1)
        assert machine.alive("a") == [engine]
        await loading

    run(test)


def test_a_failed_load_fails_all_waiting_requests_and_is_retried_by_the_next(caplog: pytest.LogCaptureFixture):
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a")
        machine.faults["a"] = SettingError("/secret/path is damaged.")
        failed = await asyncio.gather(*(use(models, "a", 1) for _ in range(3)), return_exceptions=True)
        assert [type(problem) for problem in failed] == [LoadFailed] * 3
        assert "secret" not in str(failed[0])
        assert "/secret/path is damaged" in caplog.text
        await asyncio.sleep(1000)
        assert (machine.engines, states(models)) == ([], ["unloaded"])  # not loaded again without a request
        await use(models, "a", 1)

    run(test)


def test_waiting_requests_are_bounded_in_number_and_time():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", queue=2, queue_seconds=LOADING / 2)
        waiting = [asyncio.create_task(use(models, "a", 1)) for _ in range(2)]
        models.check_capacity(named(models, "a"))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too many"):
            models.check_capacity(named(models, "a"))
        with pytest.raises(Overloaded, match="too many"):
            await models.acquire(named(models, "a"))
        late = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(problem) for problem in late] == [QueueTimeout] * 2
        await use(models, "a", 1)  # the load was completed after the timeout
        assert named(models, "a").users == 0

    run(test)


def test_a_cancelled_request_does_not_cancel_the_load():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a")
        leaving, staying = (asyncio.create_task(use(models, "a", 1)) for _ in range(2))
        await asyncio.sleep(1)
        leaving.cancel()
        await staying
        (engine,) = machine.engines
        await asyncio.sleep(60 + ENDING)
        alone = asyncio.create_task(use(models, "a", 1))
        await asyncio.sleep(1)
        alone.cancel()
        await asyncio.sleep(LOADING)
        assert states(models) == ["ready"]
        assert machine.engines != [engine]
        await asyncio.sleep(60 + ENDING)
        assert machine.engines == []

    run(test)


def test_the_least_recently_used_model_is_unloaded():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b", "c", needs=40)
        await use(models, "a", 1)
        await use(models, "b", 1)
        await use(models, "a", 1)
        await use(models, "c", 1)
        assert states(models) == ["ready", "unloaded", "ready"]

    run(test)


def test_a_model_in_use_is_not_unloaded():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b", needs=60)
        using = asyncio.create_task(use(models, "a", 100))
        await asyncio.sleep(LOADING + 1)
        with pytest.raises(Overloaded, match="other models") as caught:
            await use(models, "b", 1)
        assert caught.value.retry_after >= 1
        await using
        await use(models, "b", 1)
        assert states(models) == ["unloaded", "ready"]

    run(test)


def test_memory_of_other_programs_counts():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", needs=60)
        machine.taken = 50
        with pytest.raises(Overloaded):
            await use(models, "a", 1)
        machine.taken = 40
        await use(models, "a", 1)

    run(test)


def test_an_engine_with_running_jobs_is_not_unloaded():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a")
        await use(models, "a", 1)
        (engine,) = machine.engines
        engine.load = Load(4, running=1)
        await asyncio.sleep(10**4)
        assert states(models) == ["ready"]
        engine.load = Load(4)
        await asyncio.sleep(60 + ENDING)
        assert machine.engines == []

    run(test)


@pytest.mark.parametrize("moment", [1.0, LOADING + 1, LOADING + 5 + ENDING / 2], ids=["loading", "in use", "ending"])
def test_closing_ends_all_engines_and_waiting_requests(moment: float):
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", "b", keep_alive=0)
        work = [asyncio.create_task(use(models, "a", 5)), asyncio.create_task(use(models, "b", 5))]
        await asyncio.sleep(moment)
        await models.close()
        assert machine.engines == []
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, Overloaded | AssertionError) for outcome in outcomes)
        with pytest.raises(Overloaded, match="shutting down"):
            await models.acquire(named(models, "a"))

    run(test)


@pytest.mark.parametrize("seed", range(100))
def test_random_requests_failures_and_cancellations(seed: int):
    chance = random.Random(seed)

    async def visit(machine: FakeMachine, models: ModelManager) -> None:
        await asyncio.sleep(chance.uniform(0, 300))
        name = chance.choice("abcd")
        if not chance.randrange(10):
            machine.faults[name] = SettingError("by chance")
        task = asyncio.create_task(use(models, name, chance.uniform(0, 30)))
        if not chance.randrange(5):
            await asyncio.sleep(chance.uniform(0, 20))
            task.cancel()
        problems = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(problems[0], LoadFailed | Overloaded | asyncio.CancelledError | None), problems

    async def test(machine: FakeMachine) -> None:
        models = machine.manager(*"abcd", needs=40, keep_alive=chance.choice([0, 1, 20, 100]))
        await asyncio.gather(*(visit(machine, models) for _ in range(40)))
        assert (
            [managed_model.users for managed_model in models]
            == [managed_model.waiting for managed_model in models]
            == [0] * 4
        )
        await asyncio.sleep(1000)
        assert (machine.engines, states(models)) == ([], ["unloaded"] * 4)

    run(test)


# ---- models that come and go


def definer(machine: FakeMachine, name: str, needs: int = 10) -> Callable[[int], Coroutine[Any, Any, ModelDefinition]]:
    async def define(available: int) -> ModelDefinition:
        return ModelDefinition(name, 0, machine.maker(name, needs), memory_bytes=needs, parent="a")

    return define


@pytest.mark.parametrize("keep_alive", [None, 60])
def test_a_model_that_is_added_is_served_when_it_is_loaded(keep_alive: float | None):
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=keep_alive)
        await models.open()
        adding = asyncio.create_task(models.add("b", definer(machine, "b")))
        await asyncio.sleep(LOADING / 2)
        assert models.has("b")
        assert models.get("b") is None
        assert models.adapters == 1
        await adding
        assert models.adapters == 1
        assert named(models, "b").state == "ready"
        await use(models, "b", 1)

    run(test)


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=None)
        await models.open()
        machine.faults["b"] = SettingError("no adapter")
        with pytest.raises(SettingError, match="no adapter"):
            await models.add("b", definer(machine, "b"))
        assert not models.has("b")
        assert not machine.alive("b")
        await models.add("b", definer(machine, "b"))
        assert named(models, "b").state == "ready"

    run(test)


def test_a_removed_model_is_closed_after_the_last_request_that_uses_it():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=None)
        await models.open()
        await models.add("b", definer(machine, "b"))
        using = [asyncio.create_task(use(models, "b", seconds)) for seconds in (20, 40)]
        await asyncio.sleep(1)
        models.remove(named(models, "b"))
        assert models.get("b") is None
        assert models.adapters == 1  # its memory is in use
        await using[0]
        assert [engine.state for engine in machine.alive("b")] == ["ready"]
        await using[1]
        await asyncio.sleep(ENDING + 1)
        assert not machine.alive("b")
        assert models.adapters == 0

    run(test)


def test_the_memory_of_a_removed_model_counts_until_it_is_closed():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=60, needs=40)
        await models.add("b", definer(machine, "b", 60))
        using = asyncio.create_task(use(models, "b", 50))
        await asyncio.sleep(1)
        models.remove(named(models, "b"))
        with pytest.raises(Overloaded):
            await models.add("c", definer(machine, "c", 60))
        await using
        await models.add("c", definer(machine, "c", 60))
        assert len(machine.engines) == 1

    run(test)


def test_closing_the_manager_ends_what_is_being_added_and_what_was_removed():
    async def test(machine: FakeMachine) -> None:
        models = machine.manager("a", keep_alive=None)
        await models.open()
        await models.add("b", definer(machine, "b"))
        engine = await models.acquire(named(models, "b"))
        models.remove(named(models, "b"))
        adding = asyncio.create_task(models.add("c", definer(machine, "c")))
        await asyncio.sleep(LOADING / 2)
        await models.close()
        assert engine.state == "closed"
        assert not machine.engines
        with pytest.raises(Overloaded, match="shutting down"):
            await adding
        with pytest.raises(Overloaded, match="shutting down"):
            await models.add("d", definer(machine, "d"))

    run(test)

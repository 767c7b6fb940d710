"""Tests of jobs on engine replicas, over TCP, with real worker processes that have no model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from fake_worker import DEADLY, SLOW
from history_runner import alone

from afterword.engine.messages import LoadModel
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.parent.worker_process import WorkerProgram
from afterword.engine.protocol import Grammar, Job, Load, ModelInfo, Sampling, Step
from afterword.engine.replicas.connection import connect
from afterword.engine.replicas.job_server import JobServer, ServedEngine
from afterword.engine.replicas.routed_engine import RoutedEngine, RoutedModel
from afterword.engine.replicas.routing import BLOCK, LeastLoaded, PrefixFirst, Rule
from afterword.engine.replicas.wire import ReplicaAddress, error_of, failure_of
from afterword.errors import (
    AfterwordError,
    EngineFailure,
    JobRefused,
    ModelReplaced,
    Overloaded,
    QueueTimeout,
    RequestError,
    WorkerDied,
)

FAKE = WorkerProgram((sys.executable, str(Path(__file__).parents[1] / "fake_worker.py")))
POLICY = QueuePolicy(queue=100)


def job(*prompt: int, samples: int = 1, max_tokens: int = 5) -> Job:
    return Job(prompt or (1, 2, 3), samples, max_tokens, Sampling(), end_tokens=(), key=b"k" * 16)


@dataclass
class Replicas:
    """The replicas of a test by name."""

    stack: AsyncExitStack
    servers: dict[str, JobServer] = field(default_factory=dict)
    engines: dict[str, ServedEngine] = field(default_factory=dict)
    addresses: dict[str, ReplicaAddress] = field(default_factory=dict)

    searches: list[None] = field(default_factory=list)

    async def find(self) -> Sequence[ReplicaAddress]:
        self.searches.append(None)
        return list(self.addresses.values())

    async def add(self, name: str, engine: ServedEngine, settings: str = "") -> None:
        self.engines[name] = engine
        server = self.servers[name] = JobServer({"model": engine})
        port = await server.open("127.0.0.1")
        self.stack.push_async_callback(server.close)
        self.addresses[name] = ReplicaAddress(name, "127.0.0.1", port, server.secret, settings)

    async def add_worker(self, name: str, path: str = "any", policy: QueuePolicy = POLICY, settings: str = "") -> None:
        supervisor = Supervisor(LoadModel(path, 512, 2, 1, 8, "f16", 0, False), policy, program=FAKE)
        self.stack.push_async_callback(supervisor.close)
        await supervisor.open()
        await self.add(name, supervisor, settings)

    async def kill(self, name: str) -> None:
        """To the server it is the same as the end of the replica's process: the connection is closed."""
        del self.addresses[name]
        await self.servers[name].close()

    def busy(self) -> str:
        """The replica that has samples."""
        (name,) = (name for name, engine in self.engines.items() if engine.load.running + engine.load.waiting)
        return name


@asynccontextmanager
async def replicas() -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        yield Replicas(stack)


@asynccontextmanager
async def routed(
    found: Replicas,
    rule: Rule[str] | None = None,
    policy: QueuePolicy = POLICY,
    clock: Callable[[], float] | None = None,
) -> AsyncIterator[RoutedEngine]:
    model = RoutedModel("model", LeastLoaded() if rule is None else rule, policy)
    engine = RoutedEngine(model, found.find, **({"clock": clock} if clock else {}))
    try:
        await engine.open()
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def two(path: str = "any", policy: QueuePolicy = POLICY) -> AsyncIterator[tuple[Replicas, RoutedEngine]]:
    async with replicas() as found:
        for name in ("a", "b"):
            await found.add_worker(name, path, policy)
        async with routed(found) as engine:
            await until(lambda: engine.load.sequences == 4)
            yield found, engine


async def tokens(engine: RoutedEngine, wanted: Job) -> list[int]:
    return [token.id async for step in engine.start(wanted) for _, token in step.sampled]


async def drained(steps: AsyncIterator[Step]) -> None:
    async for _ in steps:
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_jobs_and_texts_run_on_several_replicas():
    async def test() -> None:
        async with two() as (found, engine):
            jobs = [job(first, 2, 3, max_tokens=60) for first in range(1, 9)]
            running = [asyncio.create_task(tokens(engine, each)) for each in jobs]
            await until(lambda: all(each.load.running for each in found.engines.values()))
            assert await asyncio.gather(*running) == [alone(each, 0) for each in jobs]
            assert tuple(await engine.tokenize("ABC", True)) == (0, 1, 2)
            await until(lambda: engine.load == Load(4, 0, 0))
            assert engine.state == "ready"

    run(test)


def test_a_job_goes_on_at_another_replica_with_each_token_once():
    async def test() -> None:
        async with two() as (found, engine):
            wanted = job(4, 5, samples=2, max_tokens=400)
            sampled: dict[int, list[int]] = {0: [], 1: []}
            steps = 0
            async for step in engine.start(wanted):
                for sample, token in step.sampled:
                    sampled[sample].append(token.id)
                steps += 1
                if steps == 5:
                    await found.kill(found.busy())
            assert sampled == {sample: alone(wanted, sample) for sample in (0, 1)}
            assert engine.restarts == 1

    run(test)


def test_without_a_promise_a_job_with_tokens_fails_and_one_without_is_answered_elsewhere():
    async def test() -> None:
        async with two("unsure") as (found, engine):
            begun, rest = [], job(1, max_tokens=480)
            for _ in range(4):  # two at each replica
                begun.append(aiter(engine.start(rest)))
                while not (await anext(begun[-1])).sampled:
                    pass
            waiting = [asyncio.create_task(tokens(engine, job(each, 7))) for each in range(6)]
            await asyncio.sleep(0)
            await found.kill("a")
            ends = await asyncio.gather(*(drained(each) for each in begun), return_exceptions=True)
            assert [type(each) for each in ends if each] == [WorkerDied] * 2
            assert ends.count(None) == 2
            assert await asyncio.gather(*waiting) == [alone(job(each, 7), 0) for each in range(6)]

    run(test)


def test_a_job_that_cannot_be_accepted_leaves_nothing_behind():
    async def test() -> None:
        async with replicas() as found:
            engine = RoutedEngine(RoutedModel("model", LeastLoaded(), QueuePolicy(queue=1)), found.find)
            with pytest.raises(OverflowError):
                engine.start(job(2**40))
            assert engine.load == Load(0, 0, 0)
            waiting = engine.start(job())
            waiting.close()
            await engine.close()

    run(test)


def test_a_client_that_leaves_and_a_server_that_ends_free_the_sequences():
    async def test() -> None:
        async with replicas() as found:
            await found.add_worker("a")
            load = found.engines["a"]
            async with routed(found) as engine:
                left = engine.start(job(samples=2, max_tokens=10**5))
                await until(lambda: load.load.running == 2)
                left.close()
                await until(lambda: load.load == Load(2, 0, 0))
                engine.start(job(samples=2, max_tokens=10**5))
                await until(lambda: load.load.running == 2)
            await until(lambda: load.load == Load(2, 0, 0))

    run(test)


def test_jobs_and_texts_wait_while_there_is_no_replica():
    async def test() -> None:
        async with two() as (found, engine):
            for name in ("a", "b"):
                await found.kill(name)
            await until(lambda: engine.state == "restarting")
            waiting = asyncio.create_task(tokens(engine, job(6)))
            text = asyncio.create_task(engine.tokenize("AB", True))
            await until(lambda: engine.load == Load(0, 0, 1))
            await found.add_worker("c")
            assert await waiting == alone(job(6), 0)
            assert tuple(await text) == (0, 1)

    run(test)


def test_what_waits_for_too_long_fails():
    async def test() -> None:
        now = 0.0
        async with replicas() as found:
            await found.add_worker("a")
            async with routed(found, policy=QueuePolicy(queue_seconds=5), clock=lambda: now) as engine:
                await found.kill("a")
                await until(lambda: engine.state == "restarting")
                waiting = asyncio.create_task(tokens(engine, job()))
                text = asyncio.create_task(engine.tokenize("AB", True))
                await asyncio.sleep(0)
                now = 6.0
                for each in (waiting, text):
                    with pytest.raises(QueueTimeout):
                        await each
                assert engine.load.waiting == 0

    run(test)


def test_a_replica_that_leaves_ends_its_jobs_and_gets_others_only_if_it_is_the_last():
    async def test() -> None:
        async with two() as (found, engine):
            running = asyncio.create_task(tokens(engine, job(8, max_tokens=300)))
            await until(lambda: any(each.load.running for each in found.engines.values()))
            first = found.busy()
            leaving = asyncio.create_task(found.servers[first].leave(0.2, 60))
            await until(lambda: engine.load.sequences == 2)
            others = [tokens(engine, job(9, each)) for each in range(4)]
            assert await asyncio.gather(*others) == [alone(job(9, each), 0) for each in range(4)]
            (second,) = {"a", "b"} - {first}
            await found.kill(second)
            await until(lambda: len(found.addresses) == 1)
            assert await tokens(engine, job(5)) == alone(job(5), 0), "there is no other replica"
            assert await running == alone(job(8, max_tokens=300), 0)
            await leaving

    run(test)


def test_a_job_that_one_replica_refuses_goes_to_another_and_fails_if_all_do():
    async def test() -> None:
        async with two(policy=QueuePolicy(queue=0)) as (_, engine):
            taken = [engine.start(job(samples=2, max_tokens=10**5)) for _ in range(4)]
            with pytest.raises(Overloaded):
                await tokens(engine, job())
            for each in taken:
                each.close()

    run(test)


def test_a_queue_that_is_full_refuses():
    async def test() -> None:
        async with replicas() as found:
            await found.add_worker("a")
            async with routed(found, policy=QueuePolicy(queue=1)) as engine:
                for _ in range(3):
                    engine.start(job(max_tokens=10**5))
                for refused in (engine.check_capacity, lambda: engine.start(job())):
                    with pytest.raises(Overloaded):
                        refused()

    run(test)


def test_errors_of_a_replica_reach_the_client_as_they_are():
    async def test() -> None:
        async with two() as (_, engine):
            wrong = msgspec.structs.replace(job(1), grammar=Grammar("regex", "(", "structured_outputs.regex"))
            with pytest.raises(RequestError, match="unclosed group") as problem:
                await tokens(engine, wrong)
            assert (problem.value.status, problem.value.param) == (400, "structured_outputs.regex")
            with pytest.raises(EngineFailure):
                await tokens(engine, job(DEADLY))
            assert engine.restarts == 0, "its worker has ended, and not the replica"
            assert await tokens(engine, job(7)) == alone(job(7), 0)

    run(test)


@pytest.mark.parametrize(
    "error",
    [
        RequestError("Wrong.", param="prompt", code="c", status=413),
        Overloaded("Full.", retry_after=7, code="loading"),
        *(EngineFailure(), JobRefused(), ModelReplaced(), QueueTimeout(), WorkerDied()),
    ],
)
def test_an_error_is_the_same_after_the_way_over_the_wire(error: AfterwordError):
    found = error_of(failure_of(error))
    assert type(found) is type(error)
    assert vars(found) == vars(error)


def test_a_text_that_was_at_two_replicas_when_they_ended_is_not_tried_again():
    async def test() -> None:
        async with two() as (found, engine):
            await found.add_worker("c")
            await until(lambda: engine.load.sequences == 6)
            text = asyncio.create_task(engine.tokenize(SLOW, True))
            for _ in range(2):
                await asyncio.sleep(0)
                holds = next(name for name in found.addresses if engine._texts._texts[0].connection.name == name)
                before = engine.restarts
                await found.kill(holds)
                await until(lambda before=before: engine.restarts > before)
            with pytest.raises(EngineFailure):
                await text
            assert await tokens(engine, job(7)) == alone(job(7), 0)

    run(test)


def test_the_model_stays_while_a_replica_has_it_and_then_jobs_fail(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).write_text(f"fp_{name}")

    async def test() -> None:
        async with replicas() as found:
            await found.add_worker("new", str(tmp_path / "other"), settings="new")
            await found.add_worker("a", str(tmp_path / "one"))
            async with routed(found) as engine:
                assert engine.model_info.fingerprint == "fp_one", "the replica has the server's settings"
                running = engine.start(job(max_tokens=10**5))
                await until(lambda: found.engines["a"].load.running == 1)
                assert found.engines["new"].load.running == 0
                await found.kill("a")
                with pytest.raises(ModelReplaced):
                    async for _ in running:
                        pass
                assert engine.model_info.fingerprint == "fp_other"
                assert await tokens(engine, job(7)) == alone(job(7), 0)

    run(test)


@dataclass
class Recorder:
    """An engine whose jobs never end. `calls`: what was done with them."""

    model_info: ModelInfo
    load: Load = field(default_factory=Load)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def start(self, wanted: Job) -> Recorder:
        self.prompts.append(wanted.prompt)
        return self

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        self.calls.append(f"tokenize for {client}")
        return [1]

    async def __aiter__(self) -> AsyncIterator[Step]:
        await asyncio.Event().wait()
        yield Step()

    def drop(self, sample: int) -> None:
        self.calls.append(f"drop {sample}")

    def close(self) -> None:
        self.calls.append("close")

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


INFO = ModelInfo(0, 512, 2, (), (), None, None, False, False, 1, None, "fp")


def test_what_is_done_with_a_job_is_done_at_its_replica():
    async def test() -> None:
        async with replicas() as found:
            recorder = Recorder(INFO)
            await found.add("a", recorder)
            async with routed(found) as engine:
                current = engine.start(job(samples=3))
                current.drop(1)
                current.pause()
                current.resume()
                assert tuple(await engine.tokenize("x", False, "client")) == (1,)
                current.close()
                await until(lambda: "close" in recorder.calls)
                assert recorder.calls == ["drop 1", "pause", "resume", "tokenize for client", "close"]

    run(test)


def test_prompts_with_one_beginning_go_to_one_replica():
    async def test() -> None:
        async with replicas() as found:
            recorders = {name: Recorder(INFO) for name in ("a", "b")}
            for name, recorder in recorders.items():
                await found.add(name, recorder)
            async with routed(found, PrefixFirst[str](bound=10)) as engine:
                await until(lambda: engine.load.sequences == 4)
                for first in (1, 2, 1, 1, 2, 1):
                    engine.start(job(*[first] * BLOCK, 5))
                await until(lambda: sum(len(each.prompts) for each in recorders.values()) == 6)
            assert sorted({prompt[0] for prompt in each.prompts} for each in recorders.values()) == [{1}, {2}]
            assert sorted(len(each.prompts) for each in recorders.values()) == [2, 4]

    run(test)


@pytest.mark.parametrize(("secret", "model"), [("wrong", "model"), (None, "another")])
def test_a_connection_needs_the_secret_and_a_model_of_the_replica(secret, model):
    async def test() -> None:
        async with replicas() as found:
            await found.add("a", Recorder(INFO))
            address = found.addresses["a"]
            with pytest.raises(ConnectionError):
                await connect(replace(address, secret=secret or address.secret), model)

    run(test)


def test_a_frame_that_is_not_valid_ends_the_connection_and_its_jobs():
    async def test() -> None:
        async with replicas() as found:
            recorder = Recorder(INFO)
            await found.add("a", recorder)
            async with routed(found) as engine:
                engine.start(job())
                await until(lambda: bool(recorder.prompts))
                engine._connections["a"]._writer.write(b"\0\0\0\1\xc1")
                await until(lambda: "close" in recorder.calls)

    run(test)


def test_a_replica_that_cannot_be_reached_is_reported_once_and_tried_again(caplog):
    async def test() -> None:
        async with replicas() as found:
            await found.add("a", Recorder(INFO))
            wrong = found.addresses["b"] = replace(found.addresses["a"], name="b", secret="wrong")
            async with routed(found) as engine:
                await until(lambda: "b" in engine._unreachable)
                tries = len(found.searches)
                await until(lambda: len(found.searches) > tries + 2)
                found.addresses["b"] = replace(wrong, secret=found.addresses["a"].secret)
                await until(lambda: engine.load.sequences == 4)
        assert sum("cannot be reached" in record.message for record in caplog.records) == 1

    run(test)


def test_a_replica_with_another_fingerprint_gets_no_jobs_and_is_reported_once(caplog):
    async def test() -> None:
        async with replicas() as found:
            other = Recorder(msgspec.structs.replace(INFO, fingerprint="fp_other"))
            await found.add("a", Recorder(INFO))
            async with routed(found) as engine:
                await found.add("b", other)
                await until(lambda: "b" in engine._connections)
                first = engine._connections["b"]
                first.close()
                await until(lambda: engine._connections.get("b", first) is not first)
                engine.start(job())
                await until(lambda: bool(found.engines["a"].prompts))
                assert other.prompts == []

    run(test)
    (line,) = [record.getMessage() for record in caplog.records if "gets no jobs" in record.message]
    assert "replica b" in line
    assert "fp_other" in line

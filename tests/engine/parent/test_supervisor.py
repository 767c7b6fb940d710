"""Tests of the supervisor with a real worker process and without a model."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import msgspec
import psutil
import pytest
from fake_worker import DEADLY, DEADLY_TEXT, FAULTY_TEXT, SLOW, STUCK
from history_runner import alone

from afterword.engine.messages import Heartbeat, LoadModel, PassDone
from afterword.engine.parent.job_queue import JobQueue, QueuePolicy
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.parent.worker_process import WorkerProgram, without_secrets
from afterword.engine.protocol import Grammar, Job, JobHandle, Load, Sampling
from afterword.errors import (
    EngineFailure,
    ModelReplaced,
    Overloaded,
    QueueTimeout,
    RequestError,
    SettingError,
    WorkerDied,
)

FAKE = WorkerProgram((sys.executable, str(Path(__file__).parents[1] / "fake_worker.py")))
PLAIN = Sampling()


def job(*prompt: int, samples: int = 1, max_tokens: int = 5) -> Job:
    return Job(prompt or (1, 2, 3), samples, max_tokens, PLAIN, end_tokens=(), key=b"k" * 16)


@asynccontextmanager
async def engine(
    path: str = "any", max_queue: int = 100, sequences: int = 2, queue_tokens: int = 10**9, **limits: float
) -> AsyncIterator[Supervisor]:
    policy = QueuePolicy(queue=max_queue, queue_tokens=queue_tokens, **limits)
    supervisor = Supervisor(LoadModel(path, 512, sequences, 1, 8, "f16", 0, False), policy, program=FAKE)
    try:
        await supervisor.open()
        yield supervisor
    finally:
        await supervisor.close()


async def tokens(supervisor: Supervisor, expected_job: Job) -> list[int]:
    return [token.id async for step in supervisor.start(expected_job) for _, token in step.sampled]


async def drain(current: JobHandle) -> None:
    async for _ in current:
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def workers() -> list[psutil.Process]:
    """The worker processes of this module's tests. Servers of other tests may be children of this process too."""
    children = psutil.Process().children()
    return [child for child in children if child.status() != "zombie" and FAKE.command[1] in child.cmdline()]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_jobs_run_and_the_load_returns_to_zero():
    async def test() -> None:
        async with engine() as supervisor:
            jobs = [job(first, 2, 3) for first in range(1, 9)]
            assert await asyncio.gather(*(tokens(supervisor, each) for each in jobs)) == [alone(j, 0) for j in jobs]
            await until(lambda: supervisor.load == Load(2, 0, 0))

    run(test)


def test_texts_are_tokenized_beside_running_jobs():
    async def test() -> None:
        async with engine() as supervisor:
            supervisor.start(job(max_tokens=400))
            assert tuple(await supervisor.tokenize("ABC", True)) == (0, 1, 2)

    run(test)


def test_closing_a_job_frees_its_sequences():
    async def test() -> None:
        async with engine() as supervisor:
            runs = [supervisor.start(job(samples=2, max_tokens=10**6)) for _ in range(6)]
            await until(lambda: supervisor.load.running == 2)
            for each in runs:
                each.close()
                each.close()  # harmless
            await until(lambda: supervisor.load == Load(2, 0, 0))

    run(test)


def test_dropping_every_sample_ends_the_job():
    async def test() -> None:
        async with engine() as supervisor:
            current = supervisor.start(job(samples=2, max_tokens=10**6))
            async for _ in current:
                current.drop(0)
                current.drop(1)
            await until(lambda: supervisor.load == Load(2, 0, 0))

    run(test)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_finished_job_shows_that_the_worker_can_work(dropped: bool):
    """Otherwise a server whose responses end with stop strings would refuse requests after a few crashes."""

    async def test() -> None:
        async with engine() as supervisor:
            for _ in range(5):
                supervisor._restart_policy.next_delay(time.monotonic())
            assert supervisor._restart_policy.is_failing(time.monotonic())
            current = supervisor.start(job(samples=2, max_tokens=10**6 if dropped else 1))
            async for _ in current:
                if dropped:
                    current.drop(0)
                    current.drop(1)
            assert not supervisor._restart_policy.is_failing(time.monotonic())

    run(test)


def test_dropping_the_last_sample_wakes_the_consumer():
    async def test() -> None:
        async with engine() as supervisor:
            for _ in range(3):
                supervisor.start(job(samples=2, max_tokens=10**6))
            current = supervisor.start(job())  # waits: all sequences are in use
            waiting = asyncio.create_task(drain(current))
            await asyncio.sleep(0)
            current.drop(0)
            await waiting

    run(test)


def test_heartbeats_report_the_loaded_share():
    async def test() -> None:
        link = ScriptedLink()
        supervisor = Supervisor(LoadModel("any", 512, 2, 1, 8, "f16", 0, False), spawn=link.spawn)
        opening = asyncio.create_task(supervisor.open())
        for share in (0.25, 0.75):
            link.incoming.put_nowait(Heartbeat(0, 0, 0, 0.0, share))
            await until(lambda share=share: supervisor.loaded == share)
        link.incoming.put_nowait(None)
        with pytest.raises(SettingError, match="while it was loading"):
            await opening
        await supervisor.close()

    run(test)


class ScriptedLink:
    """A connection to a worker that receives only the messages in `incoming`."""

    pid = None

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[Heartbeat | None] = asyncio.Queue()

    async def spawn(self, _: object) -> ScriptedLink:
        return self

    def send(self, _: object) -> None: ...

    async def receive(self) -> Heartbeat | None:
        return await self.incoming.get()

    def kill(self) -> None: ...

    async def wait_ended(self) -> int | None:
        return 1


def test_a_full_queue_refuses():
    async def test() -> None:
        async with engine(max_queue=3) as supervisor:
            for _ in range(5):  # 2 run, 3 wait
                supervisor.start(job(max_tokens=10**6))
            with pytest.raises(Overloaded):
                supervisor.start(job())

    run(test)


def test_a_job_that_crashes_the_worker_twice_fails_alone():
    async def test() -> None:
        async with engine() as supervisor:
            assert supervisor.state == "ready"
            deadly = supervisor.start(job(DEADLY))
            others = [asyncio.create_task(tokens(supervisor, job(4, 5))) for _ in range(20)]
            with pytest.raises(EngineFailure):
                await drain(deadly)
            assert await asyncio.gather(*others) == [alone(job(4, 5), 0)] * 20, (
                "jobs that ran or waited at the crash are completed"
            )
            assert (supervisor.state, supervisor.restarts) == ("ready", 2), "a deadly job is tried only twice"
            with pytest.raises(EngineFailure):
                supervisor.start(msgspec.structs.replace(job(DEADLY), key=b"x" * 16, client="someone else"))
            assert await tokens(supervisor, job(7)) == alone(job(7), 0)

    run(test)


def test_a_grammar_that_crashes_the_worker_twice_fails_alone():
    def with_grammar(text: str, *prompt: int) -> Job:
        return msgspec.structs.replace(job(*prompt), grammar=Grammar("regex", text, "grammar"))

    async def test() -> None:
        async with engine() as supervisor:
            running = [asyncio.create_task(tokens(supervisor, job(4, 5, max_tokens=400))) for _ in range(2)]
            deadly = supervisor.start(with_grammar(DEADLY_TEXT, 1))
            others = [asyncio.create_task(tokens(supervisor, with_grammar("[a-e]{3}", 4, 5))) for _ in range(5)]
            with pytest.raises(EngineFailure):
                await drain(deadly)
            assert await asyncio.gather(*running) == [alone(job(4, 5, max_tokens=400), 0)] * 2
            found = await asyncio.gather(*others)
            assert len(found[0]) == 3
            assert found == [found[0]] * 5
            with pytest.raises(EngineFailure):
                supervisor.start(with_grammar(DEADLY_TEXT, 1))
            assert await tokens(supervisor, job(1)) == alone(job(1), 0), "only the job with the grammar is refused"

    run(test)


def test_a_wrong_grammar_is_an_error_of_the_request_that_names_the_field():
    async def test() -> None:
        async with engine() as supervisor:
            wrong = msgspec.structs.replace(job(1), grammar=Grammar("regex", "(", "structured_outputs.regex"))
            with pytest.raises(RequestError, match="unclosed group") as problem:
                await tokens(supervisor, wrong)
            assert (problem.value.status, problem.value.param) == (400, "structured_outputs.regex")
            assert supervisor.load.waiting == 0
            assert await tokens(supervisor, job(7)) == alone(job(7), 0)

    run(test)


def test_a_text_that_crashes_the_tokenizer_fails_alone():
    async def test() -> None:
        async with engine() as supervisor:
            running = asyncio.create_task(tokens(supervisor, job(max_tokens=100)))
            deadly, *others = [
                asyncio.create_task(supervisor.tokenize(text, True)) for text in (DEADLY_TEXT, "AB", "C")
            ]
            assert [tuple(ids) for ids in await asyncio.gather(*others)] == [(0, 1), (2,)]
            with pytest.raises(EngineFailure):
                await deadly
            assert await running == alone(job(max_tokens=100), 0)
            with pytest.raises(EngineFailure):
                await supervisor.tokenize(DEADLY_TEXT, True)

    run(test)


@pytest.mark.parametrize("seconds", [0, pytest.param(13, marks=pytest.mark.slow)])
def test_a_slow_text_delays_no_other_text_and_is_no_hang(seconds: int):
    async def test() -> None:
        async with engine(hang_seconds=3) as supervisor:
            slow = [asyncio.create_task(supervisor.tokenize(SLOW + "x" * 10**4, True, "A")) for _ in range(8)]
            await asyncio.sleep(0)
            assert tuple(await supervisor.tokenize("ABC", True, "B")) == (0, 1, 2)
            await asyncio.sleep(seconds)
            for task in slow:
                task.cancel()
            text = "A" * 10**4
            assert tuple(await supervisor.tokenize(text, True, "B")) == (0,) * 10**4, (
                "a cancelled text frees the tokenizer"
            )
            assert supervisor.restarts == 0, "the slow text made progress"

    run(test)


@pytest.mark.slow
@pytest.mark.parametrize("text", [STUCK, STUCK + "x" * 10**4], ids=["short", "long"])
def test_a_hanging_text_restarts_the_worker(text: str):
    async def test() -> None:
        async with engine(hang_seconds=3) as supervisor:
            stuck = asyncio.create_task(supervisor.tokenize(text, True, "A"))
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
            stuck.cancel()

    run(test)


def test_texts_above_the_limit_do_not_reach_the_worker():
    async def test() -> None:
        async with engine(max_text=10**4) as supervisor:
            for text in ("A" * (10**4 + 1), DEADLY_TEXT * 10**4):
                with pytest.raises(RequestError, match="max_text"):
                    await supervisor.tokenize(text, True)
            assert supervisor.restarts == 0

    run(test)


def test_a_stopped_worker_is_replaced_and_its_jobs_continue():
    async def test() -> None:
        async with engine(hang_seconds=3) as supervisor:
            current = asyncio.create_task(tokens(supervisor, job(max_tokens=400)))
            await until(lambda: supervisor.load.running == 1)
            workers()[0].suspend()
            assert await current == alone(job(max_tokens=400), 0)
            assert supervisor.restarts == 1

    run(test)


def test_a_job_that_waits_too_long_fails():
    async def test() -> None:
        async with engine(queue_seconds=1) as supervisor:
            running = [supervisor.start(job(first, max_tokens=10**6)) for first in (1, 2)]
            with pytest.raises(QueueTimeout):
                await drain(supervisor.start(job()))
            assert supervisor.load.running == 2, "the limit does not apply to running jobs"
            running[0].close()
            assert await tokens(supervisor, job()) == alone(job(), 0)

    run(test)


def test_the_queue_is_bounded_by_tokens():
    async def test() -> None:
        async with engine(queue_tokens=1000) as supervisor:
            supervisor.start(job(max_tokens=10**6))  # a single job may have any size
            with pytest.raises(Overloaded):
                supervisor.start(job())

    run(test)


def test_the_worker_gets_no_secrets():
    names = ("AFTERWORD_API_KEY", "HF_TOKEN", "some_password", "AWS_SECRET_ACCESS_KEY", "PATH", "OMP_NUM_THREADS")
    assert list(without_secrets(dict.fromkeys(names, "x"))) == ["PATH", "OMP_NUM_THREADS"]


@pytest.mark.skipif(sys.platform != "linux", reason="resource limits of another process are known on Linux only")
def test_the_worker_writes_no_core_file():
    async def test() -> None:
        async with engine():
            assert workers()[0].rlimit(psutil.RLIMIT_CORE) == (0, 0)

    run(test)


def test_a_killed_worker_is_replaced():
    async def test() -> None:
        async with engine() as supervisor:
            for restarts in (1, 2):
                workers()[0].kill()
                await until(lambda restarts=restarts: supervisor.restarts == restarts and supervisor.state == "ready")
                assert await tokens(supervisor, job()) == alone(job(), 0)

    run(test)


def test_running_jobs_continue_after_a_crash():
    async def test() -> None:
        async with engine(sequences=3) as supervisor:
            scored = Job((1, 2, 3, 4), 1, 120, PLAIN, (), b"k" * 16, prompt_alternatives=1)
            expected_job = [*(job(first, 2, 3, samples=2, max_tokens=120) for first in (4, 5, 6)), scored]
            runs = [supervisor.start(each) for each in expected_job]
            found: dict[tuple[int, int], list[int]] = {}
            scores: list[int] = []

            async def read(index: int) -> None:
                async for step in runs[index]:
                    scores.extend(token.id for token in step.scored)
                    for sample, token in step.sampled:
                        tokens = found.setdefault((index, sample), [])
                        tokens.append(token.id)
                        if (index, sample, len(tokens)) == (0, 1, 20):
                            runs[0].drop(1)
                        if (index, sample, len(tokens)) == (0, 0, 30):
                            workers()[0].kill()

            await asyncio.gather(*(read(index) for index in range(4)))
            assert supervisor.restarts == 1
            assert scores == [2, 3, 4]
            assert 20 <= len(found[0, 1]) < 120
            for (index, sample), tokens in found.items():
                expected = alone(expected_job[index], sample)
                assert tokens == (expected[: len(tokens)] if (index, sample) == (0, 1) else expected)
            await until(lambda: supervisor.load == Load(3, 0, 0))

    run(test)


def test_without_a_promise_a_job_with_output_is_not_repeated():
    async def read(supervisor: Supervisor) -> None:
        async for step in supervisor.start(job(max_tokens=10**6)):
            for process in workers() if step.sampled else ():
                process.kill()

    async def test() -> None:
        async with engine("unsure") as supervisor:
            with pytest.raises(WorkerDied):
                await read(supervisor)
            assert supervisor.restarts == 0, "the job was not started again"

    run(test)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The file of a model, see `fake_worker`."""
    path = tmp_path / "model"
    path.write_text("fp_old")
    return path


async def replace_model(supervisor: Supervisor, model: Path, fingerprint: str) -> None:
    """Rename another file over the model's file, and kill the worker."""
    other = model.with_name("other")
    other.write_text(fingerprint)
    for process in workers():
        process.suspend()  # so that the worker does not detect the change itself
        other.replace(model)
        process.kill()


def test_another_model_fails_all_jobs(model: Path):
    async def test() -> None:
        async with engine(str(model)) as supervisor:
            streaming = supervisor.start(job(max_tokens=10**6))
            await until(lambda: supervisor.load.running == 1)
            waiting = [supervisor.start(job(first, max_tokens=10**6)) for first in range(1, 4)]
            await replace_model(supervisor, model, "fp_new")
            text = asyncio.create_task(supervisor.tokenize("AB", True))
            late = supervisor.start(job(9))  # planned for the old model, and never sent to a worker
            for each in (streaming, *waiting, late):
                with pytest.raises(ModelReplaced):
                    await drain(each)
            with pytest.raises(ModelReplaced):
                await text
            assert (supervisor.model_info.fingerprint, supervisor.state) == ("fp_new", "ready")
            assert await tokens(supervisor, job()) == alone(job(), 0)
            await until(lambda: supervisor.load == Load(2, 0, 0))

    run(test)


def test_jobs_continue_with_a_copy_of_the_same_model(model: Path):
    async def test() -> None:
        async with engine(str(model)) as supervisor:
            current = asyncio.create_task(tokens(supervisor, job(max_tokens=400)))
            await until(lambda: supervisor.load.running == 1)
            await replace_model(supervisor, model, "fp_old")
            assert await current == alone(job(max_tokens=400), 0)
            assert supervisor.restarts == 1

    run(test)


@pytest.mark.parametrize("busy", [True, False])
def test_a_changed_file_ends_the_worker(model: Path, busy: bool):
    async def test() -> None:
        async with engine(str(model)) as supervisor:
            current = supervisor.start(job(max_tokens=10**6)) if busy else None
            await until(lambda: supervisor.load.running == busy)
            model.write_text("fp_new")
            await until(lambda: supervisor.restarts > 0 and supervisor.state == "ready")
            assert supervisor.model_info.fingerprint == "fp_new"
            with pytest.raises(ModelReplaced) if current else nullcontext():
                await drain(current or supervisor.start(job()))

    run(test)


def test_the_settings_are_read_before_each_start():
    sequences = iter([2, 3])

    def settings() -> LoadModel:
        if (count := next(sequences, 0)) == 0:
            raise SettingError("The file is not a model.")
        return LoadModel("any", 512, count, 1, 8, "f16", 0, False)

    async def test() -> None:
        supervisor = Supervisor(settings, program=FAKE)
        await supervisor.open()
        assert supervisor.model_info.sequences == 2
        workers()[0].kill()
        await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
        assert supervisor.model_info.sequences == 3
        workers()[0].kill()
        await until(lambda: supervisor.restarts > 2)
        assert supervisor.state == "restarting"
        await supervisor.close()

    run(test)


def test_a_worker_with_inconsistent_slots_is_replaced():
    async def test() -> None:
        async with engine("confuse") as supervisor:
            assert await tokens(supervisor, job()) == alone(job(), 0)
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")

    run(test)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("refuse", "cannot be loaded"),
        ("vanish", "ended while it was loading"),
        ("starve", r"too little memory .* \(ulimit -v\)"),
        ("crowd", r"starts no further thread: the limit of memory \(ulimit -v\)"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_a_setting_error(path, message):
    async def test() -> None:
        with pytest.raises(SettingError, match=message):
            async with engine(path):
                pass
        assert not workers()

    run(test)


def test_closing_ends_the_worker_and_all_jobs():
    async def test() -> None:
        async with engine() as supervisor:
            current = supervisor.start(job(max_tokens=10**6))
        with pytest.raises(Overloaded):
            await drain(current)
        with pytest.raises(Overloaded):
            supervisor.start(job())
        assert not workers()

    run(test)


# ---- pauses


def test_a_paused_job_is_not_computed_is_no_hang_and_stays_paused_after_a_restart() -> None:
    async def scenario() -> None:
        async with engine(hang_seconds=3) as supervisor:
            current = supervisor.start(job(max_tokens=200))
            got: list[int] = []

            async def read() -> None:
                async for step in current:
                    got.extend(token.id for _, token in step.sampled)

            reading = asyncio.create_task(read())
            await until(lambda: len(got) > 3)
            current.pause()
            await asyncio.sleep(0.2)
            before = len(got)
            await asyncio.sleep(4)  # longer than the watchdog's limit
            assert supervisor.restarts == 0
            assert len(got) == before
            assert await tokens(supervisor, job(4)) == alone(job(4), 0)  # other jobs continue
            supervisor._link.kill()  # type: ignore[union-attr]
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
            assert await tokens(supervisor, job(5)) == alone(job(5), 0)
            assert len(got) == before
            current.resume()
            await reading
            assert got == alone(job(max_tokens=200), 0)

    asyncio.run(scenario())


# ---- exceptions in tasks


def test_an_exception_in_message_handling_replaces_the_worker(monkeypatch, caplog):
    """An exception in the task that handles the worker's messages: running jobs fail, later jobs are completed."""
    monkeypatch.setattr("afterword.system.tasks._FIRST_PAUSE", 0.0)
    original, left = Supervisor._handle_message, [1]

    def failing(self: Supervisor, message: PassDone) -> None:
        if left and message.steps:
            left.pop()
            raise RuntimeError("injected")
        original(self, message)

    monkeypatch.setattr(Supervisor, "_handle_message", failing)

    async def test() -> None:
        async with engine() as supervisor:
            with pytest.raises(WorkerDied):
                await tokens(supervisor, job())
            assert await tokens(supervisor, job()) == alone(job(), 0)
            assert supervisor.restarts == 1

    run(test)
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_an_exception_in_crash_handling_does_not_end_the_supervisor(monkeypatch, caplog):
    monkeypatch.setattr("afterword.system.tasks._FIRST_PAUSE", 0.0)
    original, left = Supervisor._handle_worker_death, [1]

    def failing(self: Supervisor) -> None:
        if left:
            left.pop()
            raise RuntimeError("injected")
        original(self)

    monkeypatch.setattr(Supervisor, "_handle_worker_death", failing)

    async def test() -> None:
        async with engine() as supervisor:
            workers()[0].kill()
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
            assert await tokens(supervisor, job())

    run(test)
    assert len(caplog.records) == 1


def test_an_exception_in_the_watchdog_task_does_not_end_it(monkeypatch, caplog):
    monkeypatch.setattr("afterword.system.tasks._FIRST_PAUSE", 0.0)
    monkeypatch.setattr("afterword.engine.parent.supervisor.TICK_SECONDS", 0.001)
    expire, left, called = JobQueue.expire, [1, 2], asyncio.Event()

    def failing(self: JobQueue, accepted: float) -> None:
        if left:
            left.pop()
            raise RuntimeError("injected")
        called.set()
        expire(self, accepted)

    monkeypatch.setattr(JobQueue, "expire", failing)

    async def test() -> None:
        async with engine():
            await called.wait()

    run(test)
    assert len(caplog.records) == 2


def test_an_exception_in_a_tokenizer_thread_ends_the_worker():
    """Without its tokenizer thread a worker would never answer a text."""

    async def test() -> None:
        async with engine() as supervisor:
            with pytest.raises(EngineFailure):
                await supervisor.tokenize(FAULTY_TEXT, special=True)
            assert await supervisor.tokenize("a", special=True)

    run(test)

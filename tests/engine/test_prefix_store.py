"""Prefixes that survive the process (`--cache-dir`), with tiny models."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from afterword.engine.core import prefix_store
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.llama import library
from afterword.engine.protocol import Job, Token
from afterword.engine.store import disk_store, part_files
from afterword.engine.store.disk_store import DiskStore
from afterword.engine.store.part_files import KEY_FILE, DamagedPart, PartFolder
from afterword.engine.store.part_index import PartIndex
from afterword.errors import SettingError
from engine.test_reproducible import open_runner
from engine.test_snapshots import Runs, greedy
from oracle.architectures import write_random

library.initialize(verbose=False)

TEXT = tuple(np.random.default_rng(5).integers(4, 280, 1200).tolist())
OTHER = tuple(np.random.default_rng(6).integers(4, 280, 1200).tolist())
CONTEXT, LARGE = 2048, 2**30


@dataclass
class Process:
    """One life of a worker: a runner without any prefix in memory, and a store in a folder."""

    runs: Runs
    store: DiskStore

    def run(self, *jobs: Job) -> tuple[list[list[list[Token]]], list[int]]:
        """The results of jobs, and how many tokens of each were cached. Returns when everything is on the disk."""
        before = len(self.runs.cached)
        results = self.runs.run(*jobs)
        self.settle()
        return results, self.runs.cached[before:]

    def settle(self) -> None:
        while self.store.is_writing:
            self.store.wait(0.1)


@dataclass
class Machine:
    """A model and a folder, for one process after the other."""

    model: Path
    folder: Path
    slots: int = 3
    logs: list[str] = field(default_factory=list)

    def start(self, fingerprint: str = "fp", most_bytes: int = LARGE) -> Process:
        runner = open_runner(self.model, "exact", self.slots, context=CONTEXT)
        states = runner.slot_states()
        assert states is not None
        index = PartIndex(PartFolder.open(self.folder), most_bytes)
        index.scan()
        distance = -(-runner.min_shared_tokens // runner.grid) * runner.grid
        store = DiskStore(index, fingerprint, states, distance=distance, log=self.logs.append)
        store.start()
        loop = EngineLoop(runner)
        loop.use_store(store)
        return Process(Runs(loop, distance), store)

    @property
    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.part"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def models(kernel_products, tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def model(architecture: str) -> Path:
        path = folder / f"{architecture}.gguf"
        return path if path.exists() else write_random(path, architecture)

    return model


@pytest.fixture
def machine(models, tmp_path) -> Machine:
    return Machine(models("llama"), tmp_path / "cache")


def in_namespace(job: Job, namespace: str) -> Job:
    return msgspec.structs.replace(job, namespace=namespace)


def cold_results(machine: Machine, *jobs: Job) -> list[list[list[Token]]]:
    """The results of jobs that use no prefix at all."""
    runs = Runs(EngineLoop(open_runner(machine.model, "exact", machine.slots, context=CONTEXT)))
    return [runs.cold(job) for job in jobs]


LONG = greedy(TEXT[:900], max_tokens=8)
"""A job that leaves three whole parts on the disk."""


# ---- hits


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "qwen2vl"])
def test_a_prefix_is_found_after_a_restart_with_the_same_bits(models, tmp_path, architecture):
    machine = Machine(models(architecture), tmp_path / "cache")
    jobs = [LONG, greedy(TEXT, max_tokens=8), greedy((*TEXT[:600], *OTHER[:300]))]
    cold = cold_results(machine, *jobs)
    assert machine.start().run(LONG) == (cold[:1], [0])
    for job, wanted, cached in zip(jobs, cold, (768, 768, 512), strict=True):
        process = machine.start()
        assert process.run(job) == ([wanted], [cached])
        stats = process.store.stats()
        assert (stats.hits, stats.hit_tokens, stats.failures) == (1, cached, 0)
    assert machine.logs == []


@pytest.mark.parametrize("architecture", ["mamba2", "lfm2", "qwen35"])
def test_a_recurrent_model_finds_its_snapshot(models, tmp_path, architecture):
    machine = Machine(models(architecture), tmp_path / "cache")
    jobs = [LONG, greedy(TEXT, max_tokens=8)]
    cold = cold_results(machine, *jobs)
    machine.start().run(LONG)
    process = machine.start()
    length = process.runs.border(899)
    assert process.run(LONG) == (cold[:1], [length])
    assert process.run(LONG)[1] == [length], "the slot has a snapshot of the stored state"
    assert process.store.stats().hits == 1
    assert machine.start().run(jobs[1]) == (cold[1:], [length])


def test_a_snapshot_that_several_texts_share_is_stored_too(models, tmp_path):
    machine = Machine(models("qwen35"), tmp_path / "cache", slots=4)
    process = machine.start()
    shared = greedy((*TEXT[:704], *OTHER[:70]))
    process.run(greedy(TEXT[:900]))
    process.run(shared)
    process.run(greedy((*TEXT[:704], *OTHER[100:170])))
    third = greedy((*TEXT[:704], *OTHER[200:270]))
    assert machine.start().run(third) == (cold_results(machine, third), [704])


def test_several_jobs_share_one_read(machine):
    jobs = [greedy((*TEXT[:800], *OTHER[start : start + 40])) for start in (0, 100, 200, 300, 400)]
    cold = cold_results(machine, *jobs)
    machine.start().run(LONG)
    process = machine.start()
    assert process.run(*jobs) == (cold, [768, 800, 800, 800, 800])
    assert process.store.stats().hits == 1


def test_jobs_with_different_prefixes_are_read_at_the_same_time_as_others_are_computed(machine):
    texts = [tuple(np.random.default_rng(seed).integers(4, 280, 700).tolist()) for seed in range(8)]
    jobs = [greedy(text, max_tokens=3) for text in texts]
    cold = cold_results(machine, *jobs)
    machine.start().run(*jobs[:6])
    assert machine.start().run(*jobs) == (cold, [512] * 6 + [0, 0])


def test_the_longest_prefix_of_slots_and_store_is_used(machine):
    machine.start().run(LONG)
    process = machine.start()
    process.run(greedy(TEXT[:560]))
    assert process.runs.cached == [512]
    assert process.run(LONG)[1] == [560], "208 tokens more are not worth a read"
    assert process.store.stats().hits == 1


def test_a_generated_text_is_stored_too(machine):
    process = machine.start()
    ((_, generated),), _ = process.run(greedy(TEXT[:500], max_tokens=300))
    text = (*TEXT[:500], *(token.id for token in generated))
    assert machine.start().run(greedy((*text, 7)))[1] == [768]


def test_a_short_text_is_not_stored(machine):
    machine.start().run(greedy(TEXT[:511], max_tokens=1))
    assert machine.parts == []


def test_scored_prompts_are_computed(machine):
    machine.start().run(LONG)
    assert machine.start().run(greedy(TEXT[:900], max_tokens=0, scored=1))[1] == [0]


def test_a_job_that_is_closed_while_its_prefix_is_read_leaves_nothing(machine):
    machine.start().run(LONG)
    process = machine.start()
    process.runs.loop.start(77, LONG)
    process.runs.loop.close(77)
    assert process.run(greedy(OTHER[:40]))[1] == [0]
    assert not process.runs.loop.waits
    assert process.run(LONG)[1] == [768]


# ---- misses


def test_another_fingerprint_or_namespace_is_a_miss(machine):
    cold = cold_results(machine, LONG)
    machine.start().run(in_namespace(LONG, "a"))
    process = machine.start()
    assert process.run(in_namespace(LONG, "b")) == (cold, [0])
    assert process.run(in_namespace(LONG, "")) == (cold, [0])
    assert machine.start("other").run(in_namespace(LONG, "a")) == (cold, [0])
    assert machine.start().run(in_namespace(LONG, "a")) == (cold, [768])


def test_a_model_of_another_shape_never_gets_a_part(models, machine):
    """Even with an equal fingerprint, which two models never have."""
    machine.start().run(LONG)
    other = Machine(models("lfm2"), machine.folder)
    assert other.start().run(LONG) == (cold_results(other, LONG), [0])


@pytest.mark.parametrize("architecture", ["llama", "qwen35"])
def test_every_damage_is_a_miss_with_a_line_in_the_log(models, tmp_path, architecture):
    machine = Machine(models(architecture), tmp_path / "cache")
    cold = cold_results(machine, LONG)
    rng = random.Random(1)
    machine.start().run(LONG)
    intact = machine.start().run(LONG)[1]
    for number in range(12):
        machine.start().run(LONG)
        assert len(machine.parts) == 3 + (architecture == "qwen35")
        path = rng.choice(machine.parts)
        data = bytearray(path.read_bytes())
        match number % 4:
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2:
                data[rng.randrange(40)] ^= 1 << rng.randrange(8)
            case 3:
                data = bytearray(machine.parts[(machine.parts.index(path) + 1) % 3].read_bytes())
        path.write_bytes(data)
        machine.logs.clear()
        results, (cached,) = machine.start().run(LONG)
        assert results == cold
        assert cached in (0, 512)
        assert len(machine.logs) == 1
        assert f"{path.name} is damaged" in machine.logs[0]
        assert machine.start().run(LONG)[1] == intact, "the damaged file was written again"


def test_every_bit_and_every_length_is_checked(tmp_path):
    folder = PartFolder.open(tmp_path)
    name = "0" * 40
    folder.write(name, (b"some ", bytearray(b"content")))
    path = tmp_path / f"{name}.part"
    data = path.read_bytes()
    assert bytes(folder.read(name)) == b"some content"
    for damaged in [data[:size] for size in range(len(data))] + [
        bytes(byte ^ (1 << bit) if at == position else byte for at, byte in enumerate(data))
        for position in range(len(data))
        for bit in range(8)
    ]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedPart):
            folder.read(name)
    path.write_bytes(data + b"x")
    with pytest.raises(DamagedPart):
        folder.read(name)
    other = "1" * 40
    path.write_bytes(data)
    path.rename(tmp_path / f"{other}.part")
    with pytest.raises(DamagedPart):
        folder.read(other)


def test_a_part_of_another_folder_is_damaged(tmp_path):
    one, two = PartFolder.open(tmp_path / "one"), PartFolder.open(tmp_path / "two")
    one.write("0" * 40, (b"content",))
    (one.path / f"{'0' * 40}.part").rename(two.path / f"{'0' * 40}.part")
    with pytest.raises(DamagedPart):
        two.read("0" * 40)


def test_a_file_that_disappears_is_a_miss(machine):
    cold = cold_results(machine, LONG)
    machine.start().run(LONG)
    process = machine.start()
    machine.parts[-1].unlink()
    results, (cached,) = process.run(LONG)
    assert (results, cached in (0, 512)) == (cold, True)
    assert machine.logs == []


# ---- the disk


def refuse(error: int) -> Callable[..., int]:
    def write(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    return write


def test_a_full_disk_is_a_line_in_the_log(machine, monkeypatch):
    cold = cold_results(machine, LONG)
    process = machine.start()
    monkeypatch.setattr(part_files, "_write_all", refuse(errno.ENOSPC))
    assert process.run(LONG) == (cold, [0])
    assert [line for line in machine.logs if "No space left on device" in line] == machine.logs
    assert len(machine.logs) == 1
    assert sorted(os.listdir(machine.folder)) == [KEY_FILE]
    monkeypatch.undo()
    assert process.run(greedy(OTHER[:900])) == (cold_results(machine, greedy(OTHER[:900])), [0])
    assert machine.parts == [], "nothing is written for a while"
    machine.start().run(LONG)
    assert machine.start().run(LONG) == (cold, [768])


def test_an_unreadable_file_is_a_line_in_the_log(machine, monkeypatch):
    cold = cold_results(machine, LONG)
    machine.start().run(LONG)
    process = machine.start()

    def read(*_: object) -> memoryview:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PartFolder, "read", read)
    assert process.run(LONG) == (cold, [0])
    assert len(machine.logs) == 1
    assert "Input/output error" in machine.logs[0]


def test_a_read_that_takes_too_long_is_not_waited_for(machine, monkeypatch):
    cold = cold_results(machine, LONG)
    machine.start().run(LONG)
    process = machine.start()
    released = threading.Event()
    read = PartFolder.read

    def slow(folder: PartFolder, name: str) -> memoryview:
        released.wait(60)
        return read(folder, name)

    monkeypatch.setattr(PartFolder, "read", slow)
    monkeypatch.setattr(prefix_store, "READ_SECONDS", 0.05)
    assert process.run(LONG) == (cold, [0])
    released.set()
    while not process.store.stats().hits:
        process.store.wait(0.1)
    assert process.run(greedy(OTHER[:900])) == (cold_results(machine, greedy(OTHER[:900])), [0])


def test_without_memory_for_the_state_a_prefix_is_computed(machine, monkeypatch):
    machine.start().run(LONG)
    process = machine.start()
    monkeypatch.setattr(disk_store, "available_memory", lambda: 1000)
    assert process.run(LONG)[1] == [0]
    assert len(machine.logs) == 1
    assert "MemoryError" in machine.logs[0]


# ---- the folder


def test_the_folder_is_private_and_its_names_reveal_nothing(machine):
    machine.start().run(in_namespace(LONG, "a secret namespace"))
    assert stat.S_IMODE(machine.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in machine.folder.iterdir()} == {0o600}
    assert b"a secret namespace" not in b"".join(each.read_bytes() for each in machine.folder.iterdir())
    names = {each.name for each in machine.parts}
    again = Machine(machine.model, machine.folder.with_name("again"))
    again.start().run(in_namespace(LONG, "a secret namespace"))
    assert names.isdisjoint(each.name for each in again.parts), "names depend on the folder's key"


def test_the_folder_is_bounded_and_the_least_recently_used_parts_are_evicted_first(machine):
    machine.start().run(LONG)
    size = sum(part.stat().st_size for part in machine.parts)
    process = machine.start(most_bytes=int(2.5 * size))
    texts = [tuple(np.random.default_rng(seed).integers(4, 280, 800).tolist()) for seed in range(10, 16)]
    for text in texts:
        process.run(greedy(text))
        assert sum(part.stat().st_size for part in machine.parts) <= 2.5 * size
        assert process.store.stats().bytes == sum(part.stat().st_size for part in machine.parts)
    assert process.store.stats().evictions >= 12
    last = machine.start(most_bytes=int(2.5 * size))
    assert [last.run(greedy(text))[1] for text in (texts[5], texts[0], LONG.prompt)] == [[768], [0], [0]]


def test_a_part_that_is_used_again_is_evicted_later(tmp_path):
    minute = 60 * 10**9
    index = PartIndex(PartFolder.open(tmp_path), 400)
    for number in range(3):
        index.write(f"{number}" * 40, number * minute, (bytes(80),))
    assert index.note_use("0" * 40, 4 * minute)
    assert not index.note_use("0" * 40, 5 * minute - 1), "a minute has not passed"
    index.record_use("0" * 40)
    index = PartIndex(index.folder, 400)
    index.write("3" * 40, 6 * minute, (bytes(80),))
    assert ["0" * 40 in index, "1" * 40 in index, "3" * 40 in index] == [True, False, True]


def test_later_parts_of_a_text_are_evicted_first(machine):
    machine.start().run(greedy(TEXT))
    size = sum(part.stat().st_size for part in machine.parts)
    machine.start(most_bytes=size + 1000).run(greedy(OTHER[:520]))
    assert machine.start().run(greedy(TEXT))[1] == [512]


def test_a_part_larger_than_the_bound_is_not_written(tmp_path):
    index = PartIndex(PartFolder.open(tmp_path), 100)
    index.reserve("0" * 40)
    index.write("0" * 40, 0, (bytes(101),))
    assert not index.is_known("0" * 40)
    assert os.listdir(tmp_path) == [KEY_FILE]


def test_foreign_files_stay(machine):
    process = machine.start(most_bytes=1000)
    names = ["notes.txt", f"{'a' * 40}.part", "x.tmp", f"{'b' * 40}.part.bak", "afterword-prefixes.old"]
    for name in names:
        (machine.folder / name).write_bytes(b"mine" * 400)
        os.utime(machine.folder / name, (0, 0))
    process.run(LONG)
    machine.start(most_bytes=1).run(LONG)
    assert [name for name in names if not (machine.folder / name).exists()] == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SettingError, match="--cache-dir"):
        PartFolder.open(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(SettingError, match="--cache-dir"):
        PartFolder.open(tmp_path / "thesis.tex")


def test_a_damaged_key_is_refused(tmp_path):
    PartFolder.open(tmp_path)
    (tmp_path / KEY_FILE).write_bytes(b"Afterword prefixes 1\n")
    with pytest.raises(SettingError, match="damaged"):
        PartFolder.open(tmp_path)


def test_the_files_of_killed_writers_are_deleted_and_those_of_running_ones_are_not(tmp_path):
    folder = PartFolder.open(tmp_path)
    left, held = (tmp_path / f"{digit * 40}.{'0' * 16}.tmp" for digit in "ab")
    for path in (left, held):
        path.write_bytes(bytes(1000))
    young = tmp_path / f"{KEY_FILE}.{'0' * 16}.tmp"
    young.write_bytes(b"")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for path in (left, held):
            os.utime(path, (0, 0))
        assert folder.scan() == ([], 1000)
    assert sorted(os.listdir(tmp_path)) == sorted([KEY_FILE, held.name, young.name])


def test_two_processes_share_a_folder(machine):
    cold = cold_results(machine, LONG, greedy(OTHER[:900]))
    one, two = machine.start(), machine.start()
    one.run(LONG)
    two.run(greedy(OTHER[:900]))
    assert two.run(LONG) == (cold[:1], [0]), "the other process has not seen it yet"
    assert len(machine.parts) == 6
    three = machine.start()
    assert three.run(LONG, greedy(OTHER[:900])) == (cold, [768, 768])
    assert machine.logs == []


def test_processes_that_create_a_folder_together_get_the_same_key(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(PartFolder.open, [tmp_path / "cache"] * 16))
    assert len({folder.key for folder in folders}) == 1
    assert os.listdir(tmp_path / "cache") == [KEY_FILE]

"""Tests that the KV cache takes memory for the tokens in it, and that copies and truncated slots keep their numbers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, ForwardBatch, Logits, Truncate
from afterword.engine.kernels import compiled
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from oracle.architectures import write_random

library.initialize(verbose=False)

CELL_BYTES = 4 * 2 * 256 * 2  # 4 layers of keys and values, 256 elements of 2 bytes
CONTEXT, SLOTS, CHUNK = 8192, 16, 256
WIDE = {"block_count": 4, "embedding_length": 256, "attention.head_count": 8, "attention.head_count_kv": 8}
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux gives pages back")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_wide(folder: Path) -> Path:
    return write_random(folder / "wide.gguf", "llama", "F16", also=WIDE)


def open_runner(path: Path) -> LlamaRunner:
    return LlamaRunner(LoadModel(str(path), CONTEXT, SLOTS, 1, CHUNK, "exact", 0, False, use_kernels=True))


@pytest.fixture
def runner(tmp_path) -> LlamaRunner:
    return open_runner(write_wide(tmp_path))


def fill(runner: LlamaRunner, slot: int, tokens: tuple[int, ...], start: int = 0, first=()) -> Logits:
    """Compute tokens in one slot, from position `start` on. Returns a copy of the logits of the last one."""
    for at in range(0, len(tokens), CHUNK):
        chunk = tokens[at : at + CHUNK]
        logits = runner.run(ForwardBatch(first, (BatchEntry(slot, start + at, chunk, 1),)))
        first = ()
    return np.array(logits[-1])


def measure_memory(path: Path) -> dict[str, int]:
    """What each step adds to the resident bytes of this process. The cells of 2,048 tokens are 8 MiB."""
    assert accelerator.register()
    steps = {"start": resident_bytes()}
    runner = open_runner(path)
    fill(runner, 15, (1,) * CHUNK)  # the buffers of a pass
    steps["load"] = resident_bytes()
    fill(runner, 0, tuple(1 + i % 200 for i in range(2048)))
    steps["fill"] = resident_bytes()
    fill(runner, 1, (5,), 1000, (CopyPrefix(0, 1, 1000),))
    steps["copy"] = resident_bytes()
    fill(runner, 15, (1,), CHUNK, (Truncate(0, 0), Truncate(1, 100)))
    steps["truncate in a pass"] = resident_bytes()
    fill(runner, 0, (1,) * 2048)
    steps["fill again"] = resident_bytes()
    assert len(runner.run(ForwardBatch((Truncate(0, 0),), ()))) == 0
    steps["truncate without a pass"] = resident_bytes()
    return {after: steps[after] - steps[before] for before, after in pairwise(steps)}


@pytest.mark.usefixtures("compiled_kernels")
def test_memory_is_taken_for_tokens_and_given_back(tmp_path):
    """In a process of its own: this one holds what other tests left, and may free it meanwhile."""
    path = write_wide(tmp_path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        added = process.submit(measure_memory, path).result()
    cells = {tokens: tokens * CELL_BYTES for tokens in (100, 1000, 2048)}
    assert added["load"] < CONTEXT * SLOTS * CELL_BYTES / 4, "loading does not take the cache of all slots"
    assert 0.9 * cells[2048] < added["fill"] < 1.5 * cells[2048]
    assert 0.9 * cells[1000] < added["copy"] < 1.5 * cells[1000], "only the cells of the prefix are copied"
    assert -added["truncate in a pass"] > 0.9 * (cells[2048] + cells[1000] - cells[100])
    assert 0.9 * cells[2048] < added["fill again"] < 1.5 * cells[2048]
    assert -added["truncate without a pass"] > 0.9 * cells[2048]


@pytest.mark.usefixtures("compiled_kernels")
def test_copies_are_complete_if_their_source_is_truncated_before_any_pass(runner):
    tokens = tuple(3 + i * i % 190 for i in range(600))
    fill(runner, 0, tokens)
    alone = fill(runner, 0, (7,), 600)
    runner.run(ForwardBatch((Truncate(0, 600), CopyPrefix(0, 1, 600)), ()))
    runner.run(ForwardBatch((Truncate(0, 0),), ()))
    assert fill(runner, 1, (7,), 600).tobytes() == alone.tobytes()


@pytest.mark.usefixtures("compiled_kernels")
def test_copies_made_before_their_source_is_truncated_have_all_their_tokens(runner):
    """llama.cpp copies when the next pass begins. Then the source may hold less, and the copy may be copied again."""
    tokens = tuple(3 + i * i % 190 for i in range(600))
    fill(runner, 0, tokens)
    alone = fill(runner, 0, (7,), 600)
    operations = (Truncate(0, 600), CopyPrefix(0, 1, 600), CopyPrefix(1, 2, 600), CopyPrefix(0, 1, 10), Truncate(0, 0))
    assert fill(runner, 2, (7,), 600, operations).tobytes() == alone.tobytes()
    assert [runner.cached_tokens(slot) for slot in range(3)] == [0, 10, 601]


@pytest.mark.usefixtures("compiled_kernels")
def test_a_slot_that_is_filled_again_has_the_numbers_of_an_empty_one(runner):
    tokens = tuple(5 + i * 7 % 180 for i in range(700))
    fresh = fill(runner, 3, tokens)
    fill(runner, 4, tuple(reversed(tokens)) * 3)
    assert fill(runner, 4, tokens[50:], 50, (CopyPrefix(3, 4, 50),)).tobytes() == fresh.tobytes()
    assert fill(runner, 4, tokens, 0, (Truncate(4, 0),)).tobytes() == fresh.tobytes()


LARGE_CELLS = {
    **{"block_count": 16, "attention.head_count": 8, "attention.head_count_kv": 8},
    **{"attention.key_length": 512, "attention.value_length": 512, "rope.dimension_count": 512},
}
LARGE_CELL_BYTES = 16 * 2 * 8 * 512 * 2


@pytest.mark.usefixtures("compiled_kernels")
def test_sequences_may_have_more_memory_together_than_the_machine(tmp_path):
    if not compiled.memory_on_demand():
        pytest.skip("this system reserves memory for all addresses")
    path = write_random(tmp_path / "large.gguf", "llama", "F16", also=LARGE_CELLS)
    everything = psutil.virtual_memory().total + psutil.swap_memory().total
    context = 2 * everything // (SLOTS * LARGE_CELL_BYTES)
    runner = LlamaRunner(LoadModel(str(path), context, SLOTS, 1, CHUNK, "exact", 0, False, use_kernels=True))
    assert np.isfinite(fill(runner, 3, (1, 2, 3))).all()


def test_a_context_without_addresses_for_its_memory_is_refused(tmp_path):
    """A limit of the address space; on most machines only a context of many TiB would reach it."""
    path = write_random(tmp_path / "large.gguf", "llama", "F16", also=LARGE_CELLS)
    script = f"""
import resource
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.errors import SettingError
library.initialize(verbose=False)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for context in (65536, 512):
    try:
        LlamaRunner(LoadModel({str(path)!r}, context, 16, 1, 64, "exact", 0, False, use_kernels=True))
        print("loaded")
    except SettingError as error:
        print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    refused, loaded = done.stdout.splitlines()
    assert refused.startswith("llama.cpp cannot allocate 16 sequences of 65536 tokens"), done.stderr
    assert loaded == "loaded"
    assert done.returncode == 0


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(("mode", "on_demand"), [("0", True), ("1", True), ("2", False)])
def test_memory_is_not_on_demand_where_the_system_reserves_it(tmp_path, monkeypatch, mode, on_demand):
    (tmp_path / "overcommit_memory").write_text(f"{mode}\n", encoding="ascii")
    monkeypatch.setattr(compiled, "OVERCOMMIT", tmp_path / "overcommit_memory")
    assert compiled.memory_on_demand() == on_demand

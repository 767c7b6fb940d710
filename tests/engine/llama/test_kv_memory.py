"""Tests that the KV cache takes memory for the tokens in it, and that copies and truncated slots keep their numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, ForwardBatch, Logits, Truncate
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


@pytest.fixture
def runner(tmp_path) -> LlamaRunner:
    if not accelerator.register():
        pytest.skip("the kernels were not built")
    path = write_random(tmp_path / "wide.gguf", "llama", "F16", also=WIDE)
    return LlamaRunner(LoadModel(str(path), CONTEXT, SLOTS, 1, CHUNK, "exact", 0, False, use_kernels=True))


def fill(runner: LlamaRunner, slot: int, tokens: tuple[int, ...], start: int = 0, first=()) -> Logits:
    """Compute tokens in one slot, from position `start` on. Returns a copy of the logits of the last one."""
    for at in range(0, len(tokens), CHUNK):
        chunk = tokens[at : at + CHUNK]
        logits = runner.run(ForwardBatch(first, (BatchEntry(slot, start + at, chunk, 1),)))
        first = ()
    return np.array(logits[-1])


def test_memory_is_taken_for_tokens_and_given_back(runner):
    whole = CONTEXT * SLOTS * CELL_BYTES
    fill(runner, 15, (1,) * CHUNK)  # the buffers of a pass
    empty = resident_bytes()
    assert empty < whole, "the whole process takes less than the cache of all slots would"
    tokens = tuple(1 + i % 200 for i in range(2048))
    fill(runner, 0, tokens)
    filled = resident_bytes() - empty
    assert 0.9 * len(tokens) * CELL_BYTES < filled < 1.5 * len(tokens) * CELL_BYTES
    fill(runner, 1, (5,), 1000, (CopyPrefix(0, 1, 1000),))
    copied = resident_bytes() - empty - filled
    assert 0.9 * 1000 * CELL_BYTES < copied < 1.5 * 1000 * CELL_BYTES, "only the cells of the prefix are copied"
    fill(runner, 15, (1,), CHUNK, (Truncate(0, 0), Truncate(1, 100)))
    assert resident_bytes() - empty < 0.3 * len(tokens) * CELL_BYTES


def test_copies_made_before_their_source_is_truncated_have_all_their_tokens(runner):
    """llama.cpp copies when the next pass begins. Then the source may hold less, and the copy may be copied again."""
    tokens = tuple(3 + i * i % 190 for i in range(600))
    fill(runner, 0, tokens)
    alone = fill(runner, 0, (7,), 600)
    operations = (Truncate(0, 600), CopyPrefix(0, 1, 600), CopyPrefix(1, 2, 600), CopyPrefix(0, 1, 10), Truncate(0, 0))
    assert fill(runner, 2, (7,), 600, operations).tobytes() == alone.tobytes()
    assert [runner.cached_tokens(slot) for slot in range(3)] == [0, 10, 601]


def test_a_slot_that_is_filled_again_has_the_numbers_of_an_empty_one(runner):
    tokens = tuple(5 + i * 7 % 180 for i in range(700))
    fresh = fill(runner, 3, tokens)
    fill(runner, 4, tuple(reversed(tokens)) * 3)
    assert fill(runner, 4, tokens[50:], 50, (CopyPrefix(3, 4, 50),)).tobytes() == fresh.tobytes()
    assert fill(runner, 4, tokens, 0, (Truncate(4, 0),)).tobytes() == fresh.tobytes()

"""Tests of the padding of decode passes to a fixed shape."""

import random

from afterword.engine.core.forward_batch import BatchEntry, Truncate
from afterword.engine.llama.fixed_shape import pad_to_fixed_shape


def test_unused_slots_get_a_token_that_is_truncated():
    padded = pad_to_fixed_shape((BatchEntry(2, 7, (42,), 1),), [5, 0, 7, 64])
    assert padded.entries == (
        BatchEntry(0, 5, (0,), 1),
        BatchEntry(1, 0, (0,), 1),
        BatchEntry(2, 7, (42,), 1),
        BatchEntry(3, 64, (0,), 1),
    )
    assert padded.truncations == (Truncate(0, 5), Truncate(1, 0), Truncate(3, 64))
    assert padded.wanted == (2,)


def test_a_chunk_of_a_prompt_is_unchanged():
    entries = (BatchEntry(1, 0, (1, 2, 3), 2),)
    padded = pad_to_fixed_shape(entries, [0, 0, 64])
    assert (padded.entries, padded.truncations, padded.wanted) == (entries, (), (0, 1))


def test_only_requested_logits_rows_are_returned():
    assert pad_to_fixed_shape((BatchEntry(0, 3, (1,), 0),), [3, 64]).wanted == ()


def test_every_decode_batch_has_the_same_shape():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [*(rng.randrange(60) for _ in range(8)), 64]
        entries = tuple(BatchEntry(slot, lengths[slot], (slot + 1,), 1) for slot in range(8) if rng.random() < 0.5)
        padded = pad_to_fixed_shape(entries, lengths)
        assert [(entry.slot, entry.position, len(entry.tokens), entry.outputs) for entry in padded.entries] == [
            (slot, length, 1, 1) for slot, length in enumerate(lengths)
        ]
        assert [padded.entries[index] for index in padded.wanted] == list(entries)
        assert {cut.slot for cut in padded.truncations} == set(range(9)) - {entry.slot for entry in entries}

"""Passes of single tokens that always have the same shape."""

import random

from afterword.engine.core.forward_batch import BatchEntry, Truncate
from afterword.engine.llama.fixed_shape import pad_to_fixed_shape


def test_slots_that_nobody_needs_get_a_token_that_is_forgotten():
    filled = pad_to_fixed_shape((BatchEntry(2, 7, (42,), 1),), [5, 0, 7, 64])
    assert filled.entries == (
        BatchEntry(0, 5, (0,), 1),
        BatchEntry(1, 0, (0,), 1),
        BatchEntry(2, 7, (42,), 1),
        BatchEntry(3, 64, (0,), 1),
    )
    assert filled.truncations == (Truncate(0, 5), Truncate(1, 0), Truncate(3, 64))
    assert filled.wanted == (2,)


def test_a_piece_of_a_prompt_stays_as_it_is():
    rows = (BatchEntry(1, 0, (1, 2, 3), 2),)
    filled = pad_to_fixed_shape(rows, [0, 0, 64])
    assert (filled.entries, filled.truncations, filled.wanted) == (rows, (), (0, 1))


def test_a_row_of_logits_that_was_not_asked_for_is_not_given():
    assert pad_to_fixed_shape((BatchEntry(0, 3, (1,), 0),), [3, 64]).wanted == ()


def test_every_crowd_has_the_same_shape():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [*(rng.randrange(60) for _ in range(8)), 64]
        rows = tuple(BatchEntry(slot, lengths[slot], (slot + 1,), 1) for slot in range(8) if rng.random() < 0.5)
        filled = pad_to_fixed_shape(rows, lengths)
        assert [(row.slot, row.position, len(row.tokens), row.outputs) for row in filled.entries] == [
            (slot, length, 1, 1) for slot, length in enumerate(lengths)
        ]
        assert [filled.entries[index] for index in filled.wanted] == list(rows)
        assert {cut.slot for cut in filled.truncations} == set(range(9)) - {row.slot for row in rows}

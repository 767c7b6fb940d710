"""Company for rows that would be computed alone."""

import random

from afterword.engine.core.batch import Cut, Row
from afterword.engine.llama.pairs import pair


def test_a_lone_token_gets_another_after_it_which_is_forgotten():
    paired = pair((Row(3, 7, (42,), 1),))
    assert paired.rows == (Row(3, 7, (42, 42), 2),)
    assert paired.forget == (Cut(3, 8),)
    assert paired.wanted == (0,)


def test_a_lone_row_of_logits_gets_the_one_before_it():
    paired = pair((Row(0, 0, (1, 2, 3), 1),))
    assert paired.rows == (Row(0, 0, (1, 2, 3), 2),)
    assert paired.forget == ()
    assert paired.wanted == (1,)


def test_what_is_in_company_stays_as_it_is():
    for rows in [
        (Row(0, 0, (1, 2, 3), 3),),
        (Row(0, 0, (1, 2, 3), 0),),
        (Row(0, 5, (1,), 1), Row(1, 9, (2,), 1)),
    ]:
        paired = pair(rows)
        assert paired.rows == rows
        assert paired.forget == ()
        assert paired.wanted == tuple(range(sum(row.outputs for row in rows)))


def test_in_any_crowd_nobody_is_alone_and_every_row_of_logits_is_found():
    rng = random.Random(0)
    for _ in range(500):
        rows = tuple(Row(slot, slot + 10, (slot,), 1) for slot in range(12) if rng.random() < 0.4)
        paired = pair(rows)
        kept = [(row.slot, row.position) for row in paired.rows for _ in range(row.outputs)]
        assert [kept[index] for index in paired.wanted] == [(row.slot, row.position) for row in rows]
        slots = {row.slot for row in rows}
        assert all(len(row.tokens) == 2 or slots & {row.slot - 1, row.slot + 1} for row in paired.rows)
        assert {cut.slot for cut in paired.forget} == {row.slot for row in paired.rows if len(row.tokens) == 2}

"""Tests of the order in which samples are handed to vLLM."""

from __future__ import annotations

from afterword.engine.vllm.turns import Turns


def taken(turns: Turns) -> list[tuple[int, int]]:
    """All samples that may run now."""
    found = []
    while (pair := turns.take()) is not None:
        found.append(pair)
    return found


def test_at_most_the_number_of_sequences_runs():
    turns = Turns(3)
    turns.add("a", 1, [0, 1, 2, 3])
    assert taken(turns) == [(1, 0), (1, 1), (1, 2)]
    assert (turns.running, turns.waiting) == (3, 1)
    turns.release("a")
    assert taken(turns) == [(1, 3)]
    assert (turns.running, turns.waiting) == (3, 0)


def test_a_client_that_arrives_late_gets_the_next_free_sequence():
    turns = Turns(2)
    for job_id in range(5):
        turns.add("busy", job_id, [0])
    assert taken(turns) == [(0, 0), (1, 0)]
    turns.add("late", 9, [0])
    turns.release("busy")
    assert taken(turns) == [(9, 0)]


def test_clients_with_many_samples_take_turns():
    turns = Turns(4)
    turns.add("a", 1, list(range(8)))
    turns.add("b", 2, list(range(8)))
    assert sorted(job_id for job_id, _ in taken(turns)) == [1, 1, 2, 2]


def test_batch_lines_leave_half_of_the_sequences_to_waiting_requests():
    turns = Turns(4)
    for job_id in range(8):
        turns.add(f"key{job_id} batch", job_id, [0])
    for job_id in range(10, 13):
        turns.add("key", job_id, [0])
    assert sum(job_id >= 10 for job_id, _ in taken(turns)) >= 2


def test_removed_samples_are_not_taken():
    turns = Turns(4)
    turns.add("a", 1, [0, 1])
    turns.add("a", 2, [0])
    assert turns.remove("a", 1) == [0, 1]
    assert turns.remove("a", 1) == []
    assert turns.remove("unknown", 1) == []
    assert taken(turns) == [(2, 0)]


def test_a_discarded_sample_is_not_taken_and_the_others_keep_their_place():
    turns = Turns(4)
    turns.add("a", 1, [0, 1, 2])
    turns.add("a", 2, [0])
    turns.discard("a", 1, 1)
    turns.discard("a", 1, 7)
    turns.discard("a", 9, 0)
    turns.discard("unknown", 1, 0)
    assert turns.waiting == 3
    assert taken(turns) == [(1, 0), (1, 2), (2, 0)]


def test_a_job_whose_samples_are_all_discarded_waits_no_longer():
    turns = Turns(4)
    turns.add("a", 1, [0])
    turns.discard("a", 1, 0)
    assert taken(turns) == []
    assert turns.waiting == 0


def test_samples_of_a_client_are_in_order_of_arrival():
    turns = Turns(1)
    turns.add("a", 5, [0])
    turns.add("a", 3, [0, 1])
    order = []
    while (pair := turns.take()) is not None:
        order.append(pair)
        turns.release("a")
    assert order == [(5, 0), (3, 0), (3, 1)]

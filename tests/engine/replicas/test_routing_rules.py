"""Tests of the rules by which jobs are given to replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterword.engine.replicas.routing import (
    BLOCK,
    MOST_BLOCKS,
    MOST_KNOWN,
    LeastLoaded,
    PrefixFirst,
    RoundRobin,
    block_keys,
)

IDLE = {"a": 0, "b": 0, "c": 0}


def test_prompts_have_the_same_keys_up_to_the_last_whole_block_that_they_share():
    prompt = list(range(3 * BLOCK + 5))
    keys = block_keys("", prompt)
    assert len(keys) == 3
    assert block_keys("", prompt[: 2 * BLOCK + 1]) == keys[:2]
    changed = [*prompt[:BLOCK], -1, *prompt[BLOCK + 1 :]]
    assert [a == b for a, b in zip(keys, block_keys("", changed), strict=True)] == [True, False, False]
    assert not set(keys) & set(block_keys("another key's namespace", prompt)), "namespaces share no cache"
    assert block_keys("", prompt[: BLOCK - 1]) == []
    assert len(block_keys("", [1] * (BLOCK * MOST_BLOCKS + BLOCK))) == MOST_BLOCKS


def test_a_prefix_goes_where_its_longest_part_was():
    rule = PrefixFirst[str]()
    assert [rule.choose(keys, IDLE) for keys in (["x", "x1"], ["y", "y1"], ["x", "x2"])] == ["a", "b", "a"]
    rule = PrefixFirst[str]()
    assert rule.choose(["x", "x1"], IDLE) == "a"
    assert rule.choose(["x", "x2"], {"a": 9, "b": 0, "c": 0}) == "b", "the replica with the prefix has too much work"
    assert rule.choose(["x", "x1", "new 1"], IDLE) == "a", "the longer part decides"
    assert rule.choose(["x", "x2", "new 2"], IDLE) == "b"


def test_of_the_replicas_with_a_prefix_the_least_loaded_is_chosen_and_equal_ones_in_turn():
    rule = PrefixFirst[str]()
    for busy in ({"a": 0, "b": 9, "c": 9}, {"a": 9, "b": 0, "c": 9}):
        rule.choose(["x"], busy)
    assert rule.choose(["x"], {"a": 3, "b": 2, "c": 3}) == "b"
    assert [rule.choose(["x"], {"a": 3, "b": 3, "c": 3}) for _ in range(4)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("bound", [1.25, 2.0])
@given(prompts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=60))
def test_no_replica_has_more_than_the_bound_allows(bound, prompts):
    """Unless a replica is the least loaded one, its load is below the bound when it gets a job."""
    rule, loads = PrefixFirst[int](bound), {0: 0, 1: 0, 2: 0}
    for first, second in prompts:
        before = dict(loads)
        chosen = rule.choose([(first,), (first, second)], loads)
        assert before[chosen] < bound * (sum(before.values()) + 1) / 3 or before[chosen] == min(before.values())
        loads[chosen] += 1


@given(st.lists(st.tuples(st.integers(0, 3), st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), min_size=1))))
def test_the_same_jobs_and_loads_give_the_same_choices(work):
    def run() -> list[str]:
        rule = PrefixFirst[str]()
        return [rule.choose([key], loads) for key, loads in work]

    found = run()
    assert found == run()
    assert all(chosen in loads for chosen, (_, loads) in zip(found, work, strict=True))


def test_what_is_remembered_is_bounded_and_a_beginning_is_forgotten_after_what_follows_it():
    rule = PrefixFirst[int](most_keys=4)
    for prompt in range(10):
        rule.choose([f"{prompt}", f"{prompt} end", f"{prompt} own"], {0: 0})
    assert len(rule) == 4
    rule = PrefixFirst[int](most_keys=3)
    rule.choose(["x", "x end"], {0: 0, 1: 9})
    rule.choose(["y", "y end"], {0: 9, 1: 0})
    assert rule.choose(["x"], {0: 1, 1: 1}) == 0
    rule = PrefixFirst[int]()
    for number in range(2 * MOST_KNOWN):
        rule.choose(["x"], {number: 0})
    assert rule.choose(["x"], {0: 0, 2 * MOST_KNOWN - 1: 0}) == 2 * MOST_KNOWN - 1, "the first was forgotten"


def test_a_replica_that_has_ended_is_forgotten():
    rule = PrefixFirst[str]()
    assert rule.choose(["x"], IDLE) == "a"
    rule.forget("a")
    assert len(rule) == 0


def test_round_robin_ignores_loads_and_the_least_loaded_rule_does_not():
    loads = {"a": 5, "b": 0, "c": 5}
    robin, least = RoundRobin[str](), LeastLoaded[str]()
    assert [robin.choose([], loads) for _ in range(4)] == ["a", "b", "c", "a"]
    assert [least.choose([], loads) for _ in range(3)] == ["b", "b", "b"]
    assert [least.choose([], IDLE) for _ in range(3)] == ["a", "c", "b"], "equal ones in turn: b was the last"
    robin.forget("b")
    assert robin.choose([], loads) == "b", "as if it were new"

"""Tests of the simulation of many replicas: its invariants, and cases that can be computed by hand."""

from __future__ import annotations

import asyncio
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.replicas.routing import PrefixFirst
from bench import replicas
from bench.cluster.__main__ import main
from bench.cluster.replay import SHAPE, replayed
from bench.cluster.replica import PrefixCache, Rates, SlotCache
from bench.cluster.routing import ROUTERS, router
from bench.cluster.simulation import simulate, summary
from bench.cluster.trace import Part, Request, Shape, make_trace, percentile

SMALL = Shape(rate=4.0, requests=60, prefixes=6)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_every_request_is_served_once_and_not_before_it_can_be(name, replicas):
    trace, rates = make_trace(SMALL, replicas, 3), Rates(slots=4, cache=6000)
    served = simulate(trace, replicas, rates, ROUTERS[name]())
    assert Counter(each.request for each in served) == Counter(trace)
    for each in served:
        uncached = max(1, each.request.prompt - each.cached)
        assert 0 <= each.cached < each.request.prompt
        assert each.first_token >= uncached / rates.prefill - 1e-6
        assert each.end >= each.first_token + each.request.output * (rates.step + rates.step_each) - 1e-6
        assert 0 <= each.replica < replicas


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_seed_gives_the_same_figures_and_another_seed_others(name):
    def run(seed: int) -> list[object]:
        return list(simulate(make_trace(SMALL, 4, seed), 4, Rates(), ROUTERS[name]()))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_with_one_replica_all_ways_of_routing_are_the_same():
    trace = make_trace(SMALL, 1, 1)
    runs = [simulate(trace, 1, Rates(), make_router()) for make_router in ROUTERS.values()]
    assert runs[0] == runs[1] == runs[2]


def test_one_request_takes_the_time_that_the_rates_say():
    request = Request(1.0, (Part(1, 600), Part(2, 200)), 10)
    rates = Rates(prefill=1000.0, step=0.1, step_each=0.01)
    (served,) = simulate([request], 1, rates, ROUTERS["least loaded"]())
    assert (served.first_token, served.end) == (pytest.approx(0.8), pytest.approx(0.8 + 10 * 0.11))


def test_a_prompt_and_a_decoding_sequence_share_the_time():
    """The first request decodes alone for 1 s, and with half of the time while the second is prefilled for 2 s."""
    rates = Rates(prefill=1000.0, step=0.1, step_each=0.0)
    first, second = Request(0.0, (Part(1, 1000),), 100), Request(2.0, (Part(2, 1000),), 1)
    ends = {each.request: each for each in simulate([first, second], 1, rates, ROUTERS["least loaded"]())}
    assert ends[second].first_token == pytest.approx(2.0)
    assert ends[first].end == pytest.approx(1.0 + 10.0 + 1.0)


def test_a_request_without_a_slot_waits_for_the_one_before_it():
    rates = Rates(slots=1, prefill=1000.0, step=0.1, step_each=0.0)
    first, second = Request(0.0, (Part(1, 1000),), 10), Request(0.5, (Part(2, 1000),), 10)
    served = simulate([first, second], 1, rates, ROUTERS["least loaded"]())
    assert [each.end for each in served] == [pytest.approx(2.0), pytest.approx(3.5)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60), st.integers(10, 120))
@settings(max_examples=60)
def test_a_cache_holds_no_more_than_it_may_and_reports_only_what_it_has_seen(uses, capacity):
    cache, seen = PrefixCache(capacity), set()
    for first, second in uses:
        parts = (Part(first, 10), Part(10 + first * 5 + second, 7))
        cached = cache.use(Request(0.0, parts, 1))
        assert cached in (0, 10, 17)
        assert cached == 0 or parts[0].node in seen
        assert cached < 17 or parts[1].node in seen
        assert cache.held <= capacity
        seen.update(part.node for part in parts)


def test_the_least_recently_used_prefix_is_evicted_first():
    cache = PrefixCache(20)
    one, two, three = (Request(0.0, (Part(node, 10),), 1) for node in (1, 2, 3))
    cache.use(one), cache.use(two), cache.use(one), cache.use(three)
    assert (cache.use(one), cache.use(two)) == (10, 0)


def test_replicas_with_equal_load_get_requests_in_turn():
    choose, request = ROUTERS["least loaded"](), Request(0.0, (Part(1, 1),), 1)
    assert [choose(request, {0: 2, 1: 2, 2: 2}) for _ in range(4)] == [0, 1, 2, 0]
    assert choose(request, {0: 3, 1: 1, 2: 2}) == 1


def test_a_prefix_is_sent_where_it_was_unless_that_replica_has_too_much_work():
    choose = router(PrefixFirst(bound=2.0))

    def request(*nodes: int) -> Request:
        return Request(0.0, tuple(Part(node, 10) for node in nodes), 1)

    home = choose(request(1, 11, 100), dict.fromkeys(range(4), 0))
    busy = dict.fromkeys(range(4), 1)
    busy[home] = 2
    assert choose(request(1, 11, 101), busy) == home
    busy[home] = 50
    assert choose(request(1, 11, 102), busy) != home
    assert choose(request(2, 12, 103), {0: 5, 1: 5, 2: 1, 3: 5}) == 2, (
        "a prefix that no replica has goes to the least loaded"
    )


def test_prefix_routing_finds_more_in_the_caches_than_taking_turns():
    shape, rates = Shape(rate=1.0, requests=100, prefixes=12), Rates(cache=20_000)
    trace = make_trace(shape, 8, 1)
    shares = {name: summary(name, 8, simulate(trace, 8, rates, make())).cached_share for name, make in ROUTERS.items()}
    assert shares["prefix first"] > 1.3 * shares["round robin"]


def test_a_cache_for_everything_misses_each_prefix_once_a_replica():
    trace = make_trace(SMALL, 1, 1)
    served = simulate(trace, 1, Rates(cache=10**9), ROUTERS["least loaded"]())
    distinct = {part.node: part.tokens for request in trace for part in request.parts}
    assert sum(each.cached for each in served) == sum(each.prompt for each in trace) - sum(distinct.values())


def test_percentiles_are_values_of_the_sample():
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.5, 0.99, 0.01)] == [2.0, 3.0, 1.0]


def test_the_command_prints_a_table_with_its_assumptions_and_draws_a_picture(tmp_path, capsys):
    file = tmp_path / "routing.svg"
    assert main(["--replicas", "1", "2", "--requests", "20", "--picture", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 2 * len(ROUTERS)
    assert "Assumed:" in printed
    lines = list(ET.fromstring(file.read_text()).iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2 * len(ROUTERS)


def test_the_cost_of_a_token_is_the_median_of_rounds_and_the_front_is_all_but_the_workers():
    rounds = [{"server": 1.0, "worker": 2.0}, {"server": 3.0, "worker": 2.0}, {"server": 2.0, "worker": 5.0}]
    assert replicas.report(rounds) == [
        "server: 2.000 ms (1.000 to 3.000)",
        "worker: 2.000 ms (2.000 to 5.000)",
        "front: 2.000 ms (1.000 to 3.000)",
        "all: 5.000 ms (3.000 to 7.000)",
    ]


def test_the_cost_of_a_token_is_measured_on_our_server(capsys):
    server = [sys.executable, "-m", "afterword", "serve", "--port", "0", "--parallel", "8"]
    replicas.main(["--rounds", "1", "--pause", "0", *server])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["server", "worker", "front", "all"]


def question(prefix: int, own: int, tokens: int) -> Request:
    return Request(0.0, (Part(prefix, 100), Part(own, tokens)), 5)


def test_a_short_question_continues_in_the_slot_of_its_prefix_and_a_long_one_takes_another():
    cache = SlotCache(2)

    def ask(*wanted: Request) -> list[int]:
        found = []
        for request in wanted:
            found.append(cache.use(request))
            cache.end(request)
        return found

    assert ask(question(1, 101, 5), question(2, 102, 5), question(1, 103, 5), question(2, 104, 5)) == [0, 0, 100, 100]
    assert ask(question(1, 105, 50), question(1, 106, 50)) == [100, 100]
    assert ask(question(2, 107, 5)) == [0], "the copy of the first prefix took its slot"


def test_a_busy_slot_is_copied_and_not_taken():
    cache = SlotCache(2)
    first, second = question(1, 101, 5), question(1, 102, 5)
    assert (cache.use(first), cache.use(second)) == (0, 100)
    cache.end(first), cache.end(second)
    assert cache.use(question(2, 103, 5)) == 0


def test_a_trace_is_replayed_on_our_server_and_its_cached_tokens_are_those_of_the_simulated_slots():
    """One replica, one request after the other: nothing depends on times."""
    server = [sys.executable, "-m", "afterword", "serve", "--port", "0", "--parallel", "2"]
    with replicas.started(server) as (url, _):
        trace = [replace(each, arrival=0.0) for each in make_trace(replace(SHAPE, requests=12, prefixes=3), 1, 1)]
        served = [served for each in trace for served in asyncio.run(replayed(url, [each]))]
    cache = SlotCache(2)
    for each in served:
        assert each.cached == cache.use(each.request)
        cache.end(each.request)
        assert 0 < each.first_token <= each.end

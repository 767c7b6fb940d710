"""Traces: when requests arrive, which prefixes their prompts share, and how long prompts and answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a prompt. Prompts with the same `node` have the same text up to the end of this part."""

    node: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `arrival`: seconds from the start. `parts`: the prompt from its beginning; the last is its own."""

    arrival: float
    parts: tuple[Part, ...]
    output: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(part.tokens for part in self.parts)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a trace is made of. Lengths are in tokens and vary by half; `rate` is in requests a second and replica.

    The tree has `prefixes` first parts for each replica. Each has `branches` second parts, such as a user's chat.
    `skew` is the exponent of Zipf's law by which first parts are chosen; 0 chooses all equally often.
    """

    rate: float = 2.0
    requests: int = 200
    prefixes: int = 25
    branches: int = 4
    prefix: int = 1000
    branch: int = 300
    own: int = 100
    output: int = 100
    skew: float = 0.8


def make_trace(shape: Shape, replicas: int, seed: int) -> list[Request]:
    """The requests for that many replicas, in the order of their arrival, which is a Poisson process."""
    draw = Random(f"{seed} {replicas}")
    firsts = shape.prefixes * replicas
    weights = list(accumulate((rank + 1) ** -shape.skew for rank in range(firsts)))
    prefix_lengths = [_length(draw, shape.prefix) for _ in range(firsts)]
    branch_lengths = [_length(draw, shape.branch) for _ in range(firsts * shape.branches)]
    now, found = 0.0, []
    for index in range(shape.requests * replicas):
        now += draw.expovariate(shape.rate * replicas)
        (first,) = draw.choices(range(firsts), cum_weights=weights)
        second = first * shape.branches + draw.randrange(shape.branches)
        parts = (
            Part(first, prefix_lengths[first]),
            Part(firsts + second, branch_lengths[second]),
            Part(firsts * (1 + shape.branches) + index, _length(draw, shape.own)),
        )
        found.append(Request(now, parts, _length(draw, shape.output)))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _length(draw: Random, middle: int) -> int:
    return draw.randint(max(1, middle // 2), max(1, middle * 3 // 2))

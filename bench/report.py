"""Turns the results of all rounds into a table, a JSON document and a picture. Has no side effects.

A ratio states how many times better than the base a target is: above 1 is better, for tokens per second and seconds.
It is the median of the rounds' ratios, because other load on the machine affects both targets of a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log2
from statistics import median
from typing import Any

from bench.scenarios import Measure

Json = dict[str, Any]
Outcome = Mapping[str, float] | str
"""The figures of a round by measure, or the reason why the target does not support the scenario."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of a scenario: for each target the figures of its rounds, or the reason why there are none."""

    scenario: str
    measure: Measure
    results: Mapping[str, tuple[float, ...] | str]

    def middle(self, target: str) -> float | None:
        """The median of a target's rounds."""
        values = self.results[target]
        return None if isinstance(values, str) else median(values)

    def ratios(self, target: str, base: str) -> tuple[float, ...]:
        """How many times better a target was than the base, round by round."""
        ours, theirs = self.results[target], self.results[base]
        if isinstance(ours, str) or isinstance(theirs, str):
            return ()
        pairs = zip(ours, theirs, strict=True) if self.measure.more_is_better else zip(theirs, ours, strict=True)
        return tuple(more / less if less > 0 else float("inf") for more, less in pairs)


def rows(scenario: str, measures: Sequence[Measure], rounds: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    """The rows of a scenario. If one round of a target failed, the reason is the target's result."""
    found = []
    for measure in measures:
        results: dict[str, tuple[float, ...] | str] = {}
        for target, outcomes in rounds.items():
            reason = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
            numbers = [outcome[measure.name] for outcome in outcomes if not isinstance(outcome, str)]
            results[target] = tuple(numbers) if reason is None else reason
        found.append(Row(scenario, measure, results))
    return found


def table(found: Sequence[Row], targets: Sequence[str], base: str) -> str:
    """A Markdown table of medians, and of ratios to the base with their range, with aligned columns."""
    others = [target for target in targets if target != base]
    head = ["scenario", "measure", *(f"{target}" for target in targets), *(f"{target} / {base}" for target in others)]
    body = [
        [
            row.scenario,
            f"{row.measure.name}, {row.measure.unit}",
            *(_figure(row.middle(target)) for target in targets),
            *(_spread(row.ratios(target, base)) for target in others),
        ]
        for row in found
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    ruled = [head, ["-" * width for width in widths], *body]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    ]
    return "\n".join([*lines, *_reasons(found)])


def document(found: Sequence[Row], base: str, about: Json) -> Json:
    """All results as JSON values."""
    results = [
        {
            "scenario": row.scenario,
            "measure": row.measure.name,
            "unit": row.measure.unit,
            "more_is_better": row.measure.more_is_better,
            "rounds": {name: list(values) for name, values in row.results.items() if not isinstance(values, str)},
            "median": {name: row.middle(name) for name in row.results},
            "times_better": {name: _middle(row.ratios(name, base)) for name in row.results if name != base},
            "not_possible": {name: reason for name, reason in row.results.items() if isinstance(reason, str)},
        }
        for row in found
    ]
    return {**about, "base": base, "results": results}


def picture(found: Sequence[Row], targets: Sequence[str], base: str, title: str) -> str:
    """An SVG of the ratios on a logarithmic scale: bars to the right are better than the base, to the left worse."""
    others = [target for target in targets if target != base]
    bars = [(row, target, _middle(row.ratios(target, base))) for row in found for target in others]
    reach = max([1.0, *(abs(log2(ratio)) for _, _, ratio in bars if ratio)])
    unit, middle, top = 200 / reach, 480, 56
    shades = ("#3465a4", "#c17d11", "#4e9a06", "#75507b")
    parts = [_text(20, 26, title, 15), _text(middle, 46, f"1 × {base}", 11, "middle")]
    for index, (row, target, ratio) in enumerate(bars):
        y = top + index * 22
        parts.append(_text(260, y + 14, f"{row.scenario}: {row.measure.name}, {target}", 12, "end"))
        if ratio is None:
            parts.append(_text(middle + 6, y + 14, "not possible", 11))
            continue
        length = log2(ratio) * unit
        x, width = middle + min(length, 0), max(abs(length), 1)
        shade = shades[others.index(target) % len(shades)]
        parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="14" fill="{shade}"/>')
        parts.append(_text(middle + max(length, 0) + 6, y + 14, f"{ratio:.2f}", 11))
    bottom = top + len(bars) * 22 + 8
    parts.append(f'<path d="M{middle} {top - 4}V{bottom - 8}" stroke="#555"/>')
    size = f'width="760" height="{bottom + 12}" viewBox="0 0 760 {bottom + 12}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{ground}{"".join(parts)}</svg>\n'


def _reasons(found: Sequence[Row]) -> Iterator[str]:
    reasons = {
        f"{row.scenario}, {name}: not possible: {result}"
        for row in found
        for name, result in row.results.items()
        if isinstance(result, str)
    }
    yield from (f"\n{line}" if index == 0 else line for index, line in enumerate(sorted(reasons)))


def _middle(ratios: Sequence[float]) -> float | None:
    return median(ratios) if ratios else None


def _figure(value: float | None) -> str:
    if value is None:
        return "not possible"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'

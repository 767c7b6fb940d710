"""A table and a picture of simulated runs. Has no side effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import log2

from bench.cluster.simulation import Summary

_SHADES = ("#3465a4", "#c17d11", "#4e9a06", "#75507b")
_WIDTH, _HEIGHT, _LEFT, _TOP = 260, 170, 60, 66  # of one panel in pixels


def table(found: Sequence[Summary]) -> str:
    """A Markdown table."""
    lines = [
        "| replicas | routing | cached share | first token, 50 % | 99 % | end, 50 % | 99 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        times = " | ".join(f"{seconds:.2f} s" for seconds in (*each.first_token, *each.end))
        lines.append(f"| {each.replicas} | {each.router} | {each.cached_share:.3f} | {times} |")
    return "\n".join(lines)


def picture(found: Sequence[Summary], title: str) -> str:
    """An SVG with two panels over the number of replicas: the cached share, and the slowest first tokens."""
    panels: list[tuple[str, Callable[[Summary], float]]] = [
        ("cached share of prompt tokens", lambda each: each.cached_share),
        ("first token, 99th percentile, seconds", lambda each: each.first_token[1]),
    ]
    parts = [_text(20, 24, title, 14)]
    routers = list(dict.fromkeys(each.router for each in found))
    for index, router in enumerate(routers):
        x = 20 + 150 * index
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{_SHADES[index % len(_SHADES)]}"/>')
        parts.append(_text(x + 18, 44, router, 12))
    for index, (name, value) in enumerate(panels):
        parts += _panel(found, routers, name, value, _LEFT + index * (_WIDTH + 90))
    size = 'width="720" height="300" viewBox="0 0 720 300"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{ground}{"".join(parts)}</svg>\n'


def _panel(
    found: Sequence[Summary], routers: Sequence[str], name: str, value: Callable[[Summary], float], left: float
) -> list[str]:
    sizes = sorted({each.replicas for each in found})
    most = max(value(each) for each in found) or 1.0
    span = max(log2(sizes[-1] / sizes[0]), 1.0)
    bottom = _TOP + _HEIGHT + 20

    def place(each: Summary) -> tuple[float, float]:
        return left + _WIDTH * log2(each.replicas / sizes[0]) / span, bottom - _HEIGHT * value(each) / most

    parts = [
        f'<path d="M{left} {_TOP + 20}V{bottom}H{left + _WIDTH}" stroke="#555" fill="none"/>',
        _text(left - 6, bottom, "0", 11, "end"),
        _text(left - 6, bottom - _HEIGHT + 4, f"{most:.2f}", 11, "end"),
        _text(left, bottom + 34, name, 12),
    ]
    parts += [
        _text(left + _WIDTH * log2(size / sizes[0]) / span, bottom + 16, str(size), 11, "middle") for size in sizes
    ]
    for index, router in enumerate(routers):
        shade = _SHADES[index % len(_SHADES)]
        points = [place(each) for each in found if each.router == router]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{shade}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{shade}"/>' for x, y in points]
    return parts


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'

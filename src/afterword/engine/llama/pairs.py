"""No token is computed alone: for unquantized weights, kernels of one row sum in another order than those of several.

llama.cpp computes slots that follow each other in one product. A row that has no such neighbour gets company: a token
after it that is forgotten again or, where it has several tokens, one more row of logits. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from afterword.engine.core.batch import Cut, Row


@dataclass(frozen=True, slots=True)
class Paired:
    """Rows to compute instead, what to forget afterwards, and which of their rows of logits were asked for."""

    rows: tuple[Row, ...]
    forget: tuple[Cut, ...]
    wanted: tuple[int, ...]


def pair(rows: tuple[Row, ...]) -> Paired:
    """The same rows, none of them alone."""
    slots = {row.slot for row in rows}
    paired: list[Row] = []
    forget: list[Cut] = []
    wanted: list[int] = []
    outputs = 0
    for row in rows:
        alone = not slots & {row.slot - 1, row.slot + 1}
        company = _with_company(row) if alone else row
        first = outputs
        if company.tokens != row.tokens:
            forget.append(Cut(row.slot, row.position + 1))
        else:
            first += company.outputs - row.outputs
        wanted += range(first, first + row.outputs)
        paired.append(company)
        outputs += company.outputs
    return Paired(tuple(paired), tuple(forget), tuple(wanted))


def _with_company(row: Row) -> Row:
    if len(row.tokens) == 1:
        return replace(row, tokens=row.tokens * 2, outputs=row.outputs * 2)
    return replace(row, outputs=2) if row.outputs == 1 else row

"""How many sequences of how many tokens a model gets: the most that fits, or a refusal saying what to lower.

The choice is arithmetic on Facts and a number of bytes; nothing here looks at the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afterword.errors import SettingError
from afterword.models.gguf import Facts

MOST_CONTEXT, LEAST_CONTEXT, UNKNOWN_CONTEXT = 4096, 512, 2048  # tokens, where the context is ours to choose
MOST_PARALLEL = 16  # sequences, where their number is ours to choose
LEAST_USEFUL_CONTEXT, PARALLEL_LIMIT = 16, 256  # what may be asked for
GRANULE = 256  # tokens, to which llama.cpp rounds up what a sequence has room for
HEADROOM = 256 << 20  # bytes for the process itself and its compute buffers, beside a tenth of the rest


@dataclass(frozen=True, slots=True)
class Shape:
    """`parallel` sequences of `context` tokens each, and the bytes that the weights and a token take.

    Room for `spare` more sequences, and for as many more tokens in each, is taken that nobody is given.
    """

    context: int
    parallel: int
    weights_bytes: int
    token_bytes: int
    spare: int = 0

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences."""
        granules = -(-(self.context + self.spare) // GRANULE)
        return granules * GRANULE * (self.parallel + self.spare) * self.token_bytes

    @property
    def needed_bytes(self) -> int:
        """Weights, key-value cache and headroom."""
        total = self.weights_bytes + self.kv_bytes
        return total + total // 10 + HEADROOM


def choose_shapes(
    models: Sequence[tuple[Facts, int]], available_bytes: int, context: int | None, parallel: int | None, spare: int = 0
) -> list[Shape]:
    """For models that are loaded together the shapes asked for, or for what is None the largest usual ones that fit.

    Each comes with `kv_bytes`, the size of one element of a key or a value. The largest gives way first. Raises
    `SettingError` if none fit.
    """
    for facts, _ in models:
        _check_settings(facts, context, parallel, PARALLEL_LIMIT - spare)
    shapes = [
        _shape(facts, context or usual_context(facts), parallel or MOST_PARALLEL - spare, spare, size)
        for facts, size in models
    ]
    while sum(shape.needed_bytes for shape in shapes) > available_bytes:
        smaller = {place: _smaller(shape, context, parallel) for place, shape in enumerate(shapes)}
        places = [place for place, shape in smaller.items() if shape is not None]
        if not places:
            raise SettingError(_do_not_fit(shapes, available_bytes))
        place = max(places, key=lambda place: shapes[place].kv_bytes)
        shapes[place] = smaller[place] or shapes[place]
    return shapes


def usual_context(facts: Facts) -> int:
    """The tokens of one sequence, where memory sets no bounds."""
    return min(facts.context_length, MOST_CONTEXT) if facts.context_length else UNKNOWN_CONTEXT


def _smaller(shape: Shape, context: int | None, parallel: int | None) -> Shape | None:
    """The next smaller one, where that is ours to choose."""
    if parallel is None and shape.parallel > 1:
        return replace(shape, parallel=shape.parallel // 2)
    if context is None and shape.context > LEAST_CONTEXT:
        return replace(shape, context=max(shape.context // 2, LEAST_CONTEXT))
    return None


def _shape(facts: Facts, context: int, parallel: int, spare: int, kv_bytes: int) -> Shape:
    return Shape(context, parallel, facts.size_bytes, facts.kv_bytes_per_token(kv_bytes), spare)


def _check_settings(facts: Facts, context: int | None, parallel: int | None, most: int) -> None:
    trained = facts.context_length
    if context is not None and context < LEAST_USEFUL_CONTEXT:
        raise SettingError(f"A context of {context} tokens is too short; set {LEAST_USEFUL_CONTEXT} or more.")
    if context is not None and trained and context > trained:
        raise SettingError(
            f"A context of {context} tokens is more than the {trained} that {facts.name} was trained on; "
            f"positions beyond give nonsense, so set {trained} or less."
        )
    if parallel is not None and not 1 <= parallel <= most:
        raise SettingError(f"{parallel} parallel sequences cannot be had; set from 1 to {most}.")


def _do_not_fit(shapes: Sequence[Shape], available: int) -> str:
    if len(shapes) > 1:
        return (
            f"The {len(shapes)} models need {_gib(sum(shape.needed_bytes for shape in shapes))} of memory together, "
            f"and {_gib(available)} are available; choose fewer or smaller ones, or let them take turns with "
            "--keep-alive 5m."
        )
    (shape,) = shapes
    weights = Shape(0, 0, shape.weights_bytes, 0)
    if weights.needed_bytes > available:
        needs = f"The model needs {_gib(weights.needed_bytes)}"
        remedy = "choose a smaller or more quantised one"
    else:
        needs = f"{shape.parallel} x {shape.context} tokens need {_gib(shape.needed_bytes)}"
        remedy = "lower context or parallel" if shape.parallel > 1 else "lower context"
    return f"{needs} of memory, and {_gib(available)} are available; {remedy}."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

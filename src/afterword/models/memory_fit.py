"""How many sequences of how many tokens a model gets: the most that fits, or a refusal saying what to lower.

The choice is arithmetic on Facts and a number of bytes; nothing here looks at the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afterword.errors import SettingError
from afterword.models.gguf_facts import Facts

MOST_CONTEXT, LEAST_CONTEXT, UNKNOWN_CONTEXT = 4096, 512, 2048  # tokens, where the context is ours to choose
MAX_PARALLEL = 16  # sequences, where their number is ours to choose
LEAST_USEFUL_CONTEXT, PARALLEL_LIMIT = 16, 256  # what may be asked for
CONTEXT_GRANULARITY = 256  # tokens, to which llama.cpp rounds up what a sequence has room for
HEADROOM = 256 << 20  # bytes for the process itself, its vocabulary and what it keeps, beside a tenth of the rest
FLOAT_BYTES = 4  # bytes
LOGIT_COPIES = 2  # of each row: llama.cpp computes them in one buffer and hands them over in another


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """How a model is computed, as far as memory depends on it.

    `kv_bytes`: of one element of a key or a value. `chunk`: the most tokens of a pass over a prompt. `plain_attention`:
    attention writes down how much each token of a pass attends to each of the context, instead of going through them.
    """

    kv_bytes: int = 2
    chunk: int = 256
    plain_attention: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`parallel` sequences of `context` tokens each of a model that is computed in some way.

    Room for `spare` more sequences, and for as many more tokens in each, is taken that nobody is given.
    """

    context: int
    parallel: int
    facts: Facts
    run: ComputeOptions = ComputeOptions()
    spare: int = 0

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences."""
        granules = -(-(self.context + self.spare) // CONTEXT_GRANULARITY)
        tokens = granules * CONTEXT_GRANULARITY * (self.parallel + self.spare)
        return tokens * self.facts.kv_bytes_per_token(self.run.kv_bytes)

    @property
    def sequences_bytes(self) -> int:
        """What all sequences have: keys and values, and the states of recurrent layers."""
        return self.kv_bytes + (self.parallel + self.spare) * self.facts.state_bytes

    @property
    def pass_bytes(self) -> int:
        """The largest pass: logits of all its tokens (a scored prompt), and what is between a layer's operations."""
        tokens = max(self.run.chunk, self.parallel + self.spare)
        logits = LOGIT_COPIES * self.facts.vocabulary
        layer = 3 * self.facts.hidden + 8 * self.facts.embedding_length
        attention = self.facts.heads * (self.context + self.spare) if self.run.plain_attention else 0
        return tokens * (logits + layer + attention) * FLOAT_BYTES

    @property
    def needed_bytes(self) -> int:
        """Weights, sequences, a pass and headroom.

        Weights count once: where they are copied, or laid out anew, the file's own pages can be given up at any time.
        """
        return _with_headroom(self.facts.size_bytes + self.sequences_bytes + self.pass_bytes)


def _with_headroom(size: int) -> int:
    return size + size // 10 + HEADROOM


def choose_shapes(
    models: Sequence[tuple[Facts, ComputeOptions]],
    available_bytes: int,
    context: int | None,
    parallel: int | None,
    spare: int = 0,
) -> list[ModelShape]:
    """For models that are loaded together the shapes asked for, or for what is None the largest usual ones that fit.

    The one whose sequences are the largest gives way first. Raises `SettingError` if none fit.
    """
    for facts, _ in models:
        _check_settings(facts, context, parallel, PARALLEL_LIMIT - spare)
    shapes = [
        ModelShape(context or usual_context(facts), parallel or MAX_PARALLEL - spare, facts, run, spare)
        for facts, run in models
    ]
    while sum(shape.needed_bytes for shape in shapes) > available_bytes:
        smaller = {place: _smaller(shape, context, parallel) for place, shape in enumerate(shapes)}
        places = [place for place, shape in smaller.items() if shape is not None]
        if not places:
            raise SettingError(_do_not_fit(shapes, available_bytes))
        place = max(places, key=lambda place: shapes[place].sequences_bytes)
        shapes[place] = smaller[place] or shapes[place]
    return shapes


def usual_context(facts: Facts) -> int:
    """The tokens of one sequence, where memory sets no bounds."""
    return min(facts.context_length, MOST_CONTEXT) if facts.context_length else UNKNOWN_CONTEXT


def _smaller(shape: ModelShape, context: int | None, parallel: int | None) -> ModelShape | None:
    """The next smaller one, where that is ours to choose."""
    if parallel is None and shape.parallel > 1:
        return replace(shape, parallel=shape.parallel // 2)
    if context is None and shape.context > LEAST_CONTEXT:
        return replace(shape, context=max(shape.context // 2, LEAST_CONTEXT))
    return None


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


def _do_not_fit(shapes: Sequence[ModelShape], available: int) -> str:
    if len(shapes) > 1:
        return (
            f"The {len(shapes)} models need {_gib(sum(shape.needed_bytes for shape in shapes))} of memory together, "
            f"and {_gib(available)} are available; choose fewer or smaller ones, or let them take turns with "
            "--keep-alive 5m."
        )
    (shape,) = shapes
    least = _with_headroom(shape.facts.size_bytes)
    if least > available:
        needs = f"The model needs {_gib(least)}"
        remedy = "choose a smaller or more quantised one"
    else:
        needs = f"{shape.parallel} x {shape.context} tokens need {_gib(shape.needed_bytes)}"
        remedy = "lower context or parallel" if shape.parallel > 1 else "lower context"
    return f"{needs} of memory, and {_gib(available)} are available; {remedy}."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

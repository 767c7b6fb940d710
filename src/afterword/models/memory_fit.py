"""Chooses the context length and the number of sequences of models so that they fit into the available memory.

Pure: computes from `Facts` and a number of bytes, and does not query the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afterword.errors import SettingError
from afterword.models.gguf_facts import Facts

LEAST_CONTEXT, UNKNOWN_CONTEXT = 512, 2048  # tokens, if the operator sets no context
MOST_CONTEXT = 4096  # the same, where all sequences take their memory at the start
MAX_PARALLEL = 16  # sequences, if the operator sets no number
PARALLEL_LIMIT = 256  # the most sequences that the operator can set
CONTEXT_GRANULARITY = 256  # llama.cpp rounds the tokens of a sequence up to a multiple of this
HEADROOM = 256 << 20  # bytes for the process, its vocabulary and its caches, besides a tenth of the rest
FLOAT_BYTES = 4
CELL_BYTES = 56  # llama.cpp's records of a cell of the KV cache
MAX_SNAPSHOT_BYTES = 512 << 20  # of copies of recurrent states; more if that is less than one for each sequence
SNAPSHOTS_PER_SEQUENCE = 8
LOGIT_COPIES = 2  # llama.cpp computes logits in one buffer and returns them in another


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """The settings of the computation that change the memory that a model needs.

    - `kv_bytes`: bytes of one element of a key or value.
    - `chunk`: the most tokens of a prefill pass.
    - `plain_attention`: attention stores one score for each token of the pass, token of the context and head. Flash
      attention stores only a mask.
    - `on_demand`: the KV cache takes memory as tokens are written, so sequences share what the machine has.
    - `draft`: a draft model in the same process, with as many sequences of the same length.
    """

    kv_bytes: int = 2
    chunk: int = 256
    plain_attention: bool = False
    on_demand: bool = False
    draft: Facts | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model with `parallel` sequences of `context` tokens each, and its memory.

    `spare`: additional sequences, and additional tokens in each sequence, that are allocated but never used by clients.
    `capacity`: the most tokens of all sequences together; None if every sequence can be full.
    """

    context: int
    parallel: int
    facts: Facts
    options: ComputeOptions = ComputeOptions()
    spare: int = 0
    capacity: int | None = None

    @property
    def cells(self) -> int:
        """The number of cells of the KV cache. Each can hold a token."""
        granules = -(-(self.context + self.spare) // CONTEXT_GRANULARITY)
        return granules * CONTEXT_GRANULARITY * (self.parallel + self.spare)

    @property
    def _models(self) -> list[Facts]:
        return [self.facts, self.options.draft] if self.options.draft else [self.facts]

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights, with those of the draft model."""
        return sum(facts.size_bytes for facts in self._models)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, with those of the draft model."""
        return sum(facts.kv_bytes_per_token(self.options.kv_bytes) for facts in self._models)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all sequences."""
        return (self.cells if self.capacity is None else self.capacity) * self.token_bytes

    @property
    def sequences_bytes(self) -> int:
        """Bytes of all sequences: keys, values, the states of recurrent layers and snapshots of them."""
        records = self.cells * CELL_BYTES * len(self._models) if self.options.on_demand else 0
        return self.kv_bytes + records + (self.parallel + self.spare) * self.facts.state_bytes + self.snapshot_bytes

    @property
    def snapshot_bytes(self) -> int:
        """The most bytes of snapshots of recurrent layers, with which prefixes are shared."""
        each = self.parallel * self.facts.state_bytes
        return max(each, min(SNAPSHOTS_PER_SEQUENCE * each, MAX_SNAPSHOT_BYTES))

    @property
    def pass_bytes(self) -> int:
        """Bytes of the largest pass: logits of all its tokens (if a prompt is scored) and a layer's activations.

        A mask has 4 bytes for each token of the pass and of the context: a float, or two half floats of models with
        sliding windows.
        """
        return sum(map(self._pass_bytes, self._models))

    def _pass_bytes(self, facts: Facts) -> int:
        tokens = max(self.options.chunk, self.parallel + self.spare)
        logits = LOGIT_COPIES * facts.vocabulary
        layer = 3 * facts.hidden + 8 * facts.embedding_length
        scores = facts.heads if self.options.plain_attention else 0
        attention = (scores + 1) * (self.context + self.spare) if facts.kv_heads else 0
        return tokens * (logits + layer + attention) * FLOAT_BYTES

    @property
    def needed_bytes(self) -> int:
        """Bytes of weights, sequences, one pass and headroom.

        Weights count once. If they are copied or repacked, the system can drop the file's pages at any time.
        """
        return _with_headroom(self.weights_bytes + self.sequences_bytes + self.pass_bytes)


def _with_headroom(size: int) -> int:
    return size + size // 10 + HEADROOM


def choose_shapes(
    models: Sequence[tuple[Facts, ComputeOptions]],
    available_bytes: int,
    context: int | None,
    parallel: int | None,
    spare: int = 0,
) -> list[ModelShape]:
    """Choose the shapes of models that are loaded together.

    `context` and `parallel` are the operator's settings; None means the largest usual value that fits. The model that
    needs the most memory for its sequences is reduced first. Unless both are set, all keys and values get at most half
    of the memory: they may stay there as cached prefixes. Raises `SettingError` if the models do not fit.
    """
    for facts, _ in models:
        _check_settings(facts, context, parallel, PARALLEL_LIMIT - spare)
    shapes = [
        ModelShape(context or usual_context(facts, options), parallel or MAX_PARALLEL - spare, facts, options, spare)
        for facts, options in models
    ]
    while sum(shape.needed_bytes for shape in shapes) > available_bytes:
        smaller = {index: _smaller(shape, context, parallel) for index, shape in enumerate(shapes)}
        reducible = [index for index, shape in smaller.items() if shape is not None]
        if not reducible:
            raise SettingError(_do_not_fit(shapes, available_bytes))
        largest = max(reducible, key=lambda index: shapes[index].sequences_bytes)
        shapes[largest] = smaller[largest] or shapes[largest]
    if context is None or parallel is None:
        _leave_half(shapes, available_bytes)
    return shapes


def _leave_half(shapes: list[ModelShape], available_bytes: int) -> None:
    """Lower what sequences that share memory can hold together, but not below one full sequence."""
    while sum(shape.kv_bytes for shape in shapes) > available_bytes // 2:
        smaller = {index: _with_less_capacity(shape) for index, shape in enumerate(shapes)}
        largest = max(smaller, key=lambda index: shapes[index].kv_bytes * (smaller[index] is not None))
        if (shape := smaller[largest]) is None:
            return
        shapes[largest] = shape


def usual_context(facts: Facts, options: ComputeOptions) -> int:
    """The tokens of one sequence if memory is no constraint: the context that the model was trained on.

    It is less where every sequence takes its whole memory at the start, whether it needs it or not.
    """
    if not facts.context_length:
        return UNKNOWN_CONTEXT
    return facts.context_length if options.on_demand else min(facts.context_length, MOST_CONTEXT)


def _smaller(shape: ModelShape, context: int | None, parallel: int | None) -> ModelShape | None:
    """The next smaller shape; None if the operator's settings or the minimum context allow none.

    Where sequences share memory, they get less of it together, but at least one can be full.
    """
    if less := _with_less_capacity(shape):
        return less
    if shape.options.on_demand and context is None and shape.context > LEAST_CONTEXT:
        shorter = max(shape.context // 2, LEAST_CONTEXT)  # in large steps: it is part of the fingerprint
        return replace(shape, context=shorter, capacity=shorter)
    if parallel is None and shape.parallel > 1:
        return replace(shape, parallel=shape.parallel // 2)
    if context is None and shape.context > LEAST_CONTEXT:
        return replace(shape, context=max(shape.context // 2, LEAST_CONTEXT))
    return None


def _with_less_capacity(shape: ModelShape) -> ModelShape | None:
    """The shape with less memory for all sequences together; None if that is one full sequence or cannot be less."""
    capacity = shape.cells if shape.capacity is None else shape.capacity
    if not shape.options.on_demand or capacity <= shape.context or not shape.kv_bytes:
        return None
    return replace(shape, capacity=max(capacity * 7 // 8, shape.context))


def _check_settings(facts: Facts, context: int | None, parallel: int | None, most: int) -> None:
    trained = facts.context_length
    if context is not None and trained and context > trained:
        raise SettingError(
            f"A context of {context} tokens is more than the {trained} tokens that {facts.name} was trained on. "
            f"The model generates nonsense at later positions. Set {trained} or less."
        )
    if parallel is not None and parallel > most:
        raise SettingError(f"{parallel} parallel sequences are not supported. Set a number from 1 to {most}.")


def _do_not_fit(shapes: Sequence[ModelShape], available: int) -> str:
    if len(shapes) > 1:
        return (
            f"The {len(shapes)} models need {_gib(sum(shape.needed_bytes for shape in shapes))} of memory together, "
            f"but {_gib(available)} are available. Choose fewer or smaller models, or let them take turns with "
            "--keep-alive 5m."
        )
    (shape,) = shapes
    least = _with_headroom(shape.weights_bytes)
    if least > available:
        needs = f"The model needs {_gib(least)}"
        remedy = "Choose a smaller or more quantized model"
    else:
        needs = f"{shape.parallel} x {shape.context} tokens need {_gib(shape.needed_bytes)}"
        remedy = "Lower context or parallel" if shape.parallel > 1 else "Lower context"
    return f"{needs} of memory, but {_gib(available)} are available. {remedy}."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

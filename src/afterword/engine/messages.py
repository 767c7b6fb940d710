"""What the server's process and the engine's process say to each other, and how it is framed.

A frame is a length (4 bytes, big-endian) and a msgpack value of a closed set of types: nothing that is read here
can run code. One frame carries a whole forward pass.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from afterword.engine.protocol import Job, Load, ModelInfo, PassStats, Promise, Step, Value

HEADER = struct.Struct(">I")
KvType = Literal["exact", "f16", "f32"]
MAX_FRAME_BYTES = 256 * 2**20
"""The most bytes that a frame may have: a card with a large vocabulary has about 3 million."""


class LoadModel(Value, frozen=True, tag=True):
    """Load this model, for `sequences` of `context` tokens each. `kv_type` is the type of keys and values.

    `path` is the model's file, or the first of its `parts` (none given: it is the only one).

    "exact": a token has the same numbers whether it is read or generated, where the weights' products allow it.
    `chunk` and `grid`: see `core.batch.Runner`; where numbers are exact the grid is 1, whatever is said here. `repack`:
    weights may be laid out anew for kernels that are faster, and in some types depend on the number of rows.
    `use_kernels`: where there are kernels of our own, they multiply the matrices that they can, and all are left as
    they lie. `fixed_shape`: passes of single tokens always have the same shape, see `llama.full`. `promise` is the most
    that can be promised of numbers that are computed like this, `promise_without_kernels` where there are no such
    kernels; the card says what the loaded model keeps of it.
    """

    path: str
    context: int
    sequences: int
    threads: int
    chunk: int
    kv_type: KvType
    gpu_layers: int
    verbose: bool
    grid: int = 64
    repack: bool = True
    use_kernels: bool = False
    fixed_shape: bool = False
    promise: Promise = "none"
    promise_without_kernels: Promise = "none"
    parts: tuple[str, ...] = ()


class StartJob(Value, frozen=True, tag=True):
    """Begin a job, named by `run`."""

    run: int
    job: Job


class DropSample(Value, frozen=True, tag=True):
    """End one sample of a job."""

    run: int
    sample: int


class CloseJob(Value, frozen=True, tag=True):
    """End a job."""

    run: int


class PauseJob(Value, frozen=True, tag=True):
    """Compute and send nothing of a job until `ResumeJob`: its reader is far behind."""

    run: int


class ResumeJob(Value, frozen=True, tag=True):
    """Go on with a paused job."""

    run: int


class TokenizeText(Value, frozen=True, tag=True):
    """Answer with `TextTokens`. `long`: other texts need not wait for it."""

    call: int
    text: str
    special: bool
    long: bool = False


class CancelTokenize(Value, frozen=True, tag=True):
    """The tokens of a text are not needed any more. It is answered, with some tokens or none."""

    call: int


class ModelReady(Value, frozen=True, tag=True):
    """The model is loaded."""

    model_info: ModelInfo


class LoadFailure(Value, frozen=True, tag=True):
    """The model cannot be loaded; a sentence for the operator."""

    message: str


class PassDone(Value, frozen=True, tag=True):
    """A forward pass was made, or the load changed."""

    steps: dict[int, Step]
    load: Load
    pass_stats: PassStats = PassStats()


class TextTokens(Value, frozen=True, tag=True):
    """The tokens of a text, as the bytes of C integers: of a long text there are millions, and decoding takes time."""

    call: int
    data: bytes
    long: bool = False

    @classmethod
    def of(cls, call: int, ids: Iterable[int], long: bool = False) -> TextTokens:
        """Some tokens."""
        return cls(call, array("i", ids).tobytes(), long)

    @property
    def ids(self) -> Sequence[int]:
        """The tokens."""
        return array("i", self.data)


class Heartbeat(Value, frozen=True, tag=True):
    """The engine's process lives. Sent every second, whatever it does.

    So many `passes` have ended, and one over so many `tokens` is under way (0: none); the longest so far took `slowest`
    seconds, the `largest` had so many tokens. `loaded` is the share of the model that is there. `parts` counts what has
    been tokenized of short texts and of long ones.
    """

    passes: int
    tokens: int
    largest: int
    slowest: float
    loaded: float = 1.0
    parts: tuple[int, int] = (0, 0)


WorkerMessage = LoadModel | StartJob | DropSample | CloseJob | PauseJob | ResumeJob | TokenizeText | CancelTokenize
ServerMessage = ModelReady | LoadFailure | PassDone | TextTokens | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_from_engine: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def pack(message: WorkerMessage | ServerMessage) -> bytes:
    """A message as a whole frame."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def unpack_for_worker(body: bytes) -> WorkerMessage:
    """Raises `msgspec.MsgspecError` for anything else."""
    return _to_engine.decode(body)


def unpack_for_server(body: bytes) -> ServerMessage:
    """Raises `msgspec.MsgspecError` for anything else."""
    return _from_engine.decode(body)


class Stream(Protocol):
    """A blocking byte stream, such as a socket's file object."""

    def read(self, size: int) -> bytes | None:
        """Up to `size` bytes; fewer only at the end."""
        ...


def read(stream: Stream) -> bytes | None:
    """The body of the next frame, or None at the end of the stream."""
    header = stream.read(HEADER.size)
    if not header or len(header) < HEADER.size:
        return None
    size = HEADER.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        return None
    body = stream.read(size)
    return body if body and len(body) == size else None

"""The messages between server and worker, and their encoding as frames.

A frame is a length (4 bytes, big-endian) and a msgpack value of a closed set of types. Decoding a frame cannot run
code. One frame carries the results of a whole forward pass.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from afterword.engine.protocol import Job, Load, ModelInfo, PassStats, Promise, Step, Value
from afterword.engine.store_stats import StoreStats

HEADER = struct.Struct(">I")
KvType = Literal["exact", "f16", "f32"]
Speculation = Literal["off", "ngram"]
MAX_FRAME_BYTES = 256 * 2**20
"""The largest accepted frame in bytes. The model info of a model with a large vocabulary has about 3 million bytes."""


class LoadModel(Value, frozen=True, tag=True):
    """Load a model with `sequences` slots of `context` tokens each.

    `capacity`: the most tokens of all sequences together, at least `context`; None if every sequence can be full.
    `token_bytes`: bytes of memory that each token takes when it is computed; 0 if they are taken at the start.
    `path`: the model file, or the first of its `parts`. `parts` is empty if the model is one file.
    `kv_type`: the type of the KV cache. With "exact", a token has the same numbers whether it was part of the prompt
    or generated, if the matmuls of the model's weight types allow it.
    `chunk` and `grid`: see `core.forward_batch.Runner`. If numbers are exact, the worker ignores `grid` and uses 1.
    `repack`: llama.cpp may repack weights for faster kernels. With some weight types their results depend on the
    number of rows.
    `use_kernels`: Afterword's own kernels, if available, compute the matmuls that they support, and llama.cpp repacks
    no weights.
    `snapshot_bytes`: the most memory for snapshots of recurrent layers.
    `infill_template`: the operator's layout of infill prompts, see `llama.infill_families`; empty for the model's own.
    `joins_prompts`: see `core.forward_batch.Runner`. Ignored unless numbers are exact and all kernels are used.
    `fixed_shape`: all decode passes have the same shape, see `llama.fixed_shape`.
    `cache_dir`: the folder in which prefixes are kept, at most `cache_bytes` bytes; empty: none are kept.
    `speculate`: "ngram": draft tokens from each sample's own text; "off": from predictions only. `draft`: the model
    that drafts tokens too; None: no model does. It has no draft model itself.
    `adapter`: the file of a LoRA adapter, whose part is multiplied with `adapter_scale`; empty: none.
    `pack_weights`: the kernels copy the weights in their own order. If false, all processes that use the file share its
    pages in memory.
    `promise`: the strongest promise that these settings allow; `promise_without_kernels`: the same if Afterword's
    kernels are not available. `ModelInfo.promise` states the promise that the loaded model keeps.
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
    snapshot_bytes: int = 0
    promise: Promise = "none"
    promise_without_kernels: Promise = "none"
    parts: tuple[str, ...] = ()
    capacity: int | None = None
    token_bytes: int = 0
    infill_template: str = ""
    cache_dir: str = ""
    cache_bytes: int = 0
    speculate: Speculation = "off"
    draft: LoadModel | None = None
    adapter: str = ""
    adapter_scale: float = 1.0
    pack_weights: bool = True
    joins_prompts: bool = False


class LoadVllm(Value, frozen=True, tag=True):
    """Load the model in the folder `path` with vLLM. `flags`: options of vLLM's command line, without the model.

    `infill_template`: see `LoadModel`. `verbose`: show vLLM's own log.
    """

    path: str
    flags: tuple[str, ...] = ()
    infill_template: str = ""
    verbose: bool = False


class LoadUpstream(Value, frozen=True, tag=True):
    """Use the vLLM server at `url` for the model whose tokenizer is in the folder `path`.

    `key`: the API key that the server expects, or empty. `context`: the most tokens of a sequence; None: as many as the
    server has. `sequences`: the most samples that the server gets at a time. `alternatives`: the most alternatives that
    requests may ask for. `silence`: seconds without an event of the server after which a request to it has failed.
    `patience`: seconds that a sample without a token waits for the server to come back, 0 for ever. `infill_template`:
    see `LoadModel`. `verbose`: quote in messages what the server says.
    """

    path: str
    url: str
    sequences: int
    alternatives: int
    silence: float
    patience: float
    key: str = ""
    context: int | None = None
    infill_template: str = ""
    verbose: bool = False


class StartJob(Value, frozen=True, tag=True):
    """Start a job. All other messages name it by `job_id`."""

    job_id: int
    job: Job


class DropSample(Value, frozen=True, tag=True):
    """End one sample of a job."""

    job_id: int
    sample: int


class CloseJob(Value, frozen=True, tag=True):
    """End a job."""

    job_id: int


class PauseJob(Value, frozen=True, tag=True):
    """Compute and send no steps of a job until `ResumeJob`, because its client reads too slowly."""

    job_id: int


class ResumeJob(Value, frozen=True, tag=True):
    """Continue a paused job."""

    job_id: int


class TokenizeText(Value, frozen=True, tag=True):
    """Tokenize a text and answer with `TextTokens`. `long`: the worker's thread for long texts does it."""

    call: int
    text: str
    special: bool
    long: bool = False


class CancelTokenize(Value, frozen=True, tag=True):
    """Cancel a `TokenizeText`. The worker still answers it, with some tokens or none."""

    call: int


class ModelReady(Value, frozen=True, tag=True):
    """The model is loaded."""

    model_info: ModelInfo


class LoadFailure(Value, frozen=True, tag=True):
    """The model cannot be loaded. `message` explains the reason to the operator."""

    message: str


class PassDone(Value, frozen=True, tag=True):
    """The results of a forward pass, by job id. Also sent without results when only the load has changed."""

    steps: dict[int, Step]
    load: Load
    pass_stats: PassStats = PassStats()


class TextTokens(Value, frozen=True, tag=True):
    """The tokens of a text, as an array of C integers in bytes.

    A long text has millions of tokens, and decoding them as msgpack integers would take too long.
    """

    call: int
    data: bytes
    long: bool = False

    @classmethod
    def of(cls, call: int, ids: Iterable[int], long: bool = False) -> TextTokens:
        return cls(call, array("i", ids).tobytes(), long)

    @property
    def ids(self) -> Sequence[int]:
        return array("i", self.data)


class Heartbeat(Value, frozen=True, tag=True):
    """Proof that the worker is alive and its progress. The worker sends it every second.

    `passes`: number of finished forward passes. `tokens`: tokens of the pass that is running, 0 if none is. `largest`:
    most tokens of a pass so far. `slowest`: seconds of the longest pass so far. `loaded`: the loaded fraction of the
    model, 0 to 1. `parts`: how many parts of short and of long texts were tokenized. `store`: of the store of prefixes.
    """

    passes: int
    tokens: int
    largest: int
    slowest: float
    loaded: float = 1.0
    parts: tuple[int, int] = (0, 0)
    store: StoreStats = StoreStats()


LoadMessage = LoadModel | LoadVllm | LoadUpstream
"""The first message to a worker: one type for each engine."""

JobMessage = StartJob | DropSample | CloseJob | PauseJob | ResumeJob
WorkerMessage = LoadMessage | JobMessage | TokenizeText | CancelTokenize
ServerMessage = ModelReady | LoadFailure | PassDone | TextTokens | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_worker_decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_server_decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def pack(message: WorkerMessage | ServerMessage) -> bytes:
    """Encode a message as a frame, length included."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def unpack_for_worker(body: bytes) -> WorkerMessage:
    """Decode a message to the worker. Raises `msgspec.MsgspecError` for any other bytes."""
    return _worker_decoder.decode(body)


def unpack_for_server(body: bytes) -> ServerMessage:
    """Decode a message to the server. Raises `msgspec.MsgspecError` for any other bytes."""
    return _server_decoder.decode(body)


class Stream(Protocol):
    """A blocking stream of bytes, such as a socket's file object."""

    def read(self, size: int) -> bytes | None:
        """Read `size` bytes. The result is shorter only at the end of the stream."""
        ...


def read(stream: Stream) -> bytes | None:
    """Read the body of the next frame. None at the end of the stream, or if the frame is too long or incomplete."""
    header = stream.read(HEADER.size)
    if not header or len(header) < HEADER.size:
        return None
    size = HEADER.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        return None
    body = stream.read(size)
    return body if body and len(body) == size else None

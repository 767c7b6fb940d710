"""Copies the keys and values of a slot part by part, and assembles parts to a state that llama.cpp restores.

Parts are copied from the memory of the KV cache (`accelerator.KvMemory`), so that only new tokens are copied. A state
has the form of `llama_state_seq_get_data_ext`: numbers of cells, their positions, then the keys and the values layer by
layer, then the recurrent state. llama.cpp does not document this form, so `agrees` compares an assembled state with one
of llama.cpp's. If they differ, no prefixes are stored.

`part` and `snapshot` belong to the engine's thread. Any thread may call `assemble`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.snapshots import TokenArray
from afterword.engine.llama.accelerator import KvPlace

_HEADER = np.array([0xAF143CD8, 0], np.uint32).tobytes()  # llama-context.cpp: io_magic, and the number of a sequence
_UNTRANSPOSED = 0

State = ctypes.Array[ctypes.c_uint8]
Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class CellRecords:
    """How llama.cpp records cells. `streams`: slots of the KV cache. `caches`: their numbers, in llama.cpp's order.

    A model with windows has two caches, and one of them may have no layers. `extended`: records have two more positions
    and the token. llama-kv-cache.cpp: state_write_meta, has_cell_ext. `before_layers`: zero bytes between the number of
    layers and the first layer; llama.cpp 0.6 has 8 of them.
    """

    streams: int
    caches: tuple[int, ...]
    extended: bool
    before_layers: int = 0

    def of(self, tokens: TokenArray) -> bytes:
        """The beginning of a cache's state: the numbers of slots and of cells, then the record of each cell."""
        positions = np.arange(len(tokens), dtype=np.int32)
        one, sequence = np.ones_like(positions), np.zeros_like(positions)
        further = [positions, positions, tokens] if self.extended else []
        cells = np.stack([positions, one, *further, sequence], axis=1)
        return np.array([self.streams, len(tokens)], np.uint32).tobytes() + cells.tobytes()


class SlotStates:
    """The states of a context's slots. `places`: where its keys and values are; none in a purely recurrent model.

    `recurrent_state`: returns the recurrent state of a snapshot in llama.cpp's form; None if the model has none.
    """

    def __init__(
        self, places: Sequence[KvPlace], records: CellRecords, recurrent_state: Callable[[int], State] | None
    ) -> None:
        self._places = tuple(places)
        self._records = records
        self._recurrent_state = recurrent_state
        self.is_recurrent = recurrent_state is not None
        self.token_bytes = sum(place.cell_bytes for place in places)

    def part(self, slot: int, start: int, stop: int) -> bytearray:
        """A copy of the keys and values of the tokens from `start` up to `stop`: one array of rows for each place."""
        part = bytearray((stop - start) * self.token_bytes)
        if not part:
            return part
        target = ctypes.addressof(ctypes.c_char.from_buffer(part))
        for place in self._places:
            size = (stop - start) * place.cell_bytes
            ctypes.memmove(target, place.address + slot * place.slot_bytes + start * place.cell_bytes, size)
            target += size
        return part

    def snapshot(self, number: int) -> bytes:
        """A copy of the recurrent state of a snapshot."""
        assert self._recurrent_state is not None
        return bytes(memoryview(self._recurrent_state(number))[len(_HEADER) :])

    def assemble(self, tokens: TokenArray, parts: Sequence[Bytes], recurrent: Bytes = b"") -> State:
        """The state of a slot that holds these tokens. `parts`: those of all tokens, in order."""
        state = (ctypes.c_uint8 * self._state_size(len(tokens), len(recurrent)))()
        buffer = np.ctypeslib.as_array(state)
        position = _put(buffer, 0, _HEADER)
        for cache in self._records.caches:
            position = self._put_cache(buffer, position, cache, tokens, parts)
        assert _put(buffer, position, recurrent) == len(buffer)
        return state

    def _state_size(self, tokens: int, recurrent: int) -> int:
        size = len(_HEADER) + recurrent + tokens * self.token_bytes + len(self._places) * (4 + 8)
        record = 4 * (3 + 3 * self._records.extended)
        head = 4 * (1 + self._records.streams) + tokens * record + 4 + 4 + self._records.before_layers
        return size + len(self._records.caches) * head

    def _put_cache(
        self, buffer: NDArray[np.uint8], position: int, cache: int, tokens: TokenArray, parts: Sequence[Bytes]
    ) -> int:
        """Write the state of one cache. Returns the position after it."""
        position = _put(buffer, position, self._records.of(tokens))
        own = [(index, place) for index, place in enumerate(self._places) if place.cache == cache]
        keys = [item for item in own if not item[1].are_values]
        values = [item for item in own if item[1].are_values]
        position = _put(buffer, position, np.array([_UNTRANSPOSED, len(keys)], np.uint32).tobytes())
        position = _put(buffer, position, bytes(self._records.before_layers))
        for index, place in (*keys, *values):
            head = np.int32(place.type).tobytes() + np.uint64(place.cell_bytes).tobytes()
            position = _put(buffer, position, head)
            before = sum(other.cell_bytes for other in self._places[:index])
            for part in parts:
                count = len(part) // self.token_bytes
                begin = before * count
                position = _put(buffer, position, memoryview(part)[begin : begin + place.cell_bytes * count])
        return _put(buffer, position, bytes(4 * (self._records.streams - 1)))  # the other slots: no cells


def _put(buffer: NDArray[np.uint8], position: int, data: Bytes) -> int:
    end = position + len(data)
    buffer[position:end] = np.frombuffer(data, np.uint8)
    return end

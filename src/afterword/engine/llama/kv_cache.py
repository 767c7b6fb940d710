"""What llama.cpp's memory holds of each slot, and that nothing of it reaches a slot's next owner.

Cells that were cut stay where they are and are masked. Our attention, and the library's flash attention, never
multiply a masked cell. The library's other attention multiplies it by 0, a recurrent state is multiplied by 0 when a
text begins, and 0 times a value that is not finite is NaN. So before a slot of such a memory is cut, one more token is
computed in it, unless its last logits were finite. If the logits of that token are not finite, all memory is cleared,
and what the slots keep is put back as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, Logits, Truncate
from afterword.engine.core.sampler import finite_rows
from afterword.engine.llama.library import native
from afterword.errors import EngineError

Decode = Callable[[tuple[BatchEntry, ...]], Logits]
_PROBE = (0,)  # any token will do


class KvCache:
    """Owner of a context's memory. `multiplies_masked`: what was cut can reach what is computed later in the slot."""

    def __init__(self, context: object, slots: int, length: int, decode: Decode, *, multiplies_masked: bool) -> None:
        self._context = context
        self._memory = native.llama_get_memory(context)
        self._slots = range(slots)
        self._length = length
        self._decode = decode
        self._multiplies_masked = multiplies_masked
        self._unsure: set[int] = set()  # slots whose last tokens have brought no finite row of logits

    def cached_tokens(self, slot: int) -> int:
        """How many tokens' state a slot holds."""
        return int(native.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def check_computed(self, rows: tuple[BatchEntry, ...], logits: Logits) -> None:
        """Rows were computed, and these are their logits: see `Logits`."""
        if not self._multiplies_masked:
            return
        end = 0
        for row in rows:
            end += row.outputs
            if row.outputs and finite_rows(logits[end - 1 : end])[0]:
                self._unsure.discard(row.slot)
            else:
                self._unsure.add(row.slot)

    def apply(self, move: CopyPrefix | Truncate) -> None:
        """Copy or forget. Raises `EngineError` where the library cannot."""
        if isinstance(move, CopyPrefix):
            self._cut(move.target, 0)
            # Only whole sequences can be copied between separate memories.
            native.llama_memory_seq_cp(self._memory, move.source, move.target, -1, -1)
            if move.source in self._unsure:
                self._unsure.add(move.target)
            self._cut(move.target, move.keep)
        else:
            self._cut(move.slot, move.keep)

    def _cut(self, slot: int, keep: int) -> None:
        held = self.cached_tokens(slot)
        if keep >= held:
            return
        tainted = slot in self._unsure and self._is_tainted(slot, held)
        self._remove(slot, keep)
        self._unsure.discard(slot)
        if tainted:
            self._rebuild()

    def _remove(self, slot: int, keep: int) -> None:
        if not native.llama_memory_seq_rm(self._memory, slot, keep or -1, -1):
            raise EngineError(f"cannot cut a sequence to {keep} tokens")

    def _is_tainted(self, slot: int, held: int) -> bool:
        """Whether a slot holds anything that is not finite. A full one is not asked: there is no room for the token."""
        if held >= self._length:
            return True
        return not finite_rows(self._decode((BatchEntry(slot, held, _PROBE, 1),)))[0]

    def _rebuild(self) -> None:
        """Clear all memory and put back what the slots hold."""
        states = {slot: self._state(slot) for slot in self._slots if self.cached_tokens(slot)}
        native.llama_memory_clear(self._memory, True)
        for slot, state in states.items():
            if not native.llama_state_seq_set_data(self._context, state, len(state), slot):
                raise EngineError("cannot put back a sequence's state")

    def _state(self, slot: int) -> ctypes.Array[ctypes.c_uint8]:
        size: int = native.llama_state_seq_get_size(self._context, slot)
        state: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if native.llama_state_seq_get_data(self._context, state, size, slot) != size:
            raise EngineError("cannot save a sequence's state")
        return state

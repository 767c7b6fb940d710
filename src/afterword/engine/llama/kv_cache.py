"""Truncates and copies the slots of llama.cpp's KV cache, so that NaN or infinity never reaches a slot's next sequence.

Truncated cells stay in memory and are masked. Afterword's attention and the library's flash attention never multiply a
masked cell. But the library's other attention multiplies it by 0, and so is a recurrent state when a new text begins.
0 times NaN or infinity is NaN.

Therefore, before such a slot is truncated, one more token is computed in it, unless its last logits were finite. If the
logits of that token are not finite, the whole memory is cleared and the other contents of the slots are restored.

Layers with a sliding window have cells for the whole context (`swa_full`). Cell i of a slot holds its token i, because
llama.cpp fills the cells in order. It would overwrite cells whose tokens have left the window only after the last cell.
So every prefix of a slot is complete, and `_remove` checks it: otherwise later tokens would have wrong numbers. A saved
state contains only the cells in the window, so the slots of such a model are not restored from states.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, Logits, Truncate
from afterword.engine.core.sampler import finite_rows
from afterword.engine.llama.library import native
from afterword.errors import EngineError

Decode = Callable[[tuple[BatchEntry, ...]], Logits]
_PROBE = (0,)  # any token id is valid here


class KvCache:
    """Owns the KV cache of a context.

    `length`: tokens of one slot. `multiplies_masked`: truncated cells can change what is computed later in the slot.
    """

    def __init__(self, context: object, slots: int, length: int, decode: Decode, *, multiplies_masked: bool) -> None:
        self._context = context
        self._memory = native.llama_get_memory(context)
        self._slots = range(slots)
        self._length = length
        self._decode = decode
        self._multiplies_masked = multiplies_masked
        self._windowed = native.llama_model_n_swa(native.llama_get_model(context)) > 0
        self._unchecked: set[int] = set()  # slots whose last logits row was not finite, or was not computed

    def cached_tokens(self, slot: int) -> int:
        """The number of tokens that a slot holds."""
        return int(native.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def check_computed(self, entries: tuple[BatchEntry, ...], logits: Logits) -> None:
        """Note which entries of a pass had finite logits. `logits`: (outputs of all entries, vocabulary)."""
        if not self._multiplies_masked:
            return
        end = 0
        for entry in entries:
            end += entry.outputs
            if entry.outputs and finite_rows(logits[end - 1 : end])[0]:
                self._unchecked.discard(entry.slot)
            else:
                self._unchecked.add(entry.slot)

    def apply(self, operation: CopyPrefix | Truncate) -> None:
        """Copy or truncate a slot. May run a forward pass, which overwrites the logits. Raises `EngineError`."""
        if isinstance(operation, CopyPrefix):
            self._truncate(operation.target, 0)
            # With `kv_unified=false` llama.cpp copies only whole sequences.
            native.llama_memory_seq_cp(self._memory, operation.source, operation.target, -1, -1)
            if operation.source in self._unchecked:
                self._unchecked.add(operation.target)
            self._truncate(operation.target, operation.keep)
        else:
            self._truncate(operation.slot, operation.keep)

    def _truncate(self, slot: int, keep: int) -> None:
        held = self.cached_tokens(slot)
        if keep >= held:
            return
        non_finite = slot in self._unchecked and self._has_non_finite(slot, held)
        self._remove(slot, keep)
        self._unchecked.discard(slot)
        if non_finite and self._windowed:
            self._overwrite(slot, keep)
        elif non_finite:
            self._rebuild()

    def _remove(self, slot: int, keep: int) -> None:
        if not native.llama_memory_seq_rm(self._memory, slot, keep or -1, -1):
            raise EngineError(f"llama.cpp cannot truncate a sequence to {keep} tokens.")
        if keep and self._windowed and native.llama_memory_seq_pos_min(self._memory, slot):
            raise EngineError(f"llama.cpp has lost the beginning of a sequence that is truncated to {keep} tokens.")

    def _overwrite(self, slot: int, keep: int) -> None:
        """Overwrite the memory of a slot that is now empty with that of a slot that holds finite values only.

        Raises `EngineError` if the slot is not empty or there is no such slot: a new worker has a clean memory.
        """
        source = next((each for each in self._slots if each != slot and each not in self._unchecked), None)
        if keep or source is None:
            raise EngineError("Numbers that are not finite cannot be removed from a slot of a model with a window.")
        # llama.cpp copies all cells, also those that hold no token.
        native.llama_memory_seq_cp(self._memory, source, slot, -1, -1)
        self._remove(slot, 0)

    def _has_non_finite(self, slot: int, held: int) -> bool:
        """Whether a slot holds NaN or infinity, apart from its last token if it is full.

        A full slot cannot be probed with another token: the last one is replaced, or the slot counts as not finite.
        """
        if held >= self._length and self._windowed:
            held -= 1
            self._remove(slot, held)
        if held >= self._length:
            return True
        return not finite_rows(self._decode((BatchEntry(slot, held, _PROBE, 1),)))[0]

    def _rebuild(self) -> None:
        """Clear the whole memory, and restore the slots' contents from their saved states."""
        states = {slot: self._state(slot) for slot in self._slots if self.cached_tokens(slot)}
        native.llama_memory_clear(self._memory, True)
        for slot, state in states.items():
            if not native.llama_state_seq_set_data(self._context, state, len(state), slot):
                raise EngineError("llama.cpp cannot restore a sequence's state.")

    def _state(self, slot: int) -> ctypes.Array[ctypes.c_uint8]:
        size: int = native.llama_state_seq_get_size(self._context, slot)
        state: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if native.llama_state_seq_get_data(self._context, state, size, slot) != size:
            raise EngineError("llama.cpp cannot save a sequence's state.")
        return state

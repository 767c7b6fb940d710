"""Truncates and copies the slots of llama.cpp's KV cache, so that NaN or infinity never reaches a slot's next sequence.

Truncated cells are masked. Where `KvMemory` exists, their memory is given back after the next pass. Afterword's
attention and the library's flash attention never multiply a masked cell. But the library's other attention multiplies
it by 0, and so is a recurrent state when a new text begins. 0 times NaN or infinity is NaN.

Therefore, before such a slot is truncated, one more token is computed in it, unless its last logits were finite. If the
logits of that token are not finite, the whole memory is cleared and the other contents of the slots are restored.

A stored state (`RestorePrefix`) is written at once, but llama.cpp copies slots when the next pass begins. Therefore a
pass is computed before, if there are such copies: they would overwrite the state, or copy it to another slot.

The state of recurrent layers belongs to the last token of a slot. `SaveState` copies it; truncation restores the copy
and deletes the keys and values of attention layers after it.

Layers with a sliding window have cells for the whole context (`swa_full`). Cell i of a slot holds its token i, because
llama.cpp fills the cells in order. It would overwrite cells whose tokens have left the window only after the last cell.
So every prefix of a slot is complete, and `_remove` checks it: otherwise later tokens would have wrong numbers. A saved
state contains only the cells in the window, so the slots of such a model are not restored from states.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from afterword.engine.core.forward_batch import (
    BatchEntry,
    CopyPrefix,
    Logits,
    RestorePrefix,
    SaveState,
    SlotOperation,
    Truncate,
)
from afterword.engine.core.sampler import finite_rows
from afterword.engine.llama.accelerator import KvMemory
from afterword.engine.llama.library import native
from afterword.engine.llama.slot_states import CellRecords, SlotStates, State
from afterword.errors import EngineError

Decode = Callable[[tuple[BatchEntry, ...]], Logits]
_PROBE = (0,)  # any token id is valid here
_WHOLE, _RECURRENT = 0, native.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # parts of a slot's state


@dataclass(frozen=True, slots=True)
class NativeContext:
    """A context of llama.cpp.

    - `pages`: the memory of its KV cache, if that is given back when slots are truncated; else None.
    - `own_attention`: whether Afterword's kernels compute its attention.
    - `depends_on_batch`: whether the library computes it with kernels that it chooses by the shape of the pass,
      although the settings ask for others.
    """

    address: object
    pages: KvMemory | None = None
    own_attention: bool = False
    depends_on_batch: bool = False


class KvCache:
    """Owns the KV cache of a context.

    `length`: tokens of one slot. `multiplies_masked`: truncated cells can change what is computed later in the slot.
    """

    def __init__(
        self, context: NativeContext, slots: int, length: int, decode: Decode, *, multiplies_masked: bool
    ) -> None:
        self._context = context.address
        self._pages = context.pages
        self._memory = native.llama_get_memory(self._context)
        self._slots = range(slots)
        self._length = length
        self._decode = decode
        self._multiplies_masked = multiplies_masked
        self._has_copies = False  # whether slots were copied since the last pass
        self._truncated: set[int] = set()  # slots that were truncated since the last pass
        self._windowed = native.llama_model_n_swa(native.llama_get_model(self._context)) > 0
        self._unchecked: set[int] = set()  # slots whose last logits row was not finite, or was not computed
        self._snapshots: dict[int, State] = {}  # by number

    def cached_tokens(self, slot: int) -> int:
        """The number of tokens that a slot holds."""
        return int(native.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def release_truncated(self) -> None:
        """Give the memory of truncated cells back. Call it after a pass: llama.cpp copies slots when a pass begins."""
        self._has_copies = False
        if self._pages:
            self._pages.copied()
            for slot in self._truncated:
                self._pages.release(slot, self.cached_tokens(slot))
        self._truncated.clear()

    def release_between_passes(self) -> None:
        """Do the same without a pass, unless llama.cpp has put copies off: these still read truncated cells."""
        if not self._has_copies:
            self.release_truncated()

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

    def snapshot_size(self) -> int:
        """Bytes of a snapshot of recurrent layers. Runs a forward pass and clears all slots."""
        self._decode((BatchEntry(0, 0, _PROBE, 0),))
        size = int(native.llama_state_seq_get_size_ext(self._context, 0, _RECURRENT))
        native.llama_memory_clear(self._memory, True)
        return size

    def slot_states(self) -> SlotStates | None:
        """Access to the states of slots for a store of prefixes; None if the model's states cannot be stored.

        That needs keys and values in memory of Afterword's, and the form of states that `SlotStates` knows. Runs a
        forward pass and clears all slots.
        """
        model = native.llama_get_model(self._context)
        recurrent = native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model)
        if not self._pages and not native.llama_model_is_recurrent(model):
            return None
        places = self._pages.places() if self._pages else []
        numbers = tuple(dict.fromkeys(place.cache for place in places))
        orders = [numbers, (-1, *numbers), (*numbers, -1)] if self._windowed and len(numbers) == 1 else [numbers]
        for caches, extended, before_layers in itertools.product(orders, (False, True), (0, 8)):
            records = CellRecords(len(self._slots), caches, extended, before_layers)
            states = SlotStates(places, records, self._snapshots.__getitem__ if recurrent else None)
            if self._agrees(states):
                return states
        return None

    def _agrees(self, states: SlotStates) -> bool:
        """Whether an assembled state of a few tokens equals llama.cpp's, and can be restored."""
        tokens = (2, 0, 1)
        native.llama_memory_clear(self._memory, True)
        self._decode((BatchEntry(0, 0, tokens, 0),))
        recurrent = b""
        if states.is_recurrent:
            self._snapshots[0] = self._state(0, _RECURRENT)
            recurrent = states.snapshot(0)
        parts = [states.part(0, 0, 1), states.part(0, 1, len(tokens))]
        made = states.assemble(np.array(tokens, np.int32), parts, recurrent)
        found = bytes(self._state(0))
        native.llama_memory_clear(self._memory, True)
        self._snapshots.clear()
        if bytes(made) != found:
            return False
        self._restore(0, made, _WHOLE)
        restored = bytes(self._state(0))
        native.llama_memory_clear(self._memory, True)
        return restored == found

    def apply(self, operation: SlotOperation) -> None:
        """Copy, truncate or save a slot. May run a forward pass, which overwrites the logits. Raises `EngineError`."""
        match operation:
            case SaveState(slot, number):
                self._snapshots[number] = self._state(slot, _RECURRENT, self._snapshots.get(number))
            case CopyPrefix(source, target, keep, snapshot):
                self._truncate(target, 0, None)
                self._has_copies = True
                # With `kv_unified=false` llama.cpp copies only whole sequences.
                native.llama_memory_seq_cp(self._memory, source, target, -1, -1)
                if self._pages:
                    self._pages.limit_copy(target, keep)
                if source in self._unchecked:
                    self._unchecked.add(target)
                self._truncate(target, keep, snapshot)
            case Truncate(slot, keep, snapshot):
                self._truncate(slot, keep, snapshot)
            case RestorePrefix(slot, keep, state):
                self._truncate(slot, 0, None)
                self._complete_copies(slot)
                self._restore(slot, state, _WHOLE)
                if self._multiplies_masked:
                    self._unchecked.add(slot)
                self._truncate(slot, keep, None)

    def _complete_copies(self, slot: int) -> None:
        """Let llama.cpp make the copies of slots that it has put off. `slot` must be empty, and is empty afterwards."""
        if self._has_copies:
            self._decode((BatchEntry(slot, 0, _PROBE, 0),))
            self._remove(slot, 0)

    def _truncate(self, slot: int, keep: int, snapshot: int | None) -> None:
        held = self.cached_tokens(slot)
        if keep >= held:
            return
        non_finite = slot in self._unchecked and self._has_non_finite(slot, held)
        self._unchecked.discard(slot)
        if snapshot is not None:
            self._restore(slot, self._snapshots[snapshot], _RECURRENT)
            self._unchecked.add(slot)  # the snapshot may have been taken before any logits were computed
        self._remove(slot, keep)
        if non_finite and self._windowed:
            self._overwrite(slot, keep)
        elif non_finite:
            self._rebuild()

    def _remove(self, slot: int, keep: int) -> None:
        if not native.llama_memory_seq_rm(self._memory, slot, keep or -1, -1):
            raise EngineError(f"llama.cpp cannot truncate a sequence to {keep} tokens.")
        self._truncated.add(slot)
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
            self._restore(slot, state, _WHOLE)

    def _state(self, slot: int, part: int = _WHOLE, buffer: State | None = None) -> State:
        """A copy of a slot's state, in `buffer` if that has the right size."""
        size = int(native.llama_state_seq_get_size_ext(self._context, slot, part))
        state = buffer if buffer is not None and len(buffer) == size else (ctypes.c_uint8 * size)()
        if native.llama_state_seq_get_data_ext(self._context, state, size, slot, part) != size:
            raise EngineError("llama.cpp cannot save a sequence's state.")
        return state

    def _restore(self, slot: int, state: object, part: int) -> None:
        assert isinstance(state, ctypes.Array)
        if not native.llama_state_seq_set_data_ext(self._context, state, len(state), slot, part):
            raise EngineError("llama.cpp cannot restore a sequence's state.")

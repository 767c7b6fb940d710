// The memory of the KV cache: pages are taken when tokens are written, and given back when a slot is truncated.
//
// llama.cpp allocates the cache for the whole context of every slot, fills it with zeros, and copies whole slots. Here its
// buffers are those of ggml's CPU buffer type in addresses for which no memory is reserved: they may be more than the machine's
// memory. Three functions are replaced: `clear` drops the pages, which are zeros when they are read again; `set_tensor` copies
// the cells that a copy of a slot needs; `init_tensor` finds the tensors of the cache.
//
// This requires that a cell of keys or values is one row of its tensor, as with flash attention. Else llama.cpp transposes values.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "ggml.hpp"

namespace kv_buffers {
namespace {

// The keys or the values of a layer. Shape of the tensor: [elements of a cell, cell, slot].
// `buffer`: the memory that holds it. A model with windows has two caches, each with its own buffer.
struct Cells {
    char *data;
    const Buffer *buffer;
    size_t cell_bytes, slot_bytes;
    int64_t slots;
    int32_t type;
    bool are_values;

    explicit Cells(const Tensor *tensor)
        : data(tensor->data),
          buffer(tensor->buffer),
          cell_bytes(tensor->nb[1]),
          slot_bytes(tensor->nb[2]),
          slots(tensor->ne[2]),
          type(tensor->type),
          are_values(std::strstr(tensor->name, "v_l")) {}

    bool contains(const char *address) const { return address >= data && address < data + slot_bytes * slots; }
    size_t slot_of(const char *address) const { return (address - data) / slot_bytes; }
};

// The KV cache of one context. It is deleted with the last of its buffers. `users`: its buffers, and `opened`.
struct KvMemory {
    std::vector<Cells> layers;
    std::unordered_map<size_t, size_t> copied_cells;  // by slot: the next copies of the slot need only so many first cells
    int users = 1;
};

KvMemory *opened = nullptr;  // the cache of the context that is being created
std::unordered_map<const Buffer *, KvMemory *> owners;
BufferCalls usual;  // the functions of ggml's CPU buffers; the `context` of such a buffer is the address of its memory
Buffer *(*make_usual)(BufferType *, size_t) = nullptr;

// Drops the whole pages of a range: they take no memory, and are zeros when they are read again. Returns whether that is
// possible; the bytes before the first and after the last whole page are left as they are.
bool drop_pages(char *begin, char *end) {
#ifdef __linux__
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    char *first = begin + (page - (uintptr_t)begin % page) % page, *last = end - (uintptr_t)end % page;
    return first >= last || !madvise(first, last - first, MADV_DONTNEED);
#else
    (void)begin, (void)end;
    return false;
#endif
}

void clear(Buffer *buffer, uint8_t value) {
    char *base = (char *)buffer->calls.get_base(buffer), *end = base + buffer->size;
#ifdef __linux__
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    if (value == 0 && buffer->size >= 2 * page && drop_pages(base, end)) {
        std::memset(base, 0, page);  // the parts of pages at both ends
        std::memset(end - page, 0, page);
        return;
    }
#endif
    usual.clear(buffer, value);
}

// Records the tensors of keys and values. A buffer of other tensors needs no further calls.
int init_tensor(Buffer *buffer, Tensor *tensor) {
    const bool of_cache = !std::strncmp(tensor->name, "cache_", 6) || tensor->view_src;
    if (!of_cache) buffer->calls.init_tensor = usual.init_tensor;
    const bool keys_or_values = std::strstr(tensor->name, "k_l") || std::strstr(tensor->name, "v_l");
    const auto owner = owners.find(buffer);
    if (of_cache && keys_or_values && !tensor->view_src && owner != owners.end()) owner->second->layers.emplace_back(tensor);
    return 0;
}

// Copies data into a tensor. A copy of a whole slot ends after the cells that are needed.
void set_tensor(Buffer *buffer, Tensor *tensor, const void *data, size_t offset, size_t size) {
    const auto owner = owners.find(buffer);
    if (owner != owners.end() && tensor->view_src) {
        for (const Cells &cells : owner->second->layers) {
            if (!cells.contains(tensor->data) || !cells.contains((const char *)data) || size != cells.slot_bytes) continue;
            const auto needed = owner->second->copied_cells.find(cells.slot_of(tensor->data));
            if (needed != owner->second->copied_cells.end()) size = std::min(size, needed->second * cells.cell_bytes);
        }
    }
    usual.set_tensor(buffer, tensor, data, offset, size);
}

void leave(KvMemory *memory) {
    if (!--memory->users) delete memory;
}

void free_buffer(Buffer *buffer) {
    munmap(buffer->context, buffer->size);
    const auto owner = owners.find(buffer);
    if (owner == owners.end()) return;
    leave(owner->second);
    owners.erase(owner);
}

// Null where there are no addresses; ggml reports that.
Buffer *make_buffer(BufferType *type, size_t size) {
    if (!opened || !size) return make_usual(type, size);
    void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_NOHUGEPAGE
    madvise(memory, size, MADV_NOHUGEPAGE);  // a large page would hold many tokens of one layer
#endif
    BufferCalls calls = usual;
    calls.free = free_buffer;
    calls.init_tensor = init_tensor;
    calls.set_tensor = set_tensor;
    calls.clear = clear;
    Buffer *buffer = ggml.make_buffer(type, calls, memory, size);
    owners[buffer] = opened;
    opened->users++;
    return buffer;
}

// Between `open` and `close` all new CPU buffers are of this kind. `close` returns the cache, null if it has no keys.
void open() {
    BufferType *type = ggml.cpu_buffers();
    make_usual = type->calls.make_buffer;
    static const Buffer *example = make_usual(type, 64);
    usual = example->calls;
    type->calls.make_buffer = make_buffer;
    opened = new KvMemory;
}

KvMemory *close() {
    ggml.cpu_buffers()->calls.make_buffer = make_usual;
    KvMemory *memory = opened;
    opened = nullptr;
    const bool is_used = memory->users > 1 && !memory->layers.empty();
    leave(memory);
    return is_used ? memory : nullptr;
}

// Copies into `slot` copy its first `cells` cells, until `forget_copies`.
void limit_copy(KvMemory &memory, size_t slot, size_t cells) {
    size_t &limit = memory.copied_cells[slot];
    limit = std::max(limit, cells);
}

void forget_copies(KvMemory &memory) { memory.copied_cells.clear(); }

// Where the keys or the values of one layer are. `cache`: counts the caches from 0, in the order of their allocation.
struct CellsPlace {
    char *data;
    size_t cell_bytes, slot_bytes;
    int32_t type, cache, are_values;
};

// Writes the places of all keys and values, at most `most`, in llama.cpp's order. Returns how many there are.
size_t cells_places(const KvMemory &memory, CellsPlace *places, size_t most) {
    int32_t cache = -1;
    const Buffer *last = nullptr;
    for (size_t i = 0; i < memory.layers.size() && i < most; i++) {
        const Cells &cells = memory.layers[i];
        cache += cells.buffer != last;
        last = cells.buffer;
        places[i] = {cells.data, cells.cell_bytes, cells.slot_bytes, cells.type, cache, cells.are_values};
    }
    return memory.layers.size();
}

// Gives back the memory of a slot's cells from `first` on.
void release_cells(KvMemory &memory, size_t slot, size_t first) {
    for (const Cells &cells : memory.layers) {
        char *begin = cells.data + slot * cells.slot_bytes;
        drop_pages(begin + first * cells.cell_bytes, begin + cells.slot_bytes);
    }
}

}  // namespace
}  // namespace kv_buffers

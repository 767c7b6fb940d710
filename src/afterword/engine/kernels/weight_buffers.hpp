// Memory for weights, as ggml sees it: large pages, in which rows lie as products read them (packing.hpp).
//
// llama.cpp puts a matrix here if the accelerator can multiply with it, and copies it from the file. Whatever else needs it
// is given a copy as it lies in the file, by ggml itself.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ggml.hpp"
#include "matmul.hpp"

namespace memory {
namespace {

constexpr size_t PAGE = 2 << 20;  // a large one
constexpr size_t ALIGNMENT = 64;

// Addresses from the system, of which some whole large pages are used.
struct Area {
    void *all;
    size_t size;

    char *base() const { return (char *)(((uintptr_t)all + PAGE - 1) / PAGE * PAGE); }
};

Area &area_of(Buffer *buffer) { return *(Area *)buffer->context; }

void free_buffer(Buffer *buffer) {
    munmap(area_of(buffer).all, area_of(buffer).size);
    delete &area_of(buffer);
}
void *base_of(Buffer *buffer) { return area_of(buffer).base(); }
void clear(Buffer *buffer, uint8_t value) { std::memset(base_of(buffer), value, buffer->size); }

// A view begins within what it is a view of.
const Tensor *whole(const Tensor *tensor, size_t &offset) {
    if (!tensor->view_src) return tensor;
    offset += tensor->data - tensor->view_src->data;
    return tensor->view_src;
}

void set_tensor(Buffer *, Tensor *tensor, const void *data, size_t offset, size_t size) {
    const Tensor *weights = whole(tensor, offset);
    products::pack(weights, (const char *)data, offset, size, threads);
}
void get_tensor(Buffer *, const Tensor *tensor, void *data, size_t offset, size_t size) {
    const Tensor *weights = whole(tensor, offset);
    products::unpack(weights, (char *)data, offset, size);
}

const char *type_name(BufferType *) { return "Afterword"; }
size_t alignment_of(BufferType *) { return ALIGNMENT; }
size_t size_of(BufferType *, const Tensor *tensor) { return products::packed_size(tensor); }

// Null where the system has no more; ggml says so.
Buffer *make_buffer(BufferType *type, size_t size) {
    const size_t whole = size + PAGE;
    void *all = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    Area *area = new Area{all, whole};
#ifdef MADV_HUGEPAGE
    madvise(area->base(), size, MADV_HUGEPAGE);
#endif
    const BufferCalls calls = {free_buffer, base_of, nullptr, nullptr, set_tensor, get_tensor, {}, nullptr, clear, nullptr};
    return ggml.make_buffer(type, calls, area, size);
}

BufferType buffer_type = {{type_name, make_buffer, alignment_of, nullptr, size_of, nullptr}, nullptr, nullptr};

// Whether there is a tensor, and lies here.
bool holds(const Tensor *tensor) { return tensor && tensor->buffer && tensor->buffer->type == &buffer_type; }

}  // namespace
}  // namespace memory

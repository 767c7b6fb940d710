// A ggml buffer type for weights: large pages that hold packed weights (packing.hpp).
//
// llama.cpp puts a matrix into such a buffer if the device supports its product, and `set_tensor` packs it. For operations of
// other backends ggml copies the matrix with `get_tensor`, which restores the order of the file.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ggml.hpp"
#include "matmul.hpp"

namespace memory {
namespace {

constexpr size_t PAGE = 2 << 20;  // bytes of a large page
constexpr size_t ALIGNMENT = 64;

// A range of mapped addresses. The buffer begins at the first whole large page in it.
struct Mapping {
    void *all;
    size_t size;

    char *base() const { return (char *)all + (PAGE - (uintptr_t)all % PAGE) % PAGE; }
};

Mapping &mapping_of(Buffer *buffer) { return *(Mapping *)buffer->context; }

void free_buffer(Buffer *buffer) {
    munmap(mapping_of(buffer).all, mapping_of(buffer).size);
    delete &mapping_of(buffer);
}
void *base_of(Buffer *buffer) { return mapping_of(buffer).base(); }
void clear(Buffer *buffer, uint8_t value) { std::memset(base_of(buffer), value, buffer->size); }

// The tensor that owns the memory of a view. Adds the view's offset in bytes to `offset`.
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

// Null where there is no memory; ggml reports that.
Buffer *make_buffer(BufferType *type, size_t size) {
    const size_t mapped = size + PAGE;
    void *all = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    Mapping *mapping = new Mapping{all, mapped};
#ifdef MADV_HUGEPAGE
    madvise(mapping->base(), size, MADV_HUGEPAGE);
#endif
    const BufferCalls calls = {free_buffer, base_of, nullptr, nullptr, set_tensor, get_tensor, {}, nullptr, clear, nullptr};
    return ggml.make_buffer(type, calls, mapping, size);
}

BufferType buffer_type_2 = {{type_name, make_buffer, alignment_of, nullptr, size_of, nullptr}, nullptr, nullptr};
BufferType3 buffer_type_3 = {
    {type_name, make_buffer, nullptr, alignment_of, nullptr, size_of, nullptr, nullptr}, nullptr, nullptr};
BufferType *buffer_type = &buffer_type_2;  // in the form of ggml's version of the interface

// Whether `tensor` is not null and its memory is a buffer of this type.
bool holds(const Tensor *tensor) { return tensor && tensor->buffer && tensor->buffer->type == buffer_type; }

}  // namespace
}  // namespace memory

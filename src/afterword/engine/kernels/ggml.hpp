// Copies of the declarations of ggml's backend interface (ggml-backend-impl.h, GGML_BACKEND_API_VERSION 2 and 3) that the
// accelerator needs. ggml does not install that header. accelerator.py compares ggml's version, the version of the interface
// and the size of a tensor before it registers the device.

#pragma once

#include <cstddef>
#include <cstdint>

struct Buffer;

struct Tensor {
    int32_t type;
    Buffer *buffer;
    int64_t ne[4];  // elements
    size_t nb[4];   // strides in bytes
    int32_t op;
    int32_t params[16];
    int32_t flags;
    Tensor *src[10];
    Tensor *view_src;
    size_t view_offset;
    char *data;
    char name[64];
    void *extra;
    char padding[8];
};

struct Device;
struct Backend;
struct Graph;

struct BufferType {
    struct {
        const char *(*get_name)(BufferType *);
        Buffer *(*make_buffer)(BufferType *, size_t);
        size_t (*get_alignment)(BufferType *);
        size_t (*get_largest)(BufferType *);
        size_t (*get_size)(BufferType *, const Tensor *);
        bool (*is_host)(BufferType *);
    } calls;
    Device *device;
    void *context;
};

// `BufferType` in version 3 of the interface.
struct BufferType3 {
    struct {
        const char *(*get_name)(BufferType *);
        Buffer *(*make_buffer)(BufferType *, size_t);
        void *make_buffers;
        size_t (*get_alignment)(BufferType *);
        size_t (*get_largest)(BufferType *);
        size_t (*get_size)(BufferType *, const Tensor *);
        void *get_sizes;
        bool (*is_host)(BufferType *);
    } calls;
    Device *device;
    void *context;
};

struct BufferCalls {
    void (*free)(Buffer *);
    void *(*get_base)(Buffer *);
    int (*init_tensor)(Buffer *, Tensor *);
    void (*fill_tensor)(Buffer *, Tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(Buffer *, Tensor *, const void *, size_t, size_t);
    void (*get_tensor)(Buffer *, const Tensor *, void *, size_t, size_t);
    void *tensors_2d[2];
    bool (*copy_tensor)(Buffer *, const Tensor *, Tensor *);
    void (*clear)(Buffer *, uint8_t);
    void (*reset)(Buffer *);
};

struct Buffer {
    BufferCalls calls;
    BufferType *type;
    void *context;
    size_t size;
    int usage;
};

struct Properties {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char *id;
    bool async, host_buffer, buffer_from_host, events, mmap;
};

struct Backend {
    uint8_t (*guid)[16];
    const char *(*get_name)(Backend *);
    void (*free)(Backend *);
    void *transfers_and_plans[10];
    int (*compute)(Backend *, Graph *);
    void *events_and_order[3];
    Device *device;
    void *context;
};

struct Registry;

struct Device {
    const char *(*get_name)(Device *);
    const char *(*get_description)(Device *);
    void (*get_memory)(Device *, size_t *, size_t *);
    int (*get_type)(Device *);
    void (*get_properties)(Device *, Properties *);
    Backend *(*make_backend)(Device *, const char *);
    BufferType *(*get_buffer_type)(Device *);
    void *host_buffer_type;
    void *buffer_from_host;
    bool (*supports_operation)(Device *, const Tensor *);
    bool (*supports_buffers)(Device *, BufferType *);
    void *offload_and_events[4];
    Registry *registry;
    void *context;
};

struct Registry {
    int version;
    const char *(*get_name)(Registry *);
    size_t (*count)(Registry *);
    Device *(*get_device)(Registry *, size_t);
    void *(*get_address)(Registry *, const char *);
    void *context;
};

// Addresses of the ggml functions that are called. accelerator.py fills them in, in this order.
struct Ggml {
    BufferType *(*cpu_buffers)();
    bool (*is_host)(BufferType *);
    Buffer *(*make_buffer)(BufferType *, BufferCalls, void *, size_t);
    int (*graph_size)(Graph *);
    Tensor *(*graph_node)(Graph *, int);
    const char *(*operation_name)(int);
};

namespace {

Ggml ggml;
int threads = 1;  // the number that computes an operation

constexpr int ACCELERATOR = 3, TO_COMPUTE = 16;
constexpr int F32 = 0, F16 = 1, I32 = 26, I64 = 27;  // ggml_type

bool rows_are_dense(const Tensor *x, size_t element) { return x->nb[0] == element; }

}  // namespace

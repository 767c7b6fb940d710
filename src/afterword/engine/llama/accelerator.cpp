// An accelerator beside the CPU, as ggml sees it: it can do attention and products with weights, and ggml gives it
// these and keeps the rest. Both are computed so that a token's numbers do not depend on who else is computed.

#include <cstring>

#include "attention.hpp"
#include "ggml.hpp"
#include "memory.hpp"
#include "products.hpp"
#include "team.hpp"

namespace {

bool keeps_weights = false;
struct {
    int attentions, attentions_left, products_left;  // to the library
} asked;  // by ggml since accelerator_listen

bool is(const Tensor *node, const char *operation) { return !std::strcmp(ggml.operation_name(node->op), operation); }

uint8_t guid[16] = {0x5d, 0x1f, 0x22, 0x8a, 0x6e, 0x0b, 0x4c, 0x93, 0xa7, 0x35, 0xe1, 0x58, 0x90, 0xcc, 0x17, 0x46};
const char *name_of(Device *) { return "Afterword"; }
const char *description_of(Device *) { return "what takes long, so that it does not depend on company"; }
void memory_of(Device *, size_t *free, size_t *total) { *free = *total = 0; }
int type_of(Device *) { return ACCELERATOR; }
void properties_of(Device *device, Properties *to) {
    *to = {name_of(device), description_of(device), 0, 0, ACCELERATOR, nullptr, false, false, false, false, true};
}
BufferType *usual_buffers(Device *) { return ggml.cpu_buffers(); }
BufferType *buffers_for_weights(Device *device) { return keeps_weights ? &memory::the_type : usual_buffers(device); }
bool takes_buffers(Device *, BufferType *type) { return ggml.is_host(type) || type == &memory::the_type; }
bool takes_operation(Device *, const Tensor *node) {
    if (is(node, "NONE")) return memory::holds(node);
    const bool product = is(node, "MUL_MAT"), attention = is(node, "FLASH_ATTN_EXT");
    const bool can = product ? products::takes(node) : attention && attention::takes(node);
    asked.attentions += attention;
    asked.attentions_left += attention && !can;
    asked.products_left += (product && !can) || is(node, "MUL_MAT_ID");
    return can;
}

const char *backend_name(Backend *) { return "Afterword"; }
void end_backend(Backend *backend) { delete backend; }
int compute_graph(Backend *, Graph *graph) {
    for (int i = 0; i < ggml.graph_size(graph); i++) {
        const Tensor *node = ggml.graph_node(graph, i);
        if (!(node->flags & TO_COMPUTE)) continue;
        if (is(node, "MUL_MAT")) products::compute(node, threads, memory::holds(node->src[0]));
        else if (is(node, "FLASH_ATTN_EXT")) attention::compute(node, threads);
    }
    return 0;
}
Backend *make_backend(Device *, const char *);

// As llama.cpp's loader sees it, which asks where to put weights; and as its scheduler does, which asks for whatever is
// computed in between.
Device the_device = {name_of, description_of, memory_of, type_of, properties_of, make_backend, buffers_for_weights,
                     nullptr, nullptr, takes_operation, takes_buffers, {}, nullptr, nullptr};
Device at_work = {name_of, description_of, memory_of, type_of, properties_of, make_backend, usual_buffers,
                  nullptr, nullptr, takes_operation, takes_buffers, {}, nullptr, nullptr};

Backend *make_backend(Device *, const char *) {
    return new Backend{&guid, backend_name, end_backend, {}, compute_graph, {}, &at_work, nullptr};
}

const char *registry_name(Registry *) { return "Afterword"; }
size_t one_device(Registry *) { return 1; }
Device *first_device(Registry *, size_t) { return &the_device; }
void *address_of(Registry *, const char *) { return nullptr; }
Registry the_registry = {API_VERSION, registry_name, one_device, first_device, address_of, nullptr};

}  // namespace

extern "C" {

// Bytes of a tensor as declared here, to be compared with the library's.
size_t accelerator_tensor_size() { return sizeof(Tensor); }

// What to register with ggml.
void *accelerator_registry(const Ggml *addresses) {
    ggml = *addresses;
    the_device.registry = at_work.registry = &the_registry;
    memory::the_type.device = &the_device;
    return &the_registry;
}

// From here on is counted what ggml asks about.
void accelerator_listen() { asked = {}; }

// Whether there was attention to compute, and none was left to the library.
int accelerator_attends() { return asked.attentions && !asked.attentions_left; }

// Whether no product was left to the library.
int accelerator_multiplies_all() { return !asked.products_left; }

// Whether products of quantized weights are computed here.
int accelerator_multiplies() { return products::AVAILABLE; }

// How many threads compute, and whether models that are loaded from now on have their weights copied to memory of ours.
void accelerator_prepare(int count, int keeps) {
    threads = count;
    keeps_weights = keeps && products::AVAILABLE;
}

// Threads are of our team from here on, or OpenMP's. Returns what runs work in them, null for OpenMP.
void *accelerator_lead(int alone) { return (void *)(of_the_team = alone ? run_team : nullptr); }

void *accelerator_memory() { return &memory::the_type; }

// One operation by itself: what the tests compare.
void attention_compute(const Tensor *node, int count) { attention::compute(node, count); }
int products_takes(const Tensor *node) { return products::takes(node); }
void products_compute(const Tensor *node, int count) { products::compute(node, count, memory::holds(node->src[0])); }
}

// An accelerator beside the CPU, as ggml sees it: it can do attention, products with weights and most of what lies between
// them; ggml gives it these and keeps the rest. All is computed so that a token's numbers do not depend on who else is.

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "attention.hpp"
#include "elementwise.hpp"
#include "ggml.hpp"
#include "weight_buffers.hpp"
#include "matmul.hpp"
#include "thread_pool.hpp"

namespace {

bool has_products = false;  // of models that are loaded from now on, whose weights are copied to memory of ours
struct {
    int attentions, attentions_left;  // left to the library
    uint64_t types_left;              // of matrices whose products are left: a bit for each of ggml's types
    int others_left;                  // products of what was computed, and of experts
} asked;  // by ggml since accelerator_listen

struct Operation {
    const char *name;
    bool (*supports)(const Tensor *);
    void (*compute)(const Tensor *, int threads);
};

void multiply(const Tensor *node, int threads) { products::compute(node, threads, memory::holds(node->src[0])); }

template <class Kind>
constexpr Operation short_one{Kind::NAME, Kind::supports, Kind::compute};

const Operation PRODUCT{"MUL_MAT", products::supports, multiply};
const Operation ATTENTION{"FLASH_ATTN_EXT", attention::supports, attention::compute};
const Operation *const OPERATIONS[] = {
    &PRODUCT, &ATTENTION, &short_one<elementwise::RmsNorm>, &short_one<elementwise::Sum>, &short_one<elementwise::Mul>,
    &short_one<elementwise::SwiGLU>, &short_one<elementwise::Rope>, &short_one<elementwise::SetRows>, &short_one<elementwise::GetRows>,
};

const Operation *named(const char *name) {
    for (const Operation *operation : OPERATIONS)
        if (!std::strcmp(operation->name, name)) return operation;
    return nullptr;
}

bool is(const Tensor *node, const char *name) { return !std::strcmp(ggml.operation_name(node->op), name); }

// What a node is, null if it is nothing of ours. Names are compared once for each number.
const Operation *operation_of(const Tensor *node) {
    static std::unordered_map<int32_t, const Operation *> known;
    const auto [place, fresh] = known.try_emplace(node->op, nullptr);
    if (fresh) place->second = named(ggml.operation_name(node->op));
    return place->second;
}

// What lies between products is left to the library with them: it would change hands more often, not less.
bool can(const Operation *operation, const Tensor *node) {
    if (!operation || !operation->supports(node)) return false;
    if (operation == &PRODUCT || operation == &ATTENTION) return true;
    return has_products && std::none_of(node->src, node->src + 3, memory::holds);
}

uint8_t guid[16] = {0x5d, 0x1f, 0x22, 0x8a, 0x6e, 0x0b, 0x4c, 0x93, 0xa7, 0x35, 0xe1, 0x58, 0x90, 0xcc, 0x17, 0x46};
const char *name_of(Device *) { return "Afterword"; }
const char *description_of(Device *) { return "what takes long, so that it does not depend on company"; }
void memory_of(Device *, size_t *free, size_t *total) { *free = *total = 0; }
int type_of(Device *) { return ACCELERATOR; }
void properties_of(Device *device, Properties *to) {
    *to = {name_of(device), description_of(device), 0, 0, ACCELERATOR, nullptr, false, false, false, false, true};
}
BufferType *usual_buffers(Device *) { return ggml.cpu_buffers(); }
BufferType *buffers_for_weights(Device *device) { return has_products ? &memory::buffer_type : usual_buffers(device); }
bool supports_buffers(Device *, BufferType *type) { return ggml.is_host(type) || type == &memory::buffer_type; }
// Whether weights may lie in our memory that this is done with.
bool supports_weights(Device *, const Tensor *node) { return is(node, PRODUCT.name) && products::supports(node); }
void note_product(const Tensor *matrix) {
    if (products::of_model(matrix)) asked.types_left |= 1ull << matrix->type;
    else asked.others_left++;
}
bool supports_operation(Device *, const Tensor *node) {
    if (is(node, "NONE")) return memory::holds(node);
    const Operation *operation = operation_of(node);
    const bool supports = can(operation, node);
    asked.attentions += operation == &ATTENTION;
    asked.attentions_left += operation == &ATTENTION && !supports;
    if (operation == &PRODUCT && !supports) note_product(node->src[0]);
    asked.others_left += is(node, "MUL_MAT_ID");
    return supports;
}

const char *backend_name(Backend *) { return "Afterword"; }
void end_backend(Backend *backend) { delete backend; }
int compute_graph(Backend *, Graph *graph) {
    for (int i = 0; i < ggml.graph_size(graph); i++) {
        const Tensor *node = ggml.graph_node(graph, i);
        if (!(node->flags & TO_COMPUTE)) continue;
        if (const Operation *operation = operation_of(node)) operation->compute(node, threads);
    }
    return 0;
}
Backend *make_backend(Device *, const char *);

// As llama.cpp's loader sees it, which asks where to put weights; and as its scheduler does, which asks for whatever is
// computed in between.
Device the_device = {name_of, description_of, memory_of, type_of, properties_of, make_backend, buffers_for_weights,
                     nullptr, nullptr, supports_weights, supports_buffers, {}, nullptr, nullptr};
Device at_work = {name_of, description_of, memory_of, type_of, properties_of, make_backend, usual_buffers,
                  nullptr, nullptr, supports_operation, supports_buffers, {}, nullptr, nullptr};

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
    memory::buffer_type.device = &the_device;
    return &the_registry;
}

// From here on is counted what ggml asks about.
void accelerator_listen() { asked = {}; }

// Whether there was attention to compute, and none was left to the library.
int accelerator_attends() { return asked.attentions && !asked.attentions_left; }

// The types of the model's matrices whose products were left to the library: a bit for each of ggml's types.
uint64_t accelerator_types_left() { return asked.types_left; }

// How many products were left to it of which no operand is a matrix of the model, or which are of experts.
int accelerator_others_left() { return asked.others_left; }

// Whether products of quantized weights are computed here.
int accelerator_multiplies() { return products::AVAILABLE; }

// How many threads compute, and whether models that are loaded from now on have their weights copied to memory of ours.
void accelerator_prepare(int count, int keeps) {
    threads = count;
    has_products = keeps && products::AVAILABLE;
}

// Threads are of our team from here on, or OpenMP's. Returns what runs work in them, null for OpenMP.
void *accelerator_lead(int alone) { return (void *)(pool_run = alone ? run_in_pool : nullptr); }

void *accelerator_memory() { return &memory::buffer_type; }

// One operation by itself, by ggml's name: what the tests compare.
int operation_takes(const char *name, const Tensor *node) { return named(name)->supports(node); }
void operation_compute(const char *name, const Tensor *node, int count) { named(name)->compute(node, count); }
}

// A ggml device of type accelerator: it computes attention, products with weights and most elementwise operations; ggml's
// own CPU backend computes the rest. A token's numbers do not depend on the other tokens of the pass.
//
// State: the settings of `accelerator_configure` and the counts since `accelerator_start_recording`. ggml calls the functions of this
// file from one thread.

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "activations.hpp"
#include "attention.hpp"
#include "copies.hpp"
#include "elementwise.hpp"
#include "expert_matmul.hpp"
#include "ggml.hpp"
#include "ggml_checks.hpp"
#include "head_matmul.hpp"
#include "kv_buffers.hpp"
#include "weight_buffers.hpp"
#include "matmul.hpp"
#include "openmp.hpp"
#include "recurrence.hpp"
#include "routing.hpp"
#include "state_cache.hpp"
#include "thread_pool.hpp"

namespace {

bool has_products = false;  // whether models that are loaded from now on get packed weights and products computed here
// Operations that ggml offered since `accelerator_start_recording`. "Unsupported": `supports` refused them.
struct {
    int attentions, unsupported_attentions;
    uint64_t unsupported_types;  // of weight matrices that ggml multiplies: a bit for each of ggml's types
    int unsupported_products;    // products of two computed matrices
    int unsupported_experts;     // products of the matrices of selected experts
    int unsupported_recurrences;
} offered;

struct Operation {
    const char *name;
    bool (*supports)(const Tensor *);
    void (*compute)(const Tensor *, int threads);
};

bool supports_product(const Tensor *node) {
    return products::supports(node) || products::supports_heads(node) || products::supports_short(node);
}

void multiply(const Tensor *node, int threads) {
    const Tensor *matrix = node->src[0];
    if (products::is_short(node)) products::compute_short(node, threads);
    else if (matrix->ne[2] > 1) products::compute_heads(node, threads, memory::holds(matrix));
    else products::compute(node, threads, memory::holds(matrix));
}

void multiply_experts(const Tensor *node, int threads) { products::compute_experts(node, threads, memory::holds(node->src[0])); }

template <class Kind>
constexpr Operation elementwise_operation{Kind::NAME, Kind::supports, Kind::compute};

const Operation PRODUCT{"MUL_MAT", supports_product, multiply};
const Operation EXPERT_PRODUCT{"MUL_MAT_ID", products::supports_experts, multiply_experts};
const Operation ATTENTION{"FLASH_ATTN_EXT", attention::supports, attention::compute};
const Operation *const OPERATIONS[] = {
    &PRODUCT,
    &EXPERT_PRODUCT,
    &ATTENTION,
    &elementwise_operation<elementwise::RmsNorm>,
    &elementwise_operation<elementwise::Norm>,
    &elementwise_operation<elementwise::Sum>,
    &elementwise_operation<elementwise::Difference>,
    &elementwise_operation<elementwise::Mul>,
    &elementwise_operation<elementwise::Div>,
    &elementwise_operation<elementwise::Rope>,
    &elementwise_operation<elementwise::SetRows>,
    &elementwise_operation<elementwise::GetRows>,
    &elementwise_operation<activations::Unary>,
    &elementwise_operation<activations::Gate>,
    &elementwise_operation<activations::SquareOperation>,
    &elementwise_operation<activations::RootOperation>,
    &elementwise_operation<copies::Cont>,
    &elementwise_operation<copies::Copy>,
    &elementwise_operation<copies::Concat>,
    &elementwise_operation<copies::Repeat>,
    &elementwise_operation<copies::Fill>,
    &elementwise_operation<routing::SoftMax>,
    &elementwise_operation<routing::Argsort>,
    &elementwise_operation<routing::TopK>,
    &elementwise_operation<routing::SumRows>,
    &elementwise_operation<routing::Mean>,
    &elementwise_operation<routing::Clamp>,
    &elementwise_operation<routing::Scale>,
    &elementwise_operation<routing::AddExpertRows>,
    &elementwise_operation<recurrence::Convolution>,
    &elementwise_operation<recurrence::DeltaNet>,
};

// ggml's operations over the tokens of a sequence. They take so long that ggml computes them with several threads.
const char *const RECURRENCES[] = {"SSM_CONV",  "SSM_SCAN",  "GATED_DELTA_NET", "GATED_LINEAR_ATTN",
                                   "RWKV_WKV6", "RWKV_WKV7", "CUMSUM",          "SOLVE_TRI"};

const Operation *named(const char *name) {
    for (const Operation *operation : OPERATIONS)
        if (!std::strcmp(operation->name, name)) return operation;
    return nullptr;
}

bool is_recurrence(const Tensor *node) {
    const char *name = ggml.operation_name(node->op);
    return std::any_of(std::begin(RECURRENCES), std::end(RECURRENCES), [=](const char *each) { return !std::strcmp(each, name); });
}

bool is(const Tensor *node, const char *name) { return !std::strcmp(ggml.operation_name(node->op), name); }

// The operation that computes a node; null if there is none here. Each of ggml's operation numbers is looked up by name once.
const Operation *operation_of(const Tensor *node) {
    static std::unordered_map<int32_t, const Operation *> known;
    const auto [place, fresh] = known.try_emplace(node->op, nullptr);
    if (fresh) place->second = named(ggml.operation_name(node->op));
    return place->second;
}

// Elementwise operations are refused where products are: each change between ggml's backend and this one costs more than the
// operation saves.
bool can(const Operation *operation, const Tensor *node) {
    if (!operation || !operation->supports(node)) return false;
    if (operation == &PRODUCT || operation == &ATTENTION) return true;
    if (operation == &EXPERT_PRODUCT) return has_products;
    return has_products && std::none_of(node->src, node->src + 3, memory::holds);
}

uint8_t guid[16] = {0x5d, 0x1f, 0x22, 0x8a, 0x6e, 0x0b, 0x4c, 0x93, 0xa7, 0x35, 0xe1, 0x58, 0x90, 0xcc, 0x17, 0x46};
const char *name_of(Device *) { return "Afterword"; }
const char *description_of(Device *) { return "attention and products whose bits do not depend on the batch"; }
void memory_of(Device *, size_t *free, size_t *total) { *free = *total = 0; }
int type_of(Device *) { return ACCELERATOR; }
void properties_of(Device *device, Properties *to) {
    *to = {name_of(device), description_of(device), 0, 0, ACCELERATOR, nullptr, false, false, false, false, true};
}
BufferType *usual_buffers(Device *) { return ggml.cpu_buffers(); }
BufferType *buffers_for_weights(Device *device) { return has_products ? memory::buffer_type : usual_buffers(device); }
bool supports_buffers(Device *, BufferType *type) { return ggml.is_host(type) || type == memory::buffer_type; }
// The weights of single heads that graphs multiply as they are stored (MLA). RWKV 6 has weights of the same form
// (`time_mix_w2`) and reshapes them first, which packed weights do not permit.
bool is_for_heads(const Tensor *weights) {
    return std::strstr(weights->name, ".attn_k_b.") || std::strstr(weights->name, ".attn_v_b.");
}
// Whether the weights of this operation may be packed. llama.cpp's loader asks before it chooses a buffer type.
bool supports_weights(Device *, const Tensor *node) {
    if (is(node, EXPERT_PRODUCT.name)) return products::supports_experts(node) && products::experts_can_be_packed(node->src[0]);
    if (!is(node, PRODUCT.name)) return false;
    if (products::supports(node)) return true;
    return is_for_heads(node->src[0]) && products::supports_heads(node) && products::experts_can_be_packed(node->src[0]);
}
void count_unsupported_product(const Tensor *matrix) {
    if (products::of_model(matrix)) offered.unsupported_types |= 1ull << matrix->type;
    else offered.unsupported_products++;
}
bool supports_operation(Device *, const Tensor *node) {
    if (is(node, "NONE")) return memory::holds(node);
    const Operation *operation = operation_of(node);
    const bool supports = can(operation, node);
    offered.attentions += operation == &ATTENTION;
    offered.unsupported_attentions += operation == &ATTENTION && !supports;
    if (operation == &PRODUCT && !supports) count_unsupported_product(node->src[0]);
    offered.unsupported_experts += operation == &EXPERT_PRODUCT && !supports;
    offered.unsupported_recurrences += !supports && is_recurrence(node);
    return supports;
}

const char *backend_name(Backend *) { return "Afterword"; }
void end_backend(Backend *backend) { delete backend; }
int compute_graph(Backend *, Graph *graph) {
    static std::vector<const Tensor *> nodes;
    nodes.clear();
    for (int i = 0; i < ggml.graph_size(graph); i++) nodes.push_back(ggml.graph_node(graph, i));
    const state_cache::Plan plan(nodes, [](const Tensor *node) {
        const Operation *operation = operation_of(node);
        return operation ? operation->name : nullptr;
    });
    for (int i = 0; i < (int)nodes.size(); i++) {
        const Tensor *node = nodes[i];
        if (!(node->flags & TO_COMPUTE) || plan.skips(i) || plan.compute(i, threads)) continue;
        if (const Operation *operation = operation_of(node)) operation->compute(node, threads);
    }
    return 0;
}
Backend *make_backend(Device *, const char *);

// ggml sees two devices. `loader_device` is registered: llama.cpp's loader asks it where to put weights. `compute_device`
// belongs to the backend: ggml's scheduler asks it which operations it supports and which buffers to use for results.
Device loader_device = {
    name_of, description_of,   memory_of,        type_of, properties_of, make_backend, buffers_for_weights, nullptr,
    nullptr, supports_weights, supports_buffers, {},      nullptr,       nullptr};
Device compute_device = {
    name_of, description_of,     memory_of,        type_of, properties_of, make_backend, usual_buffers, nullptr,
    nullptr, supports_operation, supports_buffers, {},      nullptr,       nullptr};

Backend *make_backend(Device *, const char *) {
    return new Backend{&guid, backend_name, end_backend, {}, compute_graph, {}, &compute_device, nullptr};
}

const char *registry_name(Registry *) { return "Afterword"; }
size_t one_device(Registry *) { return 1; }
Device *first_device(Registry *, size_t) { return &loader_device; }
void *address_of(Registry *, const char *) { return nullptr; }
Registry the_registry = {0, registry_name, one_device, first_device, address_of, nullptr};

}  // namespace

extern "C" {

// The size of `Tensor` in bytes, which accelerator.py compares with ggml's.
size_t accelerator_tensor_size() { return sizeof(Tensor); }

// The version of ggml's backend interface; 0 if the device is not where it is declared. `registry`, `device`: a registry of ggml's
// and its device.
int accelerator_interface(const Registry *registry, const Device *device) {
    return device->registry == registry ? registry->version : 0;
}

// The registry to pass to ggml_backend_register. `addresses`: ggml's functions. `version`: of the interface, 2 or 3.
void *accelerator_registry(const Ggml *addresses, int version) {
    ggml = *addresses;
    the_registry.version = version;
    loader_device.registry = compute_device.registry = &the_registry;
    memory::buffer_type_2.device = memory::buffer_type_3.device = &loader_device;
    if (version >= 3) memory::buffer_type = (BufferType *)&memory::buffer_type_3;
    return &the_registry;
}

// Sets all counts to zero.
void accelerator_start_recording() { offered = {}; }

// Whether ggml offered (flash) attention, and whether all of it is computed here.
int accelerator_offers_attention() { return offered.attentions > 0; }
int accelerator_computes_all_attention() { return offered.attentions && !offered.unsupported_attentions; }

// The types of weight matrices that ggml multiplies: a bit for each of ggml's types.
uint64_t accelerator_unsupported_types() { return offered.unsupported_types; }

// The number of products left to ggml that have no weight matrix as an operand.
int accelerator_unsupported_products() { return offered.unsupported_products; }

// The number of products of experts' matrices that are left to ggml.
int accelerator_unsupported_experts() { return offered.unsupported_experts; }

// The number of operations over the tokens of sequences that are left to ggml.
int accelerator_unsupported_recurrences() { return offered.unsupported_recurrences; }

// Whether the library was compiled for a processor that has the instructions for products of bytes.
int accelerator_supports_quantized() { return products::AVAILABLE; }

// Sets the number of threads, and whether models that are loaded from now on get packed weights.
void accelerator_configure(int count, int packs_weights) {
    threads = count;
    has_products = packs_weights && products::AVAILABLE;
}

// Sets the functions of the OpenMP library that llama.cpp uses.
void accelerator_set_openmp(const OpenMp *functions) { openmp = *functions; }

// Chooses the thread pool (`alone`) or OpenMP for all following operations, and returns its `Run`. Without OpenMP's functions it
// is the pool in any case.
void *accelerator_use_thread_pool(int alone) {
    return (void *)(chosen_run = alone || !openmp.parallel ? run_in_pool : run_in_openmp);
}

// Creates contexts, until `accelerator_kv_close`, with KV caches that take memory as tokens are written (kv_buffers.hpp).
void accelerator_kv_open() { kv_buffers::open(); }

// The KV memory of the context that was created since `accelerator_kv_open`; null if there is none.
void *accelerator_kv_close() { return kv_buffers::close(); }

// Before a copy to `slot`: the copies until `accelerator_kv_copied` need only the first `cells` cells.
void accelerator_kv_limit_copy(void *memory, size_t slot, size_t cells) {
    kv_buffers::limit_copy(*(kv_buffers::KvMemory *)memory, slot, cells);
}
void accelerator_kv_copied(void *memory) { kv_buffers::forget_copies(*(kv_buffers::KvMemory *)memory); }

// Gives back the memory of a slot's cells from `first` on.
void accelerator_kv_release(void *memory, size_t slot, size_t first) {
    kv_buffers::release_cells(*(kv_buffers::KvMemory *)memory, slot, first);
}

// Where the keys and values are: see `kv_buffers::cells_places`.
size_t accelerator_kv_places(const void *memory, kv_buffers::CellsPlace *places, size_t most) {
    return kv_buffers::cells_places(*(const kv_buffers::KvMemory *)memory, places, most);
}

void *accelerator_buffer_type() { return memory::buffer_type; }

// For tests: one operation, by ggml's name of it.
int operation_supports(const char *name, const Tensor *node) { return named(name)->supports(node); }
void operation_compute(const char *name, const Tensor *node, int count) { named(name)->compute(node, count); }
}

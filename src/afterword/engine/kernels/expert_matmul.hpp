// Products of the matrices of selected experts and activations (ggml's MUL_MAT_ID). The bits of a row of activations do not
// depend on the other rows.
//
// A mixture of experts has many matrices in one tensor, and each token selects some of them. The rows of activations are
// grouped by expert, so that a pass reads the weights of an expert once for all tokens that selected it. A row is computed by
// the code of matmul.hpp with the same order of additions, alone or in a group. Threads divide the tiles of all groups.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ggml.hpp"
#include "matmul.hpp"

namespace products {
namespace {

// Whether the matrix of each expert begins with a whole group of rows, so that packed weights can be used.
bool experts_can_be_packed(const Tensor *weights);
bool supports_experts(const Tensor *node);
void compute_experts(const Tensor *node, int threads, bool packed);

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_FEATURE_DOTPROD)  // as in matmul.hpp

// The columns of one expert: `count` of them from `first` on.
struct ExpertGroup {
    int64_t expert, first, count;
};

// Which columns of a pass use which expert. Column i is the i-th selection: slot `i % used` of token `i / used`.
class Grouping {
    std::vector<int64_t> ends, order;
    std::vector<ExpertGroup> groups;

   public:
    // `expert_of(i)`: the expert of column i, or a number that is no expert's.
    template <class ExpertOf>
    void assign(int64_t columns, int64_t experts, const ExpertOf &expert_of) {
        ends.assign(experts, 0), order.resize(columns), groups.clear();
        for (int64_t i = 0; i < columns; i++)
            if (const int64_t expert = expert_of(i); is_expert(expert)) ends[expert]++;
        int64_t first = 0;
        for (int64_t expert = 0; expert < experts; expert++) {
            const int64_t count = ends[expert];
            if (count) groups.push_back({expert, first, count});
            ends[expert] = first;
            first += count;
        }
        for (int64_t i = 0; i < columns; i++)
            if (const int64_t expert = expert_of(i); is_expert(expert)) order[ends[expert]++] = i;
        order.resize(first);
    }

    bool is_expert(int64_t number) const { return number >= 0 && number < (int64_t)ends.size(); }
    const std::vector<ExpertGroup> &all() const { return groups; }
    const std::vector<int64_t> &columns() const { return order; }  // in the order of the groups
};

// The number of the expert of each column. ggml's tensor may be a view with a larger stride.
struct Selection {
    const Tensor *ids;
    int64_t used;

    int64_t operator()(int64_t i) const { return ((const int32_t *)(ids->data + i / used * ids->nb[1]))[i % used]; }
};

// The address of the results of column `i`.
inline char *results_of(const Tensor *node, int64_t i) {
    return node->data + i / node->ne[1] * node->nb[2] + i % node->ne[1] * node->nb[1];
}

// Multiplies tile `number` (of two groups of rows) of one matrix with its columns. `next`: the memory that is prefetched meanwhile.
template <class Type, class Rows>
void multiply_matrix_tile(const Product<Type, Rows> &op, int64_t number, const char *next) {
    if (op.count > 1) return multiply_tile<Type, Rows, 2>(op, scratch_for<Type, 2>(op.count), number, next);
    // A single column: one group of rows at a time is faster, see matmul.hpp.
    Scratch<Type, 1> &scratch = scratch_for<Type, 1>(1);
    const size_t size = ROWS<1> * op.stride, ahead = op.PACKED ? AHEAD : size;
    const int64_t end = 2 * number + 2;
    for (int64_t half = 2 * number; half < end && half * ROWS<1> < op.rows; half++) {
        const bool last = half + 1 == end;
        const char *here = op.weights + half * size + ahead;
        multiply_tile<Type, Rows, 1>(op, scratch, half, last && !op.PACKED ? next : here);
    }
}

template <class Type, class Rows>
void compute_experts_of_type(const Tensor *node, int threads) {
    const Tensor *weights = node->src[0], *x = node->src[1], *ids = node->src[2];
    static Grouping grouping;  // used by one product at a time
    const int64_t steps = x->ne[0] / STEP, used = ids->ne[0], count = used * ids->ne[1];
    const Selection expert_of{ids, used};
    grouping.assign(count, weights->ne[2], expert_of);
    for (int64_t i = 0; i < count; i++)  // a number that is no expert's must stay visible
        if (float *to = (float *)results_of(node, i); !grouping.is_expert(expert_of(i)))
            std::fill(to, to + node->ne[0], __builtin_nanf(""));
    // A token's activations are rounded once, if all of its experts share them.
    const int64_t of_token = x->ne[1];
    const auto *pieces = prepare_columns<Type>(of_token * x->ne[2], steps, threads, [=](int64_t i) {
        return x->data + i / of_token * x->nb[2] + i % of_token * x->nb[1];
    });
    Column<Type> *const columns = columns_for<Type>(count);
    int64_t filled = 0;
    for (const int64_t i : grouping.columns())
        columns[filled++] = {pieces + (i / used * of_token + i % used % of_token) * steps, results_of(node, i)};

    const std::vector<ExpertGroup> &groups = grouping.all();
    const int64_t tiles = (weights->ne[1] + ROWS<2> - 1) / ROWS<2>, items = tiles * (int64_t)groups.size();
    const size_t size = ROWS<2> * weights->nb[1];
    const auto tile_at = [&](int64_t item) {
        return weights->data + groups[item / tiles].expert * weights->nb[2] + item % tiles * size;
    };
    std::vector<TileQueue> &queues = queues_of(items, threads);
    const auto next = next_weights.after(weights->data, 0, 0, threads);  // which experts come next is not known
    run_threads(threads, [&](int thread) {
        take_tiles(queues, thread, [&](int64_t item) {
            const ExpertGroup &group = groups[item / tiles];
            const Product<Type, Rows> op{weights->data + group.expert * weights->nb[2],
                                         weights->nb[1],
                                         weights->ne[1],
                                         steps,
                                         group.count,
                                         columns + group.first};
            multiply_matrix_tile(op, item % tiles, tile_at(item + 1 < items ? item + 1 : item));
        });
        return next(thread);
    });
}

bool experts_can_be_packed(const Tensor *weights) { return weights->ne[1] % LANE_ROWS == 0; }

// Whether this product can be computed here.
bool supports_experts(const Tensor *node) {
    const Tensor *weights = node->src[0], *x = node->src[1], *ids = node->src[2];
    if (node->type != F32 || x->type != F32 || ids->type != I32) return false;
    if (!rows_are_dense(x, 4) || !rows_are_dense(node, 4) || !rows_are_dense(ids, 4)) return false;
    if (weights->ne[3] != 1 || x->ne[3] != 1 || node->ne[3] != 1 || ids->ne[2] != 1 || ids->ne[3] != 1) return false;
    if (ids->ne[0] % x->ne[1] || node->ne[1] != ids->ne[0] || x->ne[2] != ids->ne[1] || node->ne[2] != ids->ne[1]) return false;
    if (!of_model(weights) || x->ne[0] % STEP || weights->nb[2] != weights->nb[1] * (size_t)weights->ne[1]) return false;
    return KnownTypes::find(weights->type, [](auto) {});
}

// `packed`: the weights are in the order that `pack` writes.
void compute_experts(const Tensor *node, int threads, bool packed) {
    KnownTypes::find(node->src[0]->type, [=](auto type) {
        if (packed) compute_experts_of_type<decltype(type), Packed>(node, threads);
        else compute_experts_of_type<decltype(type), InFile>(node, threads);
    });
}

#else

bool experts_can_be_packed(const Tensor *) { return false; }
bool supports_experts(const Tensor *) { return false; }
void compute_experts(const Tensor *, int, bool) {}

#endif

}  // namespace
}  // namespace products

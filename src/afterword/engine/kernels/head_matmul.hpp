// Products with one matrix for each head, and products with short columns of floats. The bits of a column do not depend on the
// other columns.
//
// Models with latent attention (DeepSeek's MLA) keep one matrix for each head in one tensor: each multiplies the columns of its
// head. A head's columns are computed by the code of matmul.hpp, with the same order of additions. Threads divide the tiles of
// all heads.
//
// Gemma 3n mixes four states of a token with coefficients that it computes: products of two computed matrices with four elements
// in a column, and products of weights of that width.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "elementwise.hpp"
#include "expert_matmul.hpp"
#include "ggml.hpp"
#include "matmul.hpp"
#include "simd.hpp"

namespace products {
namespace {

constexpr int64_t MOST_SHORT = 32;  // elements of a short column, at most

// ---- one matrix for each head

bool supports_heads(const Tensor *node);
void compute_heads(const Tensor *node, int threads, bool packed);

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_FEATURE_DOTPROD)  // as in matmul.hpp

// The columns of an operand or a result, head by head: [elements, token, head, stream].
struct HeadColumns {
    const Tensor *x;
    int64_t of_head;

    explicit HeadColumns(const Tensor *t) : x(t), of_head(t->ne[1] * t->ne[3]) {}

    char *operator()(int64_t i) const {
        const int64_t head = i / of_head, column = i % of_head;
        return x->data + head * x->nb[2] + column / x->ne[1] * x->nb[3] + column % x->ne[1] * x->nb[1];
    }
};

template <class Type, class Rows>
void compute_heads_of_type(const Tensor *node, int threads) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    const HeadColumns from(x), to(node);
    const int64_t steps = x->ne[0] / STEP, heads = weights->ne[2], count = heads * from.of_head;
    const auto *pieces = prepare_columns<Type>(count, steps, threads, from);
    Column<Type> *const columns = columns_for<Type>(count);
    for (int64_t i = 0; i < count; i++) columns[i] = {pieces + i * steps, to(i)};

    const int64_t tiles = (weights->ne[1] + ROWS<2> - 1) / ROWS<2>, items = tiles * heads;
    const size_t size = ROWS<2> * weights->nb[1];
    const auto tile_at = [&](int64_t item) { return weights->data + item / tiles * weights->nb[2] + item % tiles * size; };
    std::vector<TileQueue> &queues = queues_of(items, threads);
    const auto next = next_weights.after(weights->data, items, size, threads);
    run_threads(threads, [&](int thread) {
        take_tiles(queues, thread, [&](int64_t item) {
            const int64_t head = item / tiles;
            const Product<Type, Rows> op{
                weights->data + head * weights->nb[2], weights->nb[1], weights->ne[1], steps, from.of_head,
                columns + head * from.of_head};
            multiply_matrix_tile(op, item % tiles, tile_at(item + 1 < items ? item + 1 : item));
        });
        return next(thread);
    });
}

// Whether this product can be computed here.
bool supports_heads(const Tensor *node) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    if (node->type != F32 || x->type != F32 || !rows_are_dense(x, 4) || !rows_are_dense(node, 4)) return false;
    if (weights->ne[2] == 1 || weights->ne[2] != x->ne[2] || weights->ne[3] != 1) return false;
    if (!of_model(weights) || x->ne[0] % STEP || weights->nb[2] != weights->nb[1] * (size_t)weights->ne[1]) return false;
    return KnownTypes::find(weights->type, [](auto) {});
}

// `packed`: the weights are in the order that `pack` writes.
void compute_heads(const Tensor *node, int threads, bool packed) {
    KnownTypes::find(node->src[0]->type, [=](auto type) {
        if (packed) compute_heads_of_type<decltype(type), Packed>(node, threads);
        else compute_heads_of_type<decltype(type), InFile>(node, threads);
    });
}

#else

bool supports_heads(const Tensor *) { return false; }
void compute_heads(const Tensor *, int, bool) {}

#endif

// ---- short columns of floats: each sum runs over the elements, from the first

// Whether neither `compute` nor `compute_heads` is made for this product.
bool is_short(const Tensor *node) { return !of_model(node->src[0]) || node->src[1]->ne[0] % 32; }

// Whether this product can be computed here. Views are refused: keys and values with `--kv-type f32` are views.
bool supports_short(const Tensor *node) {
    const Tensor *matrix = node->src[0], *x = node->src[1];
    using elementwise::dense_floats;
    return is_short(node) && dense_floats(node) && dense_floats(matrix) && dense_floats(x) && !matrix->view_src &&
           x->ne[0] <= MOST_SHORT && x->ne[2] % matrix->ne[2] == 0 && x->ne[3] % matrix->ne[3] == 0;
}

void compute_short(const Tensor *node, int threads) {
    const Tensor *matrix = node->src[0], *x = node->src[1];
    const int64_t length = x->ne[0], rows = matrix->ne[1];
    const int64_t matrices = x->ne[2] / matrix->ne[2], lists = x->ne[3] / matrix->ne[3];  // that share one matrix
    elementwise::parallel_rows(threads, elementwise::rows_of(node), rows * length, [=](int64_t i) {
        const elementwise::RowIndex at(node, i);
        const float *column = elementwise::row(x, at);
        const char *first = matrix->data + at.i2 / matrices * matrix->nb[2] + at.i3 / lists * matrix->nb[3];
        float *to = elementwise::row(node, at);
        for (int64_t r = 0; r < rows; r++) {
            const float *weights = (const float *)(first + r * matrix->nb[1]);
            float total = 0;
            for (int64_t k = 0; k < length; k++) total = fused(weights[k], column[k], total);
            to[r] = total;
        }
    });
}

}  // namespace
}  // namespace products

// The operations that only copy elements: CONT, CONCAT, REPEAT and FILL.
//
// They are computed here because each change between ggml's CPU backend and this one takes longer than the copy. Elements have four
// bytes. Operands may have any strides, and results have whole rows.

#pragma once

#include <cstdint>
#include <cstring>

#include "elementwise.hpp"
#include "ggml.hpp"

namespace copies {
namespace {

using elementwise::parallel_rows, elementwise::row, elementwise::RowIndex, elementwise::rows_of;

constexpr size_t ELEMENT = 4;

bool has_elements(const Tensor *x) { return x->type == F32 || x->type == I32; }
bool has_rows(const Tensor *x) { return has_elements(x) && rows_are_dense(x, ELEMENT); }
bool is_contiguous(const Tensor *x) {
    return has_rows(x) && x->nb[1] == x->ne[0] * ELEMENT && x->nb[2] == x->ne[1] * x->nb[1] && x->nb[3] == x->ne[2] * x->nb[2];
}

void copy_row(char *to, const Tensor *x, RowIndex at) {
    const char *from = (const char *)row(x, at);
    if (rows_are_dense(x, ELEMENT)) std::memcpy(to, from, x->ne[0] * ELEMENT);
    else
        for (int64_t k = 0; k < x->ne[0]; k++) std::memcpy(to + k * ELEMENT, from + k * x->nb[0], ELEMENT);
}

// The elements in their order, without gaps. The shape may change.
struct Cont {
    static constexpr const char *NAME = "CONT";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0];
        return is_contiguous(node) && has_elements(x) && x->type == node->type;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        parallel_rows(threads, rows_of(x), x->ne[0],
                      [=](int64_t i) { copy_row(node->data + i * x->ne[0] * ELEMENT, x, RowIndex(x, i)); });
    }
};

// The second operand behind the first one, in one of the dimensions.
struct Concat {
    static constexpr const char *NAME = "CONCAT";
    static bool supports(const Tensor *node) {
        const Tensor *a = node->src[0], *b = node->src[1];
        return has_rows(node) && has_elements(a) && has_elements(b) && a->type == node->type && b->type == node->type;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *a = node->src[0], *b = node->src[1];
        const int dimension = node->params[0];
        parallel_rows(threads, rows_of(node), node->ne[0], [=](int64_t i) {
            RowIndex at(node, i);
            char *to = (char *)row(node, at);
            if (dimension == 0) {
                copy_row(to, a, at);
                return copy_row(to + a->ne[0] * ELEMENT, b, at);
            }
            int64_t &index = dimension == 1 ? at.i1 : dimension == 2 ? at.i2 : at.i3;
            if (index < a->ne[dimension]) return copy_row(to, a, at);
            index -= a->ne[dimension];
            copy_row(to, b, at);
        });
    }
};

struct Repeat {
    static constexpr const char *NAME = "REPEAT";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0];
        return has_rows(node) && has_elements(x) && x->type == node->type && x->ne[0] && node->ne[0] % x->ne[0] == 0;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        parallel_rows(threads, rows_of(node), node->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            char *to = (char *)row(node, at);
            for (int64_t k = 0; k < node->ne[0]; k += x->ne[0]) copy_row(to + k * ELEMENT, x, at);  // `row` repeats the rows
        });
    }
};

// One number in all elements.
struct Fill {
    static constexpr const char *NAME = "FILL";
    static bool supports(const Tensor *node) { return node->type == F32 && has_rows(node); }
    static void compute(const Tensor *node, int threads) {
        const float number = elementwise::setting(node, 0);
        parallel_rows(threads, rows_of(node), node->ne[0], [=](int64_t i) {
            float *to = row(node, {node, i});
            std::fill(to, to + node->ne[0], number);
        });
    }
};

}  // namespace
}  // namespace copies

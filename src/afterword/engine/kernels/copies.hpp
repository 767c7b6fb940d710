// The operations that only copy elements: CONT, CPY, CONCAT, REPEAT and FILL.
//
// They are computed here because each change between ggml's CPU backend and this one takes longer than the copy. Elements have four
// bytes. Operands may have any strides, and results have whole rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elementwise.hpp"
#include "ggml.hpp"

namespace copies {
namespace {

using elementwise::parallel_parts, elementwise::parallel_rows, elementwise::row, elementwise::RowIndex, elementwise::rows_of;

constexpr size_t ELEMENT = 4;
constexpr int64_t JOINED = 16;  // rows that are joined at a time: as many elements as a cache line has

bool has_elements(const Tensor *x) { return x->type == F32 || x->type == I32; }
bool has_rows(const Tensor *x) { return has_elements(x) && rows_are_dense(x, ELEMENT); }
bool is_contiguous(const Tensor *x) {
    return has_rows(x) && x->nb[1] == x->ne[0] * ELEMENT && x->nb[2] == x->ne[1] * x->nb[1] && x->nb[3] == x->ne[2] * x->nb[2];
}

// Elements that follow each other. A call of memcpy for the three elements of a channel of a convolution's state takes several
// times as long as the copy.
void copy_dense(char *to, const char *from, int64_t count) {
    switch (count) {
        case 1: return (void)std::memcpy(to, from, ELEMENT);
        case 2: return (void)std::memcpy(to, from, 2 * ELEMENT);
        case 3: return (void)std::memcpy(to, from, 3 * ELEMENT);
        default: std::memcpy(to, from, count * ELEMENT);
    }
}

void copy_row(char *to, const char *from, const Tensor *x) {
    if (rows_are_dense(x, ELEMENT)) return copy_dense(to, from, x->ne[0]);
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
        const size_t size = x->ne[0] * ELEMENT;
        parallel_parts(threads, rows_of(x), x->ne[0], [=](int64_t first, int64_t end) {
            char *to = node->data + first * size;
            for (RowIndex at(x, first); first < end; at.advance(x)) {
                const char *from = (const char *)row(x, at);
                const int64_t count = std::min(end - first, x->ne[1] - at.i1);  // rows of one matrix
                for (int64_t i = 0; i < count; i++) copy_row(to + i * size, from + i * x->nb[1], x);
                first += count, to += count * size, at.i1 += count - 1;
            }
        });
    }
};

// The same into existing memory, such as a cache: the node is a view of it.
struct Copy : Cont {
    static constexpr const char *NAME = "CPY";
    static bool supports(const Tensor *node) {
        return Cont::supports(node) && node->ne[0] * rows_of(node) == node->src[0]->ne[0] * rows_of(node->src[0]);
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
        if (dimension == 0) return join_rows(node, threads);
        parallel_rows(threads, rows_of(node), node->ne[0], [=](int64_t i) {
            RowIndex at(node, i);
            char *to = (char *)row(node, at);
            int64_t &index = dimension == 1 ? at.i1 : dimension == 2 ? at.i2 : at.i3;
            if (index < a->ne[dimension]) return copy_row(to, (const char *)row(a, at), a);
            index -= a->ne[dimension];
            copy_row(to, (const char *)row(b, at), b);
        });
    }

   private:
    static void join_rows(const Tensor *node, int threads) {
        const Tensor *a = node->src[0], *b = node->src[1];
        parallel_parts(threads, rows_of(node), node->ne[0], [=](int64_t first, int64_t end) {
            RowIndex at(node, first);
            while (first < end) {
                const int64_t count = std::min({JOINED, end - first, node->ne[1] - at.i1});
                append(node, 0, a, at, count), append(node, a->ne[0], b, at, count);
                first += count, at.i1 += count - 1, at.advance(node);
            }
        });
    }
    // Copies `count` rows of `x` behind the first `behind` elements of the node's rows.
    static void append(const Tensor *node, int64_t behind, const Tensor *x, RowIndex at, int64_t count) {
        char *to = (char *)row(node, at) + behind * ELEMENT;
        const char *from = (const char *)row(x, at);
        if (rows_are_dense(x, ELEMENT))
            for (int64_t i = 0; i < count; i++) copy_dense(to + i * node->nb[1], from + i * x->nb[1], x->ne[0]);
        else  // element by element: in a transposed operand the elements of several rows are neighbours
            for (int64_t k = 0; k < x->ne[0]; k++)
                for (int64_t i = 0; i < count; i++)
                    std::memcpy(to + i * node->nb[1] + k * ELEMENT, from + i * x->nb[1] + k * x->nb[0], ELEMENT);
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
            const char *from = (const char *)row(x, at);  // repeats the rows
            for (int64_t k = 0; k < node->ne[0]; k += x->ne[0]) copy_row(to + k * ELEMENT, from, x);
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

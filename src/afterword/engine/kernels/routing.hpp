// The operations that choose a token's experts and weigh their outputs: softmax, sorting, sums and means of rows, limits, factors,
// and biases of selected experts.
//
// One thread computes a row, and the order of its operations is fixed, so that a token is routed in the same way in any pass.
// The rows are short (one element for each expert), and each change between ggml's CPU backend and this one takes longer than
// the operation.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "elementwise.hpp"
#include "ggml.hpp"
#include "simd.hpp"

namespace routing {
namespace {

using elementwise::dense_floats, elementwise::for_elements, elementwise::parallel_rows, elementwise::row;
using elementwise::RowIndex, elementwise::rows_of, elementwise::same_rows, elementwise::same_shape, elementwise::setting;

constexpr int DESCENDING = 1;  // ggml's number

// Calls `work(from, to)` with each row of the operand and of the result.
template <class Work>
void each_row(const Tensor *node, int threads, const Work &work) {
    const Tensor *x = node->src[0];
    parallel_rows(threads, rows_of(x), x->ne[0], [=](int64_t i) {
        const RowIndex at(x, i);
        work(row(x, at), row(node, at));
    });
}

// Calls `work(part)` with eight elements at a time; missing ones are `missing`. Writes what it returns to `to`.
template <class Work>
void eight_at_a_time(const float *from, float *to, int64_t length, float missing, const Work &work) {
    for (int64_t k = 0; k < length; k += LANES) {
        const int64_t here = std::min<int64_t>(LANES, length - k);
        float part[LANES];
        std::fill(part + here, part + LANES, missing);
        std::memcpy(part, from + k, here * sizeof(float));
        store(part, work(load(part)));
        std::memcpy(to + k, part, here * sizeof(float));
    }
}

// Without a mask. A row with a NaN, with plus infinity or with nothing but minus infinity becomes NaN.
struct SoftMax {
    static constexpr const char *NAME = "SOFT_MAX";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0];
        return dense_floats(node) && dense_floats(x) && same_shape(node, x) && !node->src[1] && !node->src[2] &&
               setting(node, 1) == 0;
    }
    static void compute(const Tensor *node, int threads) {
        const int64_t length = node->ne[0];
        const float factor = setting(node, 0);
        each_row(node, threads, [=](const float *from, float *to) {
            float most = -INFINITY;
            bool finite = true;
            for (int64_t k = 0; k < length; k++) {
                const float x = from[k] * factor;
                finite = finite && x <= FLT_MAX;
                most = x > most ? x : most;
            }
            if (!finite || most == -INFINITY) return std::fill(to, to + length, __builtin_nanf(""));
            f8 sums{};
            const f8 highest = all(most);
            eight_at_a_time(from, to, length, -INFINITY, [&](f8 x) {
                const f8 power = exponential(fused(x, all(factor), -highest));
                sums += power;
                return power;
            });
            const float total = sum(sums);
            for_elements(length, [=](int64_t k, auto v) { store(to + k, load<decltype(v)>(to + k) / total); });
        });
    }
};

// Whether element `a` of a row comes before `b`: larger ones first, equal ones in their order, NaN last.
struct FromLargest {
    const float *row;

    bool operator()(int32_t a, int32_t b) const {
        const float x = row[a], y = row[b];
        if (x > y || x < y) return x > y;
        const bool x_is_number = x == x, y_is_number = y == y;
        return x_is_number != y_is_number ? x_is_number : a < b;
    }
};

// The numbers of a row's elements, from the largest element to the least.
struct Argsort {
    static constexpr const char *NAME = "ARGSORT";
    static bool supports(const Tensor *node) {
        return node->params[0] == DESCENDING && node->type == I32 && rows_are_dense(node, 4) && dense_floats(node->src[0]) &&
               same_shape(node, node->src[0]);
    }
    static void compute(const Tensor *node, int threads) {
        each_row(node, threads, [length = node->ne[0]](const float *from, float *to) {
            const auto numbers = (int32_t *)to;
            std::iota(numbers, numbers + length, 0);
            std::sort(numbers, numbers + length, FromLargest{from});
        });
    }
};

// The first of them. ggml leaves their order open.
struct TopK {
    static constexpr const char *NAME = "TOP_K";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0];
        return node->type == I32 && rows_are_dense(node, 4) && dense_floats(x) && same_rows(node, x) && node->ne[0] <= x->ne[0];
    }
    static void compute(const Tensor *node, int threads) {
        const int64_t length = node->src[0]->ne[0], count = node->ne[0];
        each_row(node, threads, [=](const float *from, float *to) {
            static thread_local std::vector<int32_t> numbers;
            numbers.resize(length);
            std::iota(numbers.begin(), numbers.end(), 0);
            std::partial_sort(numbers.begin(), numbers.begin() + count, numbers.end(), FromLargest{from});
            std::memcpy(to, numbers.data(), count * sizeof(int32_t));
        });
    }
};

float sum_of(const float *row, int64_t length) {
    float total = 0;
    for (int64_t k = 0; k < length; k++) total += row[k];
    return total;
}

bool has_one_element_for_each_row(const Tensor *node) {
    return dense_floats(node) && dense_floats(node->src[0]) && node->ne[0] == 1 && same_rows(node, node->src[0]);
}

struct SumRows {
    static constexpr const char *NAME = "SUM_ROWS";
    static bool supports(const Tensor *node) { return has_one_element_for_each_row(node); }
    static void compute(const Tensor *node, int threads) {
        each_row(node, threads, [length = node->src[0]->ne[0]](const float *from, float *to) { *to = sum_of(from, length); });
    }
};

struct Mean {
    static constexpr const char *NAME = "MEAN";
    static bool supports(const Tensor *node) { return has_one_element_for_each_row(node); }
    static void compute(const Tensor *node, int threads) {
        each_row(node, threads,
                 [length = node->src[0]->ne[0]](const float *from, float *to) { *to = sum_of(from, length) / (float)length; });
    }
};

struct Clamp {
    static constexpr const char *NAME = "CLAMP";
    static bool supports(const Tensor *node) {
        return dense_floats(node) && dense_floats(node->src[0]) && same_shape(node, node->src[0]);
    }
    static void compute(const Tensor *node, int threads) {
        const float least = setting(node, 0), most = setting(node, 1);
        each_row(node, threads, [=, length = node->ne[0]](const float *from, float *to) {
            for (int64_t k = 0; k < length; k++) to[k] = from[k] < least ? least : from[k] > most ? most : from[k];  // NaN stays
        });
    }
};

// Times a factor, plus a term.
struct Scale {
    static constexpr const char *NAME = "SCALE";
    static bool supports(const Tensor *node) {
        return dense_floats(node) && dense_floats(node->src[0]) && same_shape(node, node->src[0]);
    }
    static void compute(const Tensor *node, int threads) {
        const float factor = setting(node, 0), term = setting(node, 1);
        each_row(node, threads, [=, length = node->ne[0]](const float *from, float *to) {
            if (term == 0) {  // -0 plus 0 would be 0
                return for_elements(length, [=](int64_t k, auto v) { store(to + k, load<decltype(v)>(from + k) * factor); });
            }
            for_elements(length, [=](int64_t k, auto v) {
                using V = decltype(v);
                store(to + k, fused(load<V>(from + k), all<V>(factor), all<V>(term)));
            });
        });
    }
};

// Adds a row of the second operand to each row: that of the selected expert.
struct AddExpertRows {
    static constexpr const char *NAME = "ADD_ID";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *biases = node->src[1], *ids = node->src[2];
        return dense_floats(node) && dense_floats(x) && dense_floats(biases) && same_shape(node, x) &&
               biases->ne[0] == x->ne[0] && biases->ne[2] == 1 && ids->type == I32 && rows_are_dense(ids, 4) &&
               ids->ne[0] == x->ne[1] && ids->ne[1] == x->ne[2] && x->ne[3] == 1;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0], *biases = node->src[1], *ids = node->src[2];
        parallel_rows(threads, rows_of(node), x->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            const int32_t expert = ((const int32_t *)(ids->data + at.i2 * ids->nb[1]))[at.i1];
            const float *a = row(x, at), *b = (const float *)(biases->data + expert * biases->nb[1]);
            float *to = row(node, at);
            for_elements(x->ne[0],
                         [=](int64_t k, auto v) { store(to + k, load<decltype(v)>(a + k) + load<decltype(v)>(b + k)); });
        });
    }
};

}  // namespace
}  // namespace routing

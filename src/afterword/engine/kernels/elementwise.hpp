// The operations between products and attention: norms, sums, products, quotients, SwiGLU, rotary embedding, SET_ROWS and
// GET_ROWS.
//
// They are computed here because each change between ggml's CPU backend and this one takes longer than the operation. One thread
// computes a row, and the order of its operations is fixed. Other operations, and forms that `supports` refuses, are left to
// ggml.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "simd.hpp"
#include "parallel.hpp"
#include "ggml.hpp"

namespace elementwise {
namespace {

constexpr int64_t ALONE = 1 << 15;  // fewer elements are computed by one thread, sooner than others could join
constexpr int64_t PART = 1 << 13;   // elements that a thread takes at a time
constexpr int SWIGLU = 2, IN_PAIRS = 0, IN_HALVES = 2;  // ggml's numbers of the gate and of the orders of rotary embedding

// The indices of row `i` of a tensor in its dimensions 1 to 3.
struct RowIndex {
    int64_t i1, i2, i3;

    RowIndex(const Tensor *x, int64_t i) : i1(i % x->ne[1]), i2(i / x->ne[1] % x->ne[2]), i3(i / x->ne[1] / x->ne[2]) {}
};

int64_t rows_of(const Tensor *x) { return x->ne[1] * x->ne[2] * x->ne[3]; }

// The address of a row. The rows of a tensor with fewer of them are repeated.
float *row(const Tensor *x, RowIndex at) {
    return (float *)(x->data + at.i1 % x->ne[1] * x->nb[1] + at.i2 % x->ne[2] * x->nb[2] + at.i3 % x->ne[3] * x->nb[3]);
}

// Calls `work` with the number of each row. `length`: elements of a row.
template <class Work>
void parallel_rows(int threads, int64_t rows, int64_t length, const Work &work) {
    if (!length) return;  // llama.cpp clears the states of no sequence with empty tensors
    const int64_t size = PART / length + 1, parts = rows * length < ALONE ? 1 : (rows + size - 1) / size;
    const auto some = [&](int64_t first, int64_t end) {
        for (; first < end; first++) work(first);
    };
    if (parts == 1) return some(0, rows);
    parallel_for(threads, parts, [&](int64_t i) { some(i * size, (i + 1) * size < rows ? (i + 1) * size : rows); });
}

// Calls `work(i, vector)` for each vector of a row: `i` is its first element, and the type of `vector` is `wide` or `f8`.
template <class Do>
void for_lanes(int64_t length, const Do &work) {
    int64_t i = 0;
    for (; i + WIDE <= length; i += WIDE) work(i, wide{});
    for (; i < length; i += LANES) work(i, f8{});
}

// The same for rows of any length: the type of `vector` is `float` for elements that fill no vector.
template <class Do>
void for_elements(int64_t length, const Do &work) {
    int64_t i = length / LANES * LANES;
    for_lanes(i, work);
    for (; i < length; i++) work(i, float{});
}

bool dense_floats(const Tensor *x) { return x->type == F32 && rows_are_dense(x, sizeof(float)); }
bool floats(const Tensor *x) { return dense_floats(x) && x->ne[0] % LANES == 0; }
bool same_rows(const Tensor *a, const Tensor *b) { return a->ne[1] == b->ne[1] && a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3]; }

float setting(const Tensor *node, int i) {
    float x;
    std::memcpy(&x, &node->params[i], sizeof x);
    return x;
}

// ---- norms: each row divided by the root of its mean square

struct RmsNorm {
    static constexpr const char *NAME = "RMS_NORM";
    static bool supports(const Tensor *node) { return floats(node) && floats(node->src[0]); }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        const int64_t length = x->ne[0];
        const float least = setting(node, 0);
        parallel_rows(threads, rows_of(node), length, [=](int64_t i) {
            const float *from = row(x, {x, i});
            float *to = row(node, {node, i});
            f8 squares{};
            for (int64_t k = 0; k < length; k += LANES) squares = fused(load(from + k), load(from + k), squares);
            const float scale = 1 / std::sqrt(sum(squares) / (float)length + least);
            for_lanes(length, [=](int64_t k, auto v) { store(to + k, load<decltype(v)>(from + k) * scale); });
        });
    }
};

// ---- sums, products and quotients, element by element; rows of the second operand, or their only element, are repeated

template <class Two>
struct Binary {
    static bool supports(const Tensor *node) {
        const Tensor *a = node->src[0], *b = node->src[1];
        return dense_floats(node) && dense_floats(a) && dense_floats(b) && node->ne[0] == a->ne[0] && same_rows(node, a) &&
               (a->ne[0] == b->ne[0] || b->ne[0] == 1);
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *a = node->src[0], *b = node->src[1];
        const bool one = b->ne[0] == 1;
        parallel_rows(threads, rows_of(node), a->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            const float *x = row(a, at), *y = row(b, at);
            float *to = row(node, at);
            const auto each = [=](auto second) {
                for_elements(a->ne[0], [=](int64_t k, auto v) { store(to + k, Two{}(load<decltype(v)>(x + k), second(k, v))); });
            };
            if (one) each([number = *y](int64_t, auto v) { return all<decltype(v)>(number); });
            else each([=](int64_t k, auto v) { return load<decltype(v)>(y + k); });
        });
    }
};

struct Sum : Binary<std::plus<>> {
    static constexpr const char *NAME = "ADD";
};
struct Mul : Binary<std::multiplies<>> {
    static constexpr const char *NAME = "MUL";
};
struct Div : Binary<std::divides<>> {
    static constexpr const char *NAME = "DIV";
};

// ---- SwiGLU: x / (1 + exp(-x)) times the other half of the row, or times a second tensor

struct SwiGLU {
    static constexpr const char *NAME = "GLU";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *other = node->src[1];
        return node->params[0] == SWIGLU && floats(node) && floats(x) && same_rows(node, x) &&
               (!other || (floats(other) && same_rows(node, other)));
    }
    template <class V>
    static V swiglu(V x, V other) {
        const V most = all<V>(88.0f);
        return x / (1.0f + exponential(-x < most ? -x : most)) * other;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0], *other = node->src[1];
        const int64_t length = node->ne[0];
        const bool swapped = node->params[1];
        parallel_rows(threads, rows_of(node), length, [=](int64_t i) {
            const RowIndex at(node, i);
            const float *a = row(x, at), *b = other ? row(other, at) : a + length;
            if (swapped && !other) std::swap(a, b);
            float *to = row(node, at);
            for_lanes(length,
                      [=](int64_t k, auto v) { store(to + k, swiglu(load<decltype(v)>(a + k), load<decltype(v)>(b + k))); });
        });
    }
};

// ---- rotary embedding: rotates pairs of elements of a head, which are neighbours or half a head apart

// Cosines and sines of a pass, [position][cosines, sines][pair]. They are kept, because all layers use the same.
class Angles {
    int32_t params[16] = {};
    std::vector<int32_t> positions;
    std::vector<float> factors, table;  // factors: divide the angle of each pair; empty if there are none

    // Copies the tensor to `kept`. Returns whether it differed.
    template <class T>
    static bool replace(std::vector<T> &kept, const Tensor *now) {
        const T *first = now ? (const T *)now->data : nullptr, *end = now ? first + now->ne[0] : nullptr;
        if (std::equal(first, end, kept.begin(), kept.end())) return false;
        kept.assign(first, end);
        return true;
    }

   public:
    const float *of(const Tensor *node, int pairs) {
        const bool new_positions = replace(positions, node->src[1]), new_factors = replace(factors, node->src[2]);
        if (!new_positions && !new_factors && !std::memcmp(params, node->params, sizeof params)) return table.data();
        std::memcpy(params, node->params, sizeof params);
        const float base = setting(node, 5), speed = setting(node, 6), size = setting(node, 8);
        table.resize(positions.size() * 2 * pairs);
        for (int pair = 0; pair < pairs; pair++) {
            const float angle = speed * (float)std::pow((double)base, -(double)pair / pairs);
            const float one = factors.empty() ? angle : angle / factors[pair];
            for (size_t i = 0; i < positions.size(); i++) {
                float *to = &table[i * 2 * pairs + pair];
                to[0] = size * std::cos(positions[i] * one), to[pairs] = size * std::sin(positions[i] * one);
            }
        }
        return table.data();
    }
};

Angles angles;  // used by one operation at a time

struct Rope {
    static constexpr const char *NAME = "ROPE";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *at = node->src[1], *factors = node->src[2];
        const int elements = node->params[1], order = node->params[2];
        const bool stretched = setting(node, 7) != 0;  // YaRN
        const bool shifted = node->params[15] != 0;    // the rotated elements are not the first ones (MiniCPM 3)
        return floats(node) && floats(x) && x->ne[3] == 1 && at->type == I32 && at->ne[0] == x->ne[2] && elements <= x->ne[0] &&
               elements % 2 == 0 && (order == IN_PAIRS || order == IN_HALVES) && !stretched && !shifted &&
               (!factors || (factors->type == F32 && factors->ne[0] >= elements / 2));
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        const int pairs = node->params[1] / 2;
        const bool halves = node->params[2] == IN_HALVES;
        const float *table = angles.of(node, pairs);
        parallel_rows(threads, rows_of(node), x->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            const float *from = row(x, at), *cosines = table + at.i2 * 2 * pairs, *sines = cosines + pairs;
            float *to = row(node, at);
            const auto angle = [=](int pair, int one, int other) {
                const float a = from[one], b = from[other];
                to[one] = fused(a, cosines[pair], -b * sines[pair]);
                to[other] = fused(a, sines[pair], b * cosines[pair]);
            };
            if (halves)
                for (int pair = 0; pair < pairs; pair++) angle(pair, pair, pair + pairs);
            else
                for (int pair = 0; pair < pairs; pair++) angle(pair, 2 * pair, 2 * pair + 1);
            for (int64_t k = 2 * pairs; k < x->ne[0]; k++) to[k] = from[k];
        });
    }
};

// ---- SET_ROWS and GET_ROWS: rows are written to the KV cache, and read by their numbers

int64_t number(const Tensor *numbers, int64_t i) {
    return numbers->type == I64 ? ((int64_t *)numbers->data)[i] : ((int32_t *)numbers->data)[i];
}

bool one_list(const Tensor *numbers) {
    return (numbers->type == I64 || numbers->type == I32) && numbers->ne[1] == 1 && numbers->ne[2] == 1 && numbers->ne[3] == 1;
}
bool one_matrix(const Tensor *x) { return x->ne[2] == 1 && x->ne[3] == 1; }

struct SetRows {
    static constexpr const char *NAME = "SET_ROWS";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *where = node->src[1];
        return node->type == F16 && rows_are_dense(node, sizeof(half)) && floats(x) && one_matrix(node) && one_matrix(x) &&
               one_list(where) && where->ne[0] == x->ne[1];
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0], *where = node->src[1];
        parallel_rows(threads, x->ne[1], x->ne[0], [=](int64_t i) {
            const float *from = row(x, {x, i});
            half *to = (half *)(node->data + number(where, i) * node->nb[1]);
            for (int64_t k = 0; k < x->ne[0]; k += LANES) narrow(to + k, load(from + k));
        });
    }
};

// Each matrix of the first operand has its own list.
struct GetRows {
    static constexpr const char *NAME = "GET_ROWS";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *which = node->src[1];
        return dense_floats(node) && dense_floats(x) && (which->type == I32 || which->type == I64) && x->ne[2] == which->ne[1] &&
               x->ne[3] == 1 && which->ne[2] == 1 && which->ne[3] == 1;
    }
    static void compute(const Tensor *node, int) {
        const Tensor *x = node->src[0], *which = node->src[1];
        for (int64_t i = 0; i < rows_of(node); i++) {
            const RowIndex at(node, i);
            const char *const at_number = which->data + at.i1 * which->nb[0] + at.i2 * which->nb[1];
            const int64_t from = which->type == I64 ? *(const int64_t *)at_number : *(const int32_t *)at_number;
            std::memcpy(row(node, at), x->data + from * x->nb[1] + at.i2 * x->nb[2], x->ne[0] * sizeof(float));
        }
    }
};

}  // namespace
}  // namespace elementwise

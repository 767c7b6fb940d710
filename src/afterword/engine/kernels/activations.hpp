// Functions of single elements: sigmoid, tanh, ReLU, SiLU, the forms of GELU, softplus, squares and roots; and gates, which multiply
// such a function of one half of a row by the other half.
//
// An element's result depends on nothing else, so it has the same bits in any row and on any processor. A NaN stays a NaN. GELU is
// computed in F32; ggml reads it from a table of halves.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "elementwise.hpp"
#include "ggml.hpp"
#include "simd.hpp"

namespace activations {
namespace {

using elementwise::dense_floats, elementwise::for_lanes, elementwise::parallel_rows, elementwise::row, elementwise::RowIndex;
using elementwise::rows_of, elementwise::same_rows, elementwise::same_shape, elementwise::setting;

// e to the power of x, at most e to the power of 88. Hides a NaN.
template <class V>
V limited_power(V x) {
    const V most = all<V>(88.0f);
    return exponential(x < most ? x : most);
}

// The largest distance from tanh is about 1e-7. Hides a NaN.
template <class V>
V hyperbolic_tangent(V x) {
    const V most = all<V>(20.0f), below = x < most ? x : most;
    return 1.0f - 2.0f / (exponential(2.0f * (below > -most ? below : -most)) + 1.0f);
}

// The error function by formula 7.1.26 of Abramowitz and Stegun: the largest distance from it is about 2e-7. Hides a NaN.
template <class V>
V error_function(V x) {
    const V size = x < 0.0f ? -x : x, t = 1.0f / fused(all<V>(0.3275911f), size, all<V>(1.0f));
    V p = fused(all<V>(1.061405429f), t, all<V>(-1.453152027f));
    p = fused(p, t, all<V>(1.421413741f));
    p = fused(p, t, all<V>(-0.284496736f));
    p = fused(p, t, all<V>(0.254829592f));
    const V tail = p * t * exponential(-(size * size)), positive = 1.0f - tail;
    return x < 0.0f ? -positive : positive;
}

// ---- functions: each with ggml's number of it

struct Tanh {
    static constexpr int UNARY = 4;
    template <class V>
    static V of(V x) {
        return hyperbolic_tangent(x) + (x - x);
    }
};

struct ReLU {
    static constexpr int UNARY = 6, GLU = 0;
    template <class V>
    static V of(V x) {
        return x > 0.0f ? x : x * 0.0f;
    }
};

// A number that is not finite becomes NaN.
struct Sigmoid {
    static constexpr int UNARY = 7;
    template <class V>
    static V of(V x) {
        return 1.0f / (1.0f + limited_power(-x)) + (x - x);
    }
};

struct GELU {
    static constexpr int UNARY = 8, GLU = 1;
    template <class V>
    static V of(V x) {
        const V inner = 0.79788456f * x * fused(0.044715f * x, x, all<V>(1.0f));
        return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
    }
};

struct QuickGELU {
    static constexpr int UNARY = 9, GLU = 5;
    template <class V>
    static V of(V x) {
        return x / (1.0f + limited_power(-1.702f * x));
    }
};

struct SiLU {
    static constexpr int UNARY = 10, GLU = 2;
    template <class V>
    static V of(V x) {
        return x / (1.0f + limited_power(-x));
    }
};

struct ErrorGELU {
    static constexpr int UNARY = 16, GLU = 4;
    template <class V>
    static V of(V x) {
        return 0.5f * x * (1.0f + error_function(0.70710678f * x));
    }
};

// Computed in double precision: the standard library's functions then round to the same float everywhere. Few elements need it.
struct SoftPlus {
    static constexpr int UNARY = 15;
    template <class V>
    static V of(V x) {
        for (size_t i = 0; i < sizeof x / sizeof x[0]; i++)
            if (!(x[i] > 20)) x[i] = (float)std::log1p(std::exp((double)x[i]));
        return x;
    }
};

struct Square {
    template <class V>
    static V of(V x) {
        return x * x;
    }
};

struct Root {
    template <class V>
    static V of(V x) {
        for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = std::sqrt(x[i]);
        return x;
    }
};

// ---- rows

// Writes `two` of each pair of elements to `to`. Elements that fill no vector are computed in one that is filled with zeros.
template <class Two>
void each_pair(int64_t length, const float *a, const float *b, float *to, const Two &two) {
    const int64_t whole = length / LANES * LANES;
    for_lanes(whole, [=](int64_t k, auto v) { store(to + k, two(load<decltype(v)>(a + k), load<decltype(v)>(b + k))); });
    if (const size_t size = (length - whole) * sizeof(float)) {
        float x[LANES] = {}, y[LANES] = {};
        std::memcpy(x, a + whole, size), std::memcpy(y, b + whole, size);
        store(x, two(load(x), load(y)));
        std::memcpy(to + whole, x, size);
    }
}

template <class Function>
void compute_function(const Tensor *node, int threads) {
    const Tensor *x = node->src[0];
    parallel_rows(threads, rows_of(x), x->ne[0], [=](int64_t i) {
        const RowIndex at(x, i);
        each_pair(x->ne[0], row(x, at), row(x, at), row(node, at), [](auto one, auto) { return Function::of(one); });
    });
}

bool supports_function(const Tensor *node) {
    return dense_floats(node) && dense_floats(node->src[0]) && same_shape(node, node->src[0]);
}

template <class Function>
struct FunctionOperation {
    static bool supports(const Tensor *node) { return supports_function(node); }
    static void compute(const Tensor *node, int threads) { compute_function<Function>(node, threads); }
};

struct SquareOperation : FunctionOperation<Square> {
    static constexpr const char *NAME = "SQR";
};
struct RootOperation : FunctionOperation<Root> {
    static constexpr const char *NAME = "SQRT";
};

// Calls `use` with the function of this number. Returns whether there is one here.
template <class Use>
bool with_unary(int number, const Use &use) {
    switch (number) {
        case Tanh::UNARY:
            return use(Tanh{}), true;
        case ReLU::UNARY:
            return use(ReLU{}), true;
        case Sigmoid::UNARY:
            return use(Sigmoid{}), true;
        case GELU::UNARY:
            return use(GELU{}), true;
        case QuickGELU::UNARY:
            return use(QuickGELU{}), true;
        case SiLU::UNARY:
            return use(SiLU{}), true;
        case ErrorGELU::UNARY:
            return use(ErrorGELU{}), true;
        case SoftPlus::UNARY:
            return use(SoftPlus{}), true;
    }
    return false;
}

struct Unary {
    static constexpr const char *NAME = "UNARY";
    static bool supports(const Tensor *node) {
        return with_unary(node->params[0], [](auto) {}) && supports_function(node);
    }
    static void compute(const Tensor *node, int threads) {
        with_unary(node->params[0], [=](auto function) { compute_function<decltype(function)>(node, threads); });
    }
};

// ---- gates

template <class V>
V at_most(V x, float most) {
    return x > all<V>(most) ? all<V>(most) : x;
}
template <class V>
V within(V x, float most) {
    return x < all<V>(-most) ? all<V>(-most) : at_most(x, most);
}

// A function of one half times the other half.
template <class Function>
struct Product {
    explicit Product(const Tensor *) {}
    template <class V>
    V operator()(V x, V other) const {
        return Function::of(x) * other;
    }
};

// gpt-oss's gate: both halves are limited, and 1 is added to the second.
struct LimitedSwiGLUPlusOne {
    static constexpr int GLU = 3;
    const float slope, most;
    explicit LimitedSwiGLUPlusOne(const Tensor *node) : slope(setting(node, 2)), most(setting(node, 3)) {}
    template <class V>
    V operator()(V x, V other) const {
        const V limited = at_most(x, most);
        return limited / (1.0f + limited_power(-slope * limited)) * (within(other, most) + 1.0f);
    }
};

struct LimitedSwiGLU {
    static constexpr int GLU = 6;
    const float most;
    explicit LimitedSwiGLU(const Tensor *node) : most(setting(node, 3)) {}
    template <class V>
    V operator()(V x, V other) const {
        return SiLU::of(at_most(x, most)) * within(other, most);
    }
};

// Calls `use` with the gate of a node. Returns whether there is one here.
template <class Use>
bool with_gate(const Tensor *node, const Use &use) {
    switch (node->params[0]) {
        case ReLU::GLU:
            return use(Product<ReLU>(node)), true;
        case GELU::GLU:
            return use(Product<GELU>(node)), true;
        case SiLU::GLU:
            return use(Product<SiLU>(node)), true;
        case ErrorGELU::GLU:
            return use(Product<ErrorGELU>(node)), true;
        case QuickGELU::GLU:
            return use(Product<QuickGELU>(node)), true;
        case LimitedSwiGLUPlusOne::GLU:
            return use(LimitedSwiGLUPlusOne(node)), true;
        case LimitedSwiGLU::GLU:
            return use(LimitedSwiGLU(node)), true;
    }
    return false;
}

// The halves are those of a row, or two tensors.
struct Gate {
    static constexpr const char *NAME = "GLU";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *other = node->src[1];
        const int64_t elements = other ? node->ne[0] : 2 * node->ne[0];
        return with_gate(node, [](auto) {}) && dense_floats(node) && dense_floats(x) && same_rows(node, x) &&
               x->ne[0] == elements && (!other || (dense_floats(other) && same_shape(other, x)));
    }
    static void compute(const Tensor *node, int threads) {
        with_gate(node, [=](auto gate) {
            const Tensor *x = node->src[0], *other = node->src[1];
            const int64_t length = node->ne[0];
            const bool swapped = node->params[1];
            parallel_rows(threads, rows_of(node), length, [=](int64_t i) {
                const RowIndex at(node, i);
                const float *a = row(x, at), *b = other ? row(other, at) : a + length;
                if (swapped && !other) std::swap(a, b);
                each_pair(length, a, b, row(node, at), gate);
            });
        });
    }
};

}  // namespace
}  // namespace activations

// The gate of a feed-forward network: half of its elements times the other half's x / (1 + e^-x).
//
// Each number depends on two others only, so it could be left to the library; but of what could, it alone takes long.

#pragma once

#include <cstdint>
#include <cstring>

#include "../lanes.hpp"
#include "../threads.hpp"
#include "ggml.hpp"

namespace swiglu {
namespace {

constexpr int SWIGLU = 2;  // ggml's number

inline wide opened(wide x, wide by) {
    const wide most = all<wide>(88.0f), negative = -x;
    return x / (1.0f + exponential(negative > most ? most : negative)) * by;
}

// A row; what is beyond its end is not touched.
void compute_row(const float *x, const float *by, float *out, int64_t length) {
    int64_t i = 0;
    for (; i + WIDE <= length; i += WIDE) store(out + i, opened(load<wide>(x + i), load<wide>(by + i)));
    const size_t left = (length - i) * sizeof(float);
    wide last = {}, factors = {};
    std::memcpy(&last, x + i, left);
    std::memcpy(&factors, by + i, left);
    last = opened(last, factors);
    std::memcpy(out + i, &last, left);
}

bool takes(const Tensor *node) {
    const Tensor *x = node->src[0], *by = node->src[1];
    const auto flat = [](const Tensor *t) { return t->type == F32 && rows_are_dense(t, 4) && t->ne[2] == 1 && t->ne[3] == 1; };
    return node->params[0] == SWIGLU && by && flat(x) && flat(by) && flat(node);
}

void compute(const Tensor *node, int threads) {
    const Tensor *x = node->src[0], *by = node->src[1];
    in_parts(node->ne[1] > 1 ? threads : 1, node->ne[1], [=](int64_t row) {
        compute_row((const float *)(x->data + row * x->nb[1]), (const float *)(by->data + row * by->nb[1]),
                    (float *)(node->data + row * node->nb[1]), node->ne[0]);
    });
}

}  // namespace
}  // namespace swiglu

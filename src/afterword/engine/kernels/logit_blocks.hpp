// Blocks of a row of logits. Their largest logits show which blocks have no logits that are searched.

#pragma once

#include "simd.hpp"

#include <cstdint>

namespace {

constexpr int64_t BLOCK = 256;  // as in core/sampler_kernel.py
constexpr float MINUS_INFINITY = -__builtin_inff(), LOWEST = -__FLT_MAX__;

template <class Number>
struct List {
    const Number *first;
    int64_t count;

    const Number *begin() const { return first; }
    const Number *end() const { return first + count; }
};

int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// A vector of the elements from `at` on. Lanes beyond `end` are `rest`.
wide load_partial(const float *row, int64_t at, int64_t end, float rest) {
    if (at + WIDE <= end) return load<wide>(row + at);
    wide x = all<wide>(rest);
    for (int64_t i = at; i < end; i++) x[i - at] = row[i];
    return x;
}

float largest_of(const float *numbers, int64_t count) {
    wide most = all<wide>(MINUS_INFINITY);
    for (int64_t at = 0; at < count; at += WIDE) most = larger(load_partial(numbers, at, count, MINUS_INFINITY), most);
    return largest(most);
}

}  // namespace

// Floats in the compiler's own vectors: instructions of the machine where it has them.
//
// Eight at a time where the number of lanes shows in a result (sums that are kept in lanes), else as many as the machine
// takes, so that results are the same for both.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
using f8 = float __attribute__((vector_size(32)));
using i8 = int32_t __attribute__((vector_size(32)));

#ifdef __AVX512F__
constexpr int WIDE = 16;
using wide = float __attribute__((vector_size(64)));
#else
constexpr int WIDE = LANES;
using wide = f8;
#endif

template <class V = f8>
inline V load(const float *from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class V>
inline void store(float *to, V x) {
    std::memcpy(to, &x, sizeof x);
}

template <class V = f8>
inline V all(float x) {
    return x - V{};  // minus, since -0 + 0 is another zero
}

template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}

// a * b + c, rounded once where the machine can. Said expressly where the same sum is computed by several pieces of code,
// since compilers are free to choose which product of a sum of two they join with the addition.
template <class V>
inline V fused(V a, V b, V c) {
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps(a, b, c);
#endif
#ifdef __FMA__
    if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
    for (size_t i = 0; i < sizeof a / sizeof a[0]; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

template <class V>
inline float largest(V x) {
    float most = x[0];
    for (size_t i = 1; i < sizeof x / sizeof most; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline float sum(f8 x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// Adds as many lanes as there are to eight running sums, eight by eight.
inline void add(f8 &sums, wide x) {
    f8 parts[WIDE / LANES];
    std::memcpy(parts, &x, sizeof x);
    for (const f8 &part : parts) sums += part;
}

// e to the power of x to about a unit in the last place; 0 below -87, as for minus infinity; x is at most 88.
template <class V>
inline V exponential(V x) {
    using Bits = decltype(x > x);
    const V least = all<V>(-87.0f), zero = all<V>(12582912.0f);
    const V y = larger(x, least);
    const V shifted = y * 1.44269504f + zero;  // the nearest whole number, in the last bits
    const V n = shifted - zero;
    const V r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const V power = (V)(((Bits)shifted - (Bits)zero + 127) << 23);
    return x < least ? V{} : p * power;
}

}  // namespace

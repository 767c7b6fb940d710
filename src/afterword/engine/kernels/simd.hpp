// Vectors of floats and integers in the compiler's vector extensions.
//
// `f8` has eight lanes on every machine: it is used where the number of lanes changes a result, as in sums kept in lanes.
// `wide` has as many lanes as the machine's registers: it is used where the number of lanes changes no result.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__FMA__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
using f8 = float __attribute__((vector_size(32)));
using i8 = int32_t __attribute__((vector_size(32)));

using half = uint16_t;

#ifdef __AVX512F__
constexpr int WIDE = 16;
using wide = float __attribute__((vector_size(64)));
using wide_ints = int32_t __attribute__((vector_size(64)));
#else
constexpr int WIDE = LANES;
using wide = f8;
using wide_ints = i8;
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a > b){__VA_ARGS__})
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
    return x - V{};  // not x + V{}: -0 + 0 is +0
}

// 0, 1, 2, ...
inline wide_ints lanes() {
    wide_ints numbers;
    for (int i = 0; i < WIDE; i++) numbers[i] = i;
    return numbers;
}

// The larger of each pair of lanes; `b` where one of them is NaN.
template <class V>
inline V larger(V a, V b) {
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return (V)_mm512_max_ps(a, b);
#endif
    return a > b ? a : b;
}

// a * b + c, rounded once where the machine has the instruction. It is written out where several pieces of code compute the
// same sum, because a compiler may choose which of two products it contracts with an addition.
template <class V>
inline V fused(V a, V b, V c) {
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps(a, b, c);
#endif
#ifdef __FMA__
    if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps(a, b, c);
    if constexpr (sizeof(V) == sizeof(float)) return __builtin_fmaf(a, b, c);
#elif defined(__FP_FAST_FMAF)
    if constexpr (sizeof(V) == sizeof(float)) return __builtin_fmaf(a, b, c);
    else
        for (size_t i = 0; i < sizeof a / sizeof a[0]; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// Combines eight lanes to one number, in this order: ((0, 4), (1, 5)), ((2, 6), (3, 7)).
template <class V, class Combine>
inline auto fold(V x, Combine combine) {
    x = combine(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = combine(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
    x = combine(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    return x[0];
}

inline float largest(wide x) {
    f8 parts[WIDE / LANES];
    std::memcpy(parts, &x, sizeof x);
    return fold(larger(parts[0], parts[WIDE / LANES - 1]), larger<f8>);
}

inline float sum(f8 x) {
    return fold(x, [](f8 a, f8 b) { return a + b; });
}

// Adds all lanes to eight running sums, eight lanes at a time, from the first.
inline void add(f8 &sums, wide x) {
    f8 parts[WIDE / LANES];
    std::memcpy(parts, &x, sizeof x);
    for (const f8 &part : parts) sums += part;
}

// Floats from the bits of halves, one in each lane.
inline f8 from_half(i8 bits) {
    const i8 size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const f8 finite = (f8)size * all(0x1p112f);                                          // correct for subnormal halves too
    return (f8)(((bits & 0x7fff) >= 0x7c00 ? (size | 0x7f800000) : (i8)finite) | sign);  // infinities and NaNs
}

inline f8 widen(const half *from) {
#ifdef __F16C__
    return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    i8 bits;
    for (int i = 0; i < LANES; i++) bits[i] = from[i];
    return from_half(bits);
#endif
}

// Halves from floats, rounded to the nearest, ties to even.
inline void narrow(half *to, f8 x) {
#ifdef __F16C__
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const i8 bits = (i8)x & 0x7fffffff, sign = ((i8)x >> 16) & 0x8000;
    const i8 small = (i8)((f8)bits + all(0.5f)) - 0x3f000000;  // subnormal: the addition rounds to multiples of 2^-24
    const i8 usual = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const i8 beyond = bits > 0x7f800000 ? i8{} + 0x7e00 : i8{} + 0x7c00;
    const i8 size = bits < 0x38800000 ? small : bits >= 0x47800000 ? beyond : usual;
    for (int i = 0; i < LANES; i++) to[i] = (half)(size[i] | sign[i]);
#endif
}

inline wide widen_all(const half *from) {
#ifdef __AVX512F__
    return (wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    return widen(from);
#endif
}

// e to the power of x, with an error of about one unit in the last place. 0 for x below -87. x must be at most 88.
template <class V>
inline V exponential(V x) {
    using Bits = decltype(x > x);
    const V least = all<V>(-87.0f), zero = all<V>(12582912.0f);
    const V y = larger(x, least);
    const V shifted = y * 1.44269504f + zero;  // the nearest integer to x / log(2), in the last bits
    const V n = shifted - zero;
    const V r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.3814600e-3f + 8.3687168e-3f;
    p = p * r + 4.1668388e-2f;
    p = p * r + 1.6666521e-1f;
    p = p * r + 4.9999993e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const V power = (V)((Bits)p + ((Bits)shifted << 23));  // p times 2 to the power of n
    return x < least ? V{} : power;
}

}  // namespace

// Eight floats at a time, in the compiler's own vectors: instructions of the machine where it has them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8;

using f8 = float __attribute__((vector_size(32)));
using i8 = int32_t __attribute__((vector_size(32)));

inline f8 load(const float *from) {
    f8 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float *to, f8 x) { std::memcpy(to, &x, sizeof x); }

inline f8 all(float x) { return f8{x, x, x, x, x, x, x, x}; }

inline f8 larger(f8 a, f8 b) { return a > b ? a : b; }

inline float largest(f8 x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline float sum(f8 x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// e to the power of x to about a unit in the last place; 0 below -87, as for minus infinity; x is at most 88.
inline f8 exponential(f8 x) {
    const f8 least = all(-87.0f);
    const f8 y = larger(x, least);
    const f8 shifted = y * all(1.44269504f) + all(12582912.0f);  // the nearest whole number, in the last bits
    const f8 n = shifted - all(12582912.0f);
    const f8 r = (y - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    f8 p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + r + all(1.0f);
    const f8 power = (f8)(((i8)shifted - (i8)all(12582912.0f) + 127) << 23);
    return x < least ? all(0.0f) : p * power;
}

}  // namespace

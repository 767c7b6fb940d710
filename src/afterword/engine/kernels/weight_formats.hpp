// One struct for each ggml weight type: how its blocks are unpacked, one row to a lane. And the activations for each.
//
// Quantized weights are unpacked to bytes. Activations are rounded to 8 bits for them, 32 at a time with a common scale, as in
// llama.cpp. Other weights are unpacked to floats, and activations are not rounded.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "packing.hpp"

namespace products {
namespace {

constexpr int STEP = 32;  // elements

// A step of 32 weights of one row in each lane, as bytes.
struct ByteStep {
    Bytes weights[STEP / 4];
    Floats scales[2];  // of each half of the step
    Floats least;      // the minimum of the step, which is subtracted
};

// The same for types with small integers as scales and minimums of the halves.
struct UnitStep {
    Bytes weights[STEP / 4];
    Bytes units[2];       // the integer scale of each half, as `end_half` reads it
    Bytes leasts;         // the integer minimums of both halves, 16 bits each
    Floats scale, least;  // of the block: factors of the integers
};

// A step of 32 activations of one column, rounded to bytes.
struct BytePiece {
    int8_t elements[STEP];
    float scale;
    int32_t halves[2];  // the sum of the elements of each half
    float sum;          // of all elements, times the scale
};

// ---- products of bytes

// Adds the products of four bytes to each lane. Weights: 0 to 63, or 0 to 255 with MIXED, or -128 to 127 with SIGNED.
// Activations: -127 to 127.
#if defined(__AVX512VNNI__)
constexpr bool MIXED = true;
template <bool SIGNED>
inline Bytes dot(Bytes sum, Bytes weights, Bytes x) {
    return (Bytes)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}
#elif defined(__AVX512BW__)
constexpr bool MIXED = false;
template <bool SIGNED>
inline Bytes dot(Bytes sum, Bytes weights, Bytes x) {
    __m512i w = (__m512i)weights, y = (__m512i)x;
    if (SIGNED) {
        y = _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(w), _mm512_setzero_si512(), y);
        w = _mm512_abs_epi8(w);
    }
    return sum + (Bytes)_mm512_madd_epi16(_mm512_maddubs_epi16(w, y), _mm512_set1_epi16(1));
}
#elif defined(__AVXVNNI__)
constexpr bool MIXED = true;
template <bool SIGNED>
inline Bytes dot(Bytes sum, Bytes weights, Bytes x) {
    return (Bytes)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x);
}
#elif defined(__AVX2__)
constexpr bool MIXED = false;
template <bool SIGNED>
inline Bytes dot(Bytes sum, Bytes weights, Bytes x) {
    const __m256i w = (__m256i)weights, y = (__m256i)x;
    const __m256i pairs = SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(y, w)) : _mm256_maddubs_epi16(w, y);
    return sum + (Bytes)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr bool MIXED = false;
template <bool SIGNED>
inline Bytes dot(Bytes sum, Bytes weights, Bytes x) {
    int32x4_t sums[2];
    int8x16_t w[2], y[2];
    std::memcpy(sums, &sum, sizeof sum), std::memcpy(w, &weights, sizeof w), std::memcpy(y, &x, sizeof y);
    for (int i = 0; i < 2; i++) sums[i] = vdotq_s32(sums[i], w[i], y[i]);
    std::memcpy(&sum, sums, sizeof sum);
    return sum;
}
#endif

// Sums of two products of unsigned bytes in 16 bits each. Used only where that saves instructions.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
constexpr bool PAIRS = true;
inline Bytes add_pairs(Bytes sums, Bytes weights, Bytes x) {
    return (Bytes)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)weights, (__m256i)x));
}
inline Bytes join_pairs(Bytes sums) { return (Bytes)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#else
constexpr bool PAIRS = false;
inline Bytes add_pairs(Bytes sums, Bytes, Bytes) { return sums; }
inline Bytes join_pairs(Bytes sums) { return sums; }
#endif

// The sum of half a step, multiplied by an integer: two sums of 16 bits or one of 32 bits in each lane. An instruction that
// multiplies and adds numbers of 16 bits joins two sums and multiplies them at once.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
inline Bytes begin_half(int32_t start) { return Bytes{} + (start & 0xffff); }
inline Bytes add_to_half(Bytes sums, Bytes weights, Bytes x) { return add_pairs(sums, weights, x); }
inline Bytes end_half(Bytes sums, Bytes unit) { return (Bytes)_mm256_madd_epi16((__m256i)sums, (__m256i)unit); }
// Byte `which` of each word less `less`, as `end_half` reads it: twice, with 16 bits.
inline Bytes unit(Bytes x, int which, int less) {
    const i8 words = {0, 4, 8, 12, 0, 4, 8, 12};
    const __m256i order = (__m256i)((words + which) * 0x00010001 | (int32_t)0x80008000);
    return (Bytes)_mm256_sub_epi16(_mm256_shuffle_epi8((__m256i)x, order), _mm256_set1_epi16((short)less));
}
#else
inline Bytes begin_half(int32_t start) { return Bytes{} + start; }
inline Bytes add_to_half(Bytes sums, Bytes weights, Bytes x) { return dot<false>(sums, weights, x); }
inline Bytes end_half(Bytes sums, Bytes unit) { return sums * unit; }
inline Bytes unit(Bytes x, int which, int less) { return ((x >> 8 * which) & 0xff) - less; }
#endif

// The products of two integers of 16 bits in each lane and the sums of activations, added.
inline Bytes multiply_halves(Bytes x, const int32_t (&halves)[2]) {
#if defined(__AVX2__)
    const Bytes both = Bytes{} + (int32_t)((uint32_t)halves[1] << 16 | (halves[0] & 0xffff));
#ifdef __AVX512BW__
    return (Bytes)_mm512_madd_epi16((__m512i)x, (__m512i)both);
#else
    return (Bytes)_mm256_madd_epi16((__m256i)x, (__m256i)both);
#endif
#else
    return ((x << 16) >> 16) * halves[0] + (x >> 16) * halves[1];
#endif
}

// ---- activations

inline Bytes round_numbers(Floats x) {
    const Floats zero = all<Floats>(12582912.0f);  // floats of this size are integers
    return (Bytes)(x + zero) - (Bytes)zero;
}

inline int32_t total(Bytes x) {
    i8 parts[WIDE / LANES], y = {};
    std::memcpy(parts, &x, sizeof x);
    for (const i8 &part : parts) y += part;
    return fold(y, [](i8 a, i8 b) { return a + b; });
}

void round_piece(const float *from, BytePiece &to) {
    using Eight = int8_t __attribute__((vector_size(WIDE)));
    constexpr int VECTORS = STEP / WIDE;
    Floats x[VECTORS], most = {}, zeros = {};  // zeros: NaN where an element is not finite
    for (int i = 0; i < VECTORS; i++) {
        x[i] = load<Floats>(from + i * WIDE);
        most = larger(larger(x[i], -x[i]), most);
        zeros = fused(x[i], Floats{}, zeros);
    }
    f8 zero = {};
    add(zero, zeros);
    const float not_finite = sum(zero);  // 0, or NaN
    if (not_finite != 0)                 // NaN and infinity would be rounded to arbitrary integers, whose sums overflow
        for (Floats &part : x) part = Floats{};
    const float highest = largest(most), units = highest == 0 ? 0 : 127 / highest;
    Bytes sums[2] = {};
    for (int i = 0; i < VECTORS; i++) {
        const Bytes whole = round_numbers(x[i] * units);
        const Eight small = __builtin_convertvector(whole, Eight);
        std::memcpy(to.elements + i * WIDE, &small, sizeof small);
        sums[i * 2 / VECTORS] += whole;
    }
    to.scale = highest / 127 + not_finite;
    for (int half = 0; half < 2; half++) to.halves[half] = total(sums[half]);
    to.sum = to.scale * (float)(to.halves[0] + to.halves[1]);
}

// ---- weights

inline Floats to_floats(Bytes x) { return __builtin_convertvector(x, Floats); }

// Some bits of every byte. The mask must remove the bits that the shift moves in from the next byte.
inline Bytes bits(Bytes x, int shift, int mask) { return (x >> shift) & mask * 0x01010101; }
inline Bytes nibbles(Bytes x, int which) { return bits(x, 4 * which, 0x0f); }
inline Floats unsigned_byte(Bytes x, int which) { return to_floats((x >> 8 * which) & 0xff); }
inline Floats signed_byte(Bytes x, int which) { return to_floats((x << (24 - 8 * which)) >> 24); }

// The entries of a table that the bytes of `x` number. Each byte must be less than 16.
inline Bytes look_up(const int8_t (&table)[16], Bytes x) {
#if defined(__AVX512BW__)
    const __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (Bytes)_mm512_shuffle_epi8(entries, (__m512i)x);
#elif defined(__AVX2__)
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (Bytes)_mm256_shuffle_epi8(entries, (__m256i)x);
#else
    const int8x16_t entries = vld1q_s8(table);
    uint8x16_t parts[2];
    std::memcpy(parts, &x, sizeof x);
    for (uint8x16_t &part : parts) part = vreinterpretq_u8_s8(vqtbl1q_s8(entries, part));
    std::memcpy(&x, parts, sizeof x);
    return x;
#endif
}

// Each type has: ggml's number `ID`, the `BYTES` and `STEPS` of a block, the offset `HALF_AT` of its 2-byte scale or
// `BYTE_AT` of its 1-byte scale (-1: none), and
// `unpack`, which writes step i of a block of each row to to[i * apart]. Types of bytes also have: `EXCESS`, the constant that is
// contained in each unpacked byte; `SIGNED`; `HALVES`, whether each half of a step has a scale; `LEAST`, whether a minimum is
// subtracted; `MOST`, the largest unpacked byte.

struct Quantized {
    using Step = ByteStep;
    using Piece = BytePiece;
    static constexpr bool SIGNED = false, HALVES = false, LEAST = false;
    static constexpr int HALF_AT = -1, BYTE_AT = -1, MOST = 255;
    static void prepare(const float *from, Piece &to) { round_piece(from, to); }
};

struct Q8_0 : Quantized {
    static constexpr int ID = 8, BYTES = 34, STEPS = 1, HALF_AT = 0, EXCESS = MIXED ? 128 : 0;
    static constexpr bool SIGNED = !MIXED;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        for (int part = 0; part < 2; part++) {
            Bytes columns[4];
            rows.columns(2 + 16 * part, columns);
            for (int i = 0; i < 4; i++) to->weights[4 * part + i] = MIXED ? columns[i] ^ (int32_t)0x80808080 : columns[i];
        }
        to->scales[0] = rows.halves(0);
    }
};

struct Q4_0 : Quantized {
    static constexpr int ID = 2, BYTES = 18, STEPS = 1, HALF_AT = 0, EXCESS = 8, MOST = 15;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        Bytes columns[4];
        rows.columns(2, columns);
        for (int i = 0; i < 8; i++) to->weights[i] = nibbles(columns[i % 4], i / 4);
        to->scales[0] = rows.halves(0);
    }
};

// The half that scales a block and the half that is added to its products, which are the halves of one word.
inline void unpack_halves(Bytes word, ByteStep &to) {
    to.scales[0] = lower_halves(word);
    to.least = -upper_halves(word);
}

struct Q4_1 : Quantized {
    static constexpr int ID = 3, BYTES = 20, STEPS = 1, EXCESS = 0, MOST = 15;
    static constexpr bool LEAST = true;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        Bytes columns[4];
        rows.columns(4, columns);
        for (int i = 0; i < 8; i++) to->weights[i] = nibbles(columns[i % 4], i / 4);
        unpack_halves(rows.column(0), *to);
    }
};

// The 32 weights of a step of Q5_0 and Q5_1: their fifth bits lie in the word at `at`, the others in the 16 bytes after it.
template <class Rows>
inline void unpack_five_bits(Rows rows, int at, ByteStep &to) {
    Bytes columns[4];
    const Bytes fifth = rows.column(at);
    rows.columns(at + 4, columns);
    for (int i = 0; i < 8; i++) {
        // Moves four bits to four bytes: the product adds copies, each shifted by seven bits more than the previous one.
        const Bytes spread = bits(((fifth >> 4 * i) & 15) * 0x00204081, 0, 1);
        to.weights[i] = nibbles(columns[i % 4], i / 4) | spread << 4;
    }
}

struct Q5_0 : Quantized {
    static constexpr int ID = 6, BYTES = 22, STEPS = 1, HALF_AT = 0, EXCESS = 16, MOST = 31;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        unpack_five_bits(rows, 2, *to);
        to->scales[0] = rows.halves(0);
    }
};

struct Q5_1 : Quantized {
    static constexpr int ID = 7, BYTES = 24, STEPS = 1, EXCESS = 0, MOST = 31;
    static constexpr bool LEAST = true;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        unpack_five_bits(rows, 4, *to);
        unpack_halves(rows.column(0), *to);
    }
};

// Weights of IQ4_NL and IQ4_XS: each number of 4 bits stands for one of 16 bytes with sign.
struct Nonlinear : Quantized {
    static constexpr int EXCESS = MIXED ? 128 : 0;
    static constexpr bool SIGNED = !MIXED;
    static constexpr int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

    // The 32 weights of a step, from 16 bytes of each row.
    static void unpack_step(const Bytes (&columns)[4], ByteStep &to) {
        for (int i = 0; i < 8; i++) {
            const Bytes values = look_up(VALUES, nibbles(columns[i % 4], i / 4));
            to.weights[i] = MIXED ? values ^ (int32_t)0x80808080 : values;
        }
    }
};

struct IQ4_NL : Nonlinear {
    static constexpr int ID = 20, BYTES = 18, STEPS = 1, HALF_AT = 0;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        Bytes columns[4];
        rows.columns(2, columns);
        unpack_step(columns, *to);
        to->scales[0] = rows.halves(0);
    }
};

// Each number of 4 bits stands for one of 16 bytes, from -12 to 12; a block has a power of two as its scale.
struct MXFP4 : Quantized {
    static constexpr int ID = 39, BYTES = 17, STEPS = 1, BYTE_AT = 0, EXCESS = 12, MOST = 24;
    static constexpr int8_t VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // plus EXCESS

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int) {
        Bytes columns[4];
        rows.columns(1, columns);
        for (int i = 0; i < 8; i++) to->weights[i] = look_up(VALUES, nibbles(columns[i % 4], i / 4));
        // 2 to the power of `exponent - 128`, which is subnormal for the exponents 0 and 1.
        const Bytes exponent = rows.bytes(0);
        to->scales[0] = (Floats)(exponent < 2 ? (exponent + 1) << 21 : (exponent - 1) << 23);
    }
};

struct IQ4_XS : Nonlinear {
    static constexpr int ID = 23, BYTES = 136, STEPS = 8;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int apart) {
        Bytes header[4];  // two words: a half and the 2 upper bits of the eight scales, then their 4 lower bits
        rows.columns(0, header);
        const Floats scale = lower_halves(header[0]);
#pragma GCC unroll 8
        for (int step = 0; step < 8; step++) {
            Bytes columns[4];
            rows.columns(8 + 16 * step, columns);
            unpack_step(columns, to[step * apart]);
            const Bytes units = ((header[1] >> 4 * step) & 0x0f) | ((header[0] >> (16 + 2 * step)) & 3) << 4;
            to[step * apart].scales[0] = scale * to_floats(units - 32);
        }
    }
};

// Q2_K and Q3_K: each half of a step has an integer as its scale.
struct Units : Quantized {
    using Step = UnitStep;
};

struct Q2_K : Units {
    static constexpr int ID = 10, BYTES = 84, STEPS = 8, EXCESS = 0, MOST = 3;
    static constexpr bool LEAST = true;

    template <class Rows>
    static void unpack(Rows rows, UnitStep *to, int apart) {
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {  // 16 bytes: half of four steps
            Bytes columns[4];
            rows.columns(16 + 16 * quarter, columns);
            const int first = quarter / 2 * 4, part = quarter % 2;
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++)
                for (int i = 0; i < 4; i++) to[(first + s) * apart].weights[4 * part + i] = bits(columns[i], 2 * s, 3);
        }
        Bytes header[4];  // a byte for each half of a step: its scale in the lower 4 bits, its minimum in the upper ones
        rows.columns(0, header);
        const Bytes halves = rows.column(80);
        const Floats scale = lower_halves(halves), least = upper_halves(halves);
#pragma GCC unroll 8
        for (int step = 0; step < 8; step++) {
            UnitStep &now = to[step * apart];
            const Bytes units = nibbles(header[step / 2], 0), leasts = nibbles(header[step / 2], 1) >> step % 2 * 16;
            for (int half = 0; half < 2; half++) now.units[half] = unit(units, step % 2 * 2 + half, 0);
            now.leasts = (leasts & 0xff) | (leasts & 0xff00) << 8;
            now.scale = scale, now.least = least;
        }
    }
};

struct Q3_K : Units {
    static constexpr int ID = 11, BYTES = 110, STEPS = 8, HALF_AT = 108, EXCESS = 4, MOST = 7;

    template <class Rows>
    static void unpack(Rows rows, UnitStep *to, int apart) {
        Bytes third[2][4];
        for (int half = 0; half < 2; half++) rows.columns(16 * half, third[half]);
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {  // 16 bytes: half of four steps
            Bytes columns[4];
            rows.columns(32 + 16 * quarter, columns);
            const int first = quarter / 2 * 4, part = quarter % 2;
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++)
                for (int i = 0; i < 4; i++) {
                    const int bit = first + s;  // moved to bit 2
                    const Bytes high = (bit < 2 ? third[part][i] << (2 - bit) : third[part][i] >> (bit - 2)) & 0x04040404;
                    to[bit * apart].weights[4 * part + i] = bits(columns[i], 2 * s, 3) | high;
                }
        }
        Bytes header[4];  // the last word of the weights, then the 16 scales: two words with 4 bits of each, one with 2 bits
        rows.columns(92, header);
        const Floats scale = rows.halves(108);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const Bytes units = nibbles(header[1 + i / 4 % 2], i / 8) | bits(header[3], i / 4 * 2, 3) << 4;
            to[i / 2 * apart].units[i % 2] = unit(units, i % 4, 32);
            to[i / 2 * apart].scale = scale;
        }
    }
};

// Scales and minimums of Q4_K and Q5_K: eight of each, with 6 bits, in 12 bytes after two halves.
template <class Rows>
inline void unpack_header(Rows rows, ByteStep *to, int apart) {
    Bytes header[4];
    rows.columns(0, header);
    const Floats scale = lower_halves(header[0]), least = upper_halves(header[0]);
    const Bytes scales[2] = {bits(header[1], 0, 0x3f), bits(header[3], 0, 0x0f) | bits(header[1], 2, 0x30)};
    const Bytes leasts[2] = {bits(header[2], 0, 0x3f), bits(header[3], 4, 0x0f) | bits(header[2], 2, 0x30)};
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) {
        to[step * apart].scales[0] = scale * unsigned_byte(scales[step / 4], step % 4);
        to[step * apart].least = least * unsigned_byte(leasts[step / 4], step % 4);
    }
}

struct Q4_K : Quantized {
    static constexpr int ID = 12, BYTES = 144, STEPS = 8, EXCESS = 0, MOST = 15;
    static constexpr bool LEAST = true;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int apart) {
        unpack_header(rows, to, apart);
        for (int part = 0; part < 8; part++) {  // 16 bytes: half of two steps
            Bytes columns[4];
            rows.columns(16 + 16 * part, columns);
            ByteStep *pair = to + part / 2 * 2 * apart;
            for (int i = 0; i < 4; i++) {
                pair[0].weights[part % 2 * 4 + i] = nibbles(columns[i], 0);
                pair[apart].weights[part % 2 * 4 + i] = nibbles(columns[i], 1);
            }
        }
    }
};

struct Q5_K : Quantized {
    static constexpr int ID = 13, BYTES = 176, STEPS = 8, EXCESS = 0, MOST = 31;
    static constexpr bool LEAST = true;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int apart) {
        unpack_header(rows, to, apart);
        Bytes fifth[2][4];
        for (int half = 0; half < 2; half++) rows.columns(16 + 16 * half, fifth[half]);
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            Bytes columns[4];
            rows.columns(48 + 16 * part, columns);
            const int step = part / 2 * 2;
            for (int i = 0; i < 4; i++) {
                const Bytes high = fifth[part % 2][i];
                for (int j = 0; j < 2; j++)
                    to[(step + j) * apart].weights[part % 2 * 4 + i] = nibbles(columns[i], j) | bits(high, step + j, 1) << 4;
            }
        }
    }
};

struct Q6_K : Quantized {
    static constexpr int ID = 14, BYTES = 210, STEPS = 8, HALF_AT = 208, EXCESS = 32;
    static constexpr bool HALVES = true;

    template <class Rows>
    static void unpack(Rows rows, ByteStep *to, int apart) {
        for (int quarter = 0; quarter < 4; quarter++) {  // 16 bytes of high bits: half of four steps
            Bytes high[4], low[2][4];
            const int four = quarter / 2, part = quarter % 2;
            rows.columns(128 + 16 * quarter, high);
            for (int j = 0; j < 2; j++) rows.columns(64 * four + 32 * j + 16 * part, low[j]);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const Bytes top = bits(high[i], 2 * s, 3) << 4;
                    to[(4 * four + s) * apart].weights[4 * part + i] = nibbles(low[s % 2][i], s / 2) | top;
                }
            }
        }
        Bytes scales[4];
        rows.columns(192, scales);
        const Floats scale = rows.halves(208);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) to[i / 2 * apart].scales[i % 2] = scale * signed_byte(scales[i / 4], i % 4);
    }
};

// Types with float weights, or weights that are converted to floats exactly.
struct Plain {
    struct Step {
        Floats weights[STEP];
    };
    struct Piece {
        float elements[STEP];
    };
    static constexpr int STEPS = 1, HALF_AT = -1, BYTE_AT = -1;
    static void prepare(const float *from, Piece &to) { std::memcpy(to.elements, from, sizeof to.elements); }
};

struct Float32 : Plain {
    static constexpr int ID = 0, BYTES = 4 * STEP;

    template <class Rows>
    static void unpack(Rows rows, Step *to, int) {
#pragma GCC unroll 8
        for (int i = 0; i < STEP; i += 4) {
            Bytes columns[4];
            rows.columns(4 * i, columns);
            for (int j = 0; j < 4; j++) to->weights[i + j] = (Floats)columns[j];
        }
    }
};

// Each word holds two weights of 16 bits, in its lower and its upper half.
struct Float16 : Plain {
    static constexpr int ID = 1, BYTES = 2 * STEP;

    static Floats lower(Bytes x) { return lower_halves(x); }
    static Floats upper(Bytes x) { return upper_halves(x); }
    template <class Rows>
    static void unpack(Rows rows, Step *to, int) {
        unpack_two<Float16>(rows, to);
    }

    template <class Type, class Rows>
    static void unpack_two(Rows rows, Step *to) {
#pragma GCC unroll 4
        for (int i = 0; i < STEP; i += 8) {
            Bytes columns[4];
            rows.columns(2 * i, columns);
            for (int j = 0; j < 4; j++) {
                to->weights[i + 2 * j] = Type::lower(columns[j]);
                to->weights[i + 2 * j + 1] = Type::upper(columns[j]);
            }
        }
    }
};

struct BFloat16 : Plain {
    static constexpr int ID = 30, BYTES = 2 * STEP;

    static Floats lower(Bytes x) { return (Floats)(x << 16); }
    static Floats upper(Bytes x) { return (Floats)(x & (int32_t)0xffff0000); }
    template <class Rows>
    static void unpack(Rows rows, Step *to, int) {
        Float16::unpack_two<BFloat16>(rows, to);
    }
};

template <class... Types>
struct List {
    // Calls `use` with the struct of ggml's type `id`. Returns false if there is none.
    template <class Do>
    static bool find(int32_t id, Do use) {
        return ((id == Types::ID && (use(Types{}), true)) || ...);
    }
};
using KnownTypes =
    List<Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Float16, BFloat16, Float32>;

}  // namespace
}  // namespace products

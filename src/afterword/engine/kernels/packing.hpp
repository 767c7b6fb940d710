// Rows of weights side by side, a row to a lane: as they lie in a file, and as they are kept in memory of our own.
//
// A block of a file is made of numbers of four bytes, and of a half in some types. Where it is packed, the first number of
// all rows of a group comes before their second, so that what is multiplied next is what lies next: nothing has to be
// turned, and memory is read from its beginning to its end.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.hpp"
#include "parallel.hpp"

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

namespace products {
namespace {

using Bytes = wide_ints;  // of each lane's row 4 bytes
using Floats = wide;      // of each lane's row one

constexpr int LANE_ROWS = WIDE;  // a group

#ifdef __AVX512F__
#define WITHIN_FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#else
#define WITHIN_FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#endif

// A block of each row of a group, in a file. What is asked for begins `at` so many bytes of the block.
struct InFile {
    const char *from;  // the first row's
    size_t stride;

    // Four numbers from each row: the first of every row, the second, and so on.
    void columns(int at, Bytes (&to)[4]) const {
        Bytes r[4], a[4];
        for (int i = 0; i < 4; i++) r[i] = every_fourth(at + i * stride);
        for (int i = 0; i < 2; i++) {
            a[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], WITHIN_FOURS(0, WIDE, 1, WIDE + 1));
            a[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], WITHIN_FOURS(2, WIDE + 2, 3, WIDE + 3));
        }
        for (int i = 0; i < 2; i++) {
            to[2 * i] = SHUFFLE(a[i], a[i + 2], WITHIN_FOURS(0, 1, WIDE, WIDE + 1));
            to[2 * i + 1] = SHUFFLE(a[i], a[i + 2], WITHIN_FOURS(2, 3, WIDE + 2, WIDE + 3));
        }
    }

    Bytes column(int at) const {
        Bytes x;
        for (int i = 0; i < LANE_ROWS; i++) std::memcpy((char *)&x + 4 * i, from + i * stride + at, 4);
        return x;
    }

    Floats halves(int at) const {
        alignas(32) half bits[LANE_ROWS];
        for (int i = 0; i < LANE_ROWS; i++) std::memcpy(&bits[i], from + i * stride + at, 2);
        return widen_all(bits);
    }

   private:
    // 16 bytes of every fourth row.
    Bytes every_fourth(size_t at) const {
        const char *first = from + at;
#if defined(__AVX512F__)
        __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)first));
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(first + 4 * stride)), 1);
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(first + 8 * stride)), 2);
        return (Bytes)_mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(first + 12 * stride)), 3);
#elif defined(__AVX2__)
        return (Bytes)_mm256_loadu2_m128i((const __m128i *)(first + 4 * stride), (const __m128i *)first);
#else
        Bytes x;
        for (int i = 0; i < LANE_ROWS / 4; i++) std::memcpy((char *)&x + 16 * i, first + 4 * i * stride, 16);
        return x;
#endif
    }
};

// The same of a group that is packed.
struct Packed {
    const char *from;

    void columns(int at, Bytes (&to)[4]) const {
        for (int i = 0; i < 4; i++) to[i] = column(at + 4 * i);
    }

    Bytes column(int at) const {
        Bytes x;
        std::memcpy(&x, from + at * LANE_ROWS, sizeof x);
        return x;
    }

    Floats halves(int at) const {
        alignas(32) half bits[LANE_ROWS];
        std::memcpy(bits, from + at * LANE_ROWS, sizeof bits);
        return widen_all(bits);
    }
};

// Where packed weights are: so many blocks a row. Blocks are counted as they lie in a file.
template <class Type>
struct Packing {
    char *data;
    int64_t blocks;

    // Copies some blocks from a file.
    void pack(char *file, int64_t first, int64_t count, int threads) const {
        const int64_t group = blocks * LANE_ROWS, whole = (first + group - 1) / group * group, end = (first + count) / group * group;
        if (whole >= end) return copy<false>(file, first, count);
        const auto at = [=](int64_t block) { return file + (block - first) * Type::BYTES; };
        copy<false>(file, first, whole - first);
        parallel_for(threads, (end - whole) / group, [=](int64_t i) {
            const int64_t block = whole + i * group;
            pack_rows(at(block), data + block * Type::BYTES);
        });
        copy<false>(at(end), end, first + count - end);
    }

    // And back.
    void unpack(char *file, int64_t first, int64_t count) const { copy<true>(file, first, count); }

   private:
    // A whole group.
    void pack_rows(const char *file, char *to) const {
        for (int64_t block = 0; block < blocks; block++, to += Type::BYTES * LANE_ROWS) {
            const InFile rows{file + block * Type::BYTES, (size_t)blocks * Type::BYTES};
            for (int at = 0, size; at < Type::BYTES; at += size) {
                const int left = (at < Type::HALF_AT ? Type::HALF_AT : Type::BYTES) - at;
                size = at == Type::HALF_AT ? 2 : left >= 16 ? 16 : 4;
                if (size == 16) {
                    Bytes columns[4];
                    rows.columns(at, columns);
                    std::memcpy(to + at * LANE_ROWS, columns, sizeof columns);
                } else {
                    for (int i = 0; i < LANE_ROWS; i++)
                        std::memcpy(to + at * LANE_ROWS + i * size, rows.from + i * rows.stride + at, size);
                }
            }
        }
    }

    template <bool BACK>
    void copy(char *file, int64_t first, int64_t count) const {
        for (int64_t i = first; i < first + count; i++, file += Type::BYTES) {
            const int64_t row = i / blocks, lane = row % LANE_ROWS;
            char *const block = data + ((row - lane) * blocks + i % blocks * LANE_ROWS) * Type::BYTES;
            for (int at = 0, size; at < Type::BYTES; at += size) {
                size = at == Type::HALF_AT ? 2 : 4;
                char *const part = block + at * LANE_ROWS + lane * size;
                std::memcpy(BACK ? file + at : part, BACK ? part : file + at, size);
            }
        }
    }
};

inline Floats lower_halves(Bytes x) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
#else
    return from_half(x & 0xffff);
#endif
}

inline Floats upper_halves(Bytes x) { return lower_halves(x >> 16); }

}  // namespace
}  // namespace products

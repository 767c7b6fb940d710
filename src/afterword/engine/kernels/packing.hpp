// Groups of weight rows, one row to a lane: reads them in the order of the file or packed, and converts between the two.
//
// A block in a file consists of 4-byte words, and in some types of a 2-byte scale. In a packed group the first words of all
// rows precede their second words, in the order in which products read them. So a vector is loaded without shuffles, and
// memory is read from the beginning to the end.

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

using Bytes = wide_ints;  // 4 bytes of the row of each lane
using Floats = wide;      // one float of the row of each lane

constexpr int LANE_ROWS = WIDE;  // rows of a group

#ifdef __AVX512F__
#define IN_EACH_FOUR(a, b, c, d) \
    a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4, (a) + 8, (b) + 8, (c) + 8, (d) + 8, (a) + 12, (b) + 12, (c) + 12, (d) + 12
#else
#define IN_EACH_FOUR(a, b, c, d) a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4
#endif

// A block of each row of a group, in the order of the file. `at`: an offset in the block, in bytes.
struct InFile {
    const char *from;  // the block of the first row
    size_t stride;     // bytes from one row to the next

    // Four words of each row: to[i] has word i of every row.
    void columns(int at, Bytes (&to)[4]) const {
        Bytes r[4], a[4];
        for (int i = 0; i < 4; i++) r[i] = every_fourth(at + i * stride);
        for (int i = 0; i < 2; i++) {
            a[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], IN_EACH_FOUR(0, WIDE, 1, WIDE + 1));
            a[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], IN_EACH_FOUR(2, WIDE + 2, 3, WIDE + 3));
        }
        for (int i = 0; i < 2; i++) {
            to[2 * i] = SHUFFLE(a[i], a[i + 2], IN_EACH_FOUR(0, 1, WIDE, WIDE + 1));
            to[2 * i + 1] = SHUFFLE(a[i], a[i + 2], IN_EACH_FOUR(2, 3, WIDE + 2, WIDE + 3));
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
    // 16 bytes of each of the rows 0, 4, 8 and 12.
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

// The same for a packed group.
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

// Packed weights with `blocks` blocks in a row. Blocks are numbered in the order of the file.
template <class Type>
struct Packing {
    char *data;
    int64_t blocks;

    // Packs the blocks from `first` to `first + count - 1`, which `file` holds. Whole groups are packed by several threads.
    void pack(char *file, int64_t first, int64_t count, int threads) const {
        const int64_t group = blocks * LANE_ROWS, first_group = (first + group - 1) / group * group,
                      group_end = (first + count) / group * group;
        if (first_group >= group_end) return copy<false>(file, first, count);
        const auto at = [=](int64_t block) { return file + (block - first) * Type::BYTES; };
        copy<false>(file, first, first_group - first);
        parallel_for(threads, (group_end - first_group) / group, [=](int64_t i) {
            const int64_t block = first_group + i * group;
            pack_rows(at(block), data + block * Type::BYTES);
        });
        copy<false>(at(group_end), group_end, first + count - group_end);
    }

    // Writes such blocks to `file`.
    void unpack(char *file, int64_t first, int64_t count) const { copy<true>(file, first, count); }

   private:
    // Packs one group.
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

// Products of quantized weights with activations, the same bits for a column whatever other columns there are.
//
// Activations are rounded to 8 bits, 32 at a time, as llama.cpp does. Integers are summed exactly; what an integer sum weighs
// is added, step by step of 32 elements from the first, to one running float for each row and column. So the order of
// additions depends on neither the number of columns nor of threads, and there is one path for a single token and for a
// thousand. Weights are read as they lie in the file: 16 rows at a time are unpacked, a row to a lane, and multiplied with
// all columns.
//
// It needs AVX-512 with VNNI; elsewhere `takes` says no and llama.cpp computes.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#include <immintrin.h>

namespace products {
namespace {

using Bytes = __m512i;   // 16 rows of 4 bytes
using Floats = __m512;   // 16 rows

constexpr bool AVAILABLE = true;
constexpr int STEP = 32;                 // elements
constexpr int LANE_ROWS = 16, TILES = 2, ROWS = TILES * LANE_ROWS;
constexpr int CHUNK = 16;                // steps that are unpacked before they are multiplied: they stay in the first cache
constexpr int MOST_COLUMNS = 6;          // multiplied together: as many as there are registers for their sums

// A step of 16 rows, unpacked: weights without sign, what a unit of them is worth in each half, what is taken off.
struct Step {
    Bytes weights[STEP / 4];
    Floats scales[2];
    Floats least;
};

// A step of one column: rounded activations, what a unit is worth, sums of each half.
struct Piece {
    int8_t elements[STEP];
    float scale;
    int32_t halves[2];
    float sum;  // in true units
};

// ---- activations

void round_piece(const float *from, Piece &to) {
    const Floats a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const Floats units = _mm512_set1_ps(most == 0 ? 0 : 127 / most);
    const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(a, units)), y = _mm512_cvtps_epi32(_mm512_mul_ps(b, units));
    _mm_storeu_si128((__m128i *)to.elements, _mm512_cvtsepi32_epi8(x));
    _mm_storeu_si128((__m128i *)(to.elements + 16), _mm512_cvtsepi32_epi8(y));
    to.scale = most / 127;
    to.halves[0] = _mm512_reduce_add_epi32(x);
    to.halves[1] = _mm512_reduce_add_epi32(y);
    to.sum = to.scale * (float)(to.halves[0] + to.halves[1]);
}

// ---- weights

// Four numbers of 32 bits from each of 16 rows: the first of every row, the second, and so on.
inline void read_columns(const char *from, size_t stride, Bytes (&to)[4]) {
    Bytes r[4], a[4];
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from + i * stride)));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(from + (i + 4) * stride)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(from + (i + 8) * stride)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(from + (i + 12) * stride)), 3);
    }
    for (int i = 0; i < 2; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        to[2 * i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        to[2 * i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    }
}

inline Floats read_halves(const char *from, size_t stride) {
    alignas(32) uint16_t bits[LANE_ROWS];
    for (int i = 0; i < LANE_ROWS; i++) std::memcpy(&bits[i], from + i * stride, 2);
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)bits));
}

inline Bytes nibbles(Bytes x, int shift) { return _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi32(0x0f0f0f0f)); }
inline Bytes bits(Bytes x, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi32(mask * 0x01010101));
}
inline Floats unsigned_byte(Bytes x, int which) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 8 * which), _mm512_set1_epi32(0xff)));
}
inline Floats signed_byte(Bytes x, int which) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * which), 24));
}

// Each type: what ggml calls it, bytes and steps of a block, by how much the unpacked weights are too large, whether each
// half of a step has a scale of its own, whether something is taken off (`least`); and how a block of 16 rows is unpacked,
// `TILES` apart.

struct Q8_0 {
    static constexpr int ID = 8, BYTES = 34, STEPS = 1, EXCESS = 128;
    static constexpr bool HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        for (int half = 0; half < 2; half++) {
            Bytes columns[4];
            read_columns(from + 2 + 16 * half, stride, columns);
            for (int i = 0; i < 4; i++) to->weights[4 * half + i] = _mm512_xor_si512(columns[i], _mm512_set1_epi8(-128));
        }
        to->scales[0] = read_halves(from, stride);
    }
};

struct Q4_0 {
    static constexpr int ID = 2, BYTES = 18, STEPS = 1, EXCESS = 8;
    static constexpr bool HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        Bytes columns[4];
        read_columns(from + 2, stride, columns);
        for (int i = 0; i < 8; i++) to->weights[i] = nibbles(columns[i % 4], i / 4 * 4);
        to->scales[0] = read_halves(from, stride);
    }
};

struct Q5_0 {
    static constexpr int ID = 6, BYTES = 22, STEPS = 1, EXCESS = 16;
    static constexpr bool HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        alignas(64) uint32_t fifth[LANE_ROWS];
        for (int i = 0; i < LANE_ROWS; i++) std::memcpy(&fifth[i], from + i * stride + 2, 4);
        const Bytes high = _mm512_load_si512(fifth);
        Bytes columns[4];
        read_columns(from + 6, stride, columns);
        for (int i = 0; i < 8; i++) {
            // Four bits to four bytes: copies of them, each moved seven bits further than the one before.
            const Bytes four = _mm512_and_si512(_mm512_srli_epi32(high, 4 * i), _mm512_set1_epi32(15));
            const Bytes spread = bits(_mm512_mullo_epi32(four, _mm512_set1_epi32(0x00204081)), 0, 1);
            to->weights[i] = _mm512_or_si512(nibbles(columns[i % 4], i / 4 * 4), _mm512_slli_epi32(spread, 4));
        }
        to->scales[0] = read_halves(from, stride);
    }
};

// Scales and least values of Q4_K and Q5_K: 6 bits each, eight of either, packed into 12 bytes behind two halves.
inline void unpack_header(const char *from, size_t stride, Step *to) {
    Bytes header[4];
    read_columns(from, stride, header);
    const auto half = [](Bytes x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); };
    const Floats scale = half(header[0]), least = half(_mm512_srli_epi32(header[0], 16));
    const Bytes scales[2] = {bits(header[1], 0, 0x3f), _mm512_or_si512(bits(header[3], 0, 0x0f), bits(header[1], 2, 0x30))};
    const Bytes leasts[2] = {bits(header[2], 0, 0x3f), _mm512_or_si512(bits(header[3], 4, 0x0f), bits(header[2], 2, 0x30))};
    for (int step = 0; step < 8; step++) {
        to[step * TILES].scales[0] = _mm512_mul_ps(scale, unsigned_byte(scales[step / 4], step % 4));
        to[step * TILES].least = _mm512_mul_ps(least, unsigned_byte(leasts[step / 4], step % 4));
    }
}

struct Q4_K {
    static constexpr int ID = 12, BYTES = 144, STEPS = 8, EXCESS = 0;
    static constexpr bool HALVES = false, LEAST = true;

    static void unpack(const char *from, size_t stride, Step *to) {
        unpack_header(from, stride, to);
        for (int part = 0; part < 8; part++) {  // 16 bytes: half of two steps
            Bytes columns[4];
            read_columns(from + 16 + 16 * part, stride, columns);
            Step *pair = to + part / 2 * 2 * TILES;
            for (int i = 0; i < 4; i++) {
                pair[0].weights[part % 2 * 4 + i] = nibbles(columns[i], 0);
                pair[TILES].weights[part % 2 * 4 + i] = nibbles(columns[i], 4);
            }
        }
    }
};

struct Q5_K {
    static constexpr int ID = 13, BYTES = 176, STEPS = 8, EXCESS = 0;
    static constexpr bool HALVES = false, LEAST = true;

    static void unpack(const char *from, size_t stride, Step *to) {
        unpack_header(from, stride, to);
        Bytes fifth[2][4];
        for (int half = 0; half < 2; half++) read_columns(from + 16 + 16 * half, stride, fifth[half]);
        for (int part = 0; part < 8; part++) {
            Bytes columns[4];
            read_columns(from + 48 + 16 * part, stride, columns);
            const int step = part / 2 * 2;
            for (int i = 0; i < 4; i++) {
                const Bytes high = fifth[part % 2][i];
                to[step * TILES].weights[part % 2 * 4 + i] =
                    _mm512_or_si512(nibbles(columns[i], 0), _mm512_slli_epi32(bits(high, step, 1), 4));
                to[(step + 1) * TILES].weights[part % 2 * 4 + i] =
                    _mm512_or_si512(nibbles(columns[i], 4), _mm512_slli_epi32(bits(high, step + 1, 1), 4));
            }
        }
    }
};

struct Q6_K {
    static constexpr int ID = 14, BYTES = 210, STEPS = 8, EXCESS = 32;
    static constexpr bool HALVES = true, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        for (int part = 0; part < 4; part++) {  // 16 bytes of high bits: half of four steps
            Bytes high[4], low[2][4];
            const int four = part / 2, half = part % 2;
            read_columns(from + 128 + 16 * part, stride, high);
            for (int j = 0; j < 2; j++) read_columns(from + 64 * four + 32 * j + 16 * half, stride, low[j]);
            for (int s = 0; s < 4; s++) {
                for (int i = 0; i < 4; i++) {
                    const Bytes top = _mm512_slli_epi32(bits(high[i], 2 * s, 3), 4);
                    to[(4 * four + s) * TILES].weights[4 * half + i] = _mm512_or_si512(nibbles(low[s % 2][i], s / 2 * 4), top);
                }
            }
        }
        Bytes scales[4];
        read_columns(from + 192, stride, scales);
        const Floats scale = read_halves(from + 208, stride);
        for (int i = 0; i < 16; i++)
            to[i / 2 * TILES].scales[i % 2] = _mm512_mul_ps(scale, signed_byte(scales[i / 4], i % 4));
    }
};

// ---- rows by columns

// Adds some steps of a tile of rows times some columns to their sums.
template <class Type, int COLUMNS>
void multiply(float *sums, const Step *weights, const Piece *const *columns, int steps) {
    Floats total[COLUMNS][TILES];
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) total[c][t] = _mm512_loadu_ps(sums + c * ROWS + t * LANE_ROWS);
    for (int s = 0; s < steps; s++, weights += TILES) {
        Bytes exact[COLUMNS][TILES];
        const auto start = [&](int half) {
            for (int c = 0; c < COLUMNS; c++) {
                const int32_t *halves = columns[c][s].halves;
                const int32_t sum = Type::HALVES ? halves[half] : halves[0] + halves[1];
                for (int t = 0; t < TILES; t++) exact[c][t] = _mm512_set1_epi32(-Type::EXCESS * sum);
            }
        };
        const auto finish = [&](int half) {
            for (int t = 0; t < TILES; t++)
                for (int c = 0; c < COLUMNS; c++) {
                    const Floats part = _mm512_mul_ps(_mm512_cvtepi32_ps(exact[c][t]), weights[t].scales[half]);
                    total[c][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(columns[c][s].scale), total[c][t]);
                }
        };
        start(0);
#pragma GCC unroll 8
        for (int i = 0; i < STEP / 4; i++) {
            if (Type::HALVES && i == STEP / 8) finish(0), start(1);
            for (int c = 0; c < COLUMNS; c++) {
                int32_t four;
                std::memcpy(&four, columns[c][s].elements + 4 * i, 4);
                for (int t = 0; t < TILES; t++)
                    exact[c][t] = _mm512_dpbusd_epi32(exact[c][t], weights[t].weights[i], _mm512_set1_epi32(four));
            }
        }
        finish(Type::HALVES);
        if (Type::LEAST)
            for (int t = 0; t < TILES; t++)
                for (int c = 0; c < COLUMNS; c++)
                    total[c][t] = _mm512_fnmadd_ps(weights[t].least, _mm512_set1_ps(columns[c][s].sum), total[c][t]);
    }
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) _mm512_storeu_ps(sums + c * ROWS + t * LANE_ROWS, total[c][t]);
}

// What a thread needs, kept from one product to the next.
struct Scratch {
    alignas(64) Step steps[CHUNK][TILES];
    std::vector<float> sums;  // [column][ROWS]
    std::vector<char> rows;   // the last tile's, if the matrix ends within it
};

// A matrix of rows of weights and what it is multiplied with: columns of `steps` pieces each.
struct Product {
    const char *weights;
    size_t stride;
    int64_t rows, steps, count;
    const Piece *pieces;
    char *out;
    size_t out_stride;

    const char *tile(int64_t number, Scratch &scratch) const {
        const char *first = weights + number * ROWS * stride;
        const int64_t left = rows - number * ROWS;
        if (left >= ROWS) return first;
        scratch.rows.assign(ROWS * stride, 0);
        std::memcpy(scratch.rows.data(), first, left * stride);
        return scratch.rows.data();
    }
};

template <class Type, int COLUMNS>
int64_t multiply_some(const Product &op, Scratch &scratch, int64_t column, int64_t step, int steps) {
    for (; column + COLUMNS <= op.count; column += COLUMNS) {
        const Piece *columns[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) columns[c] = op.pieces + (column + c) * op.steps + step;
        multiply<Type, COLUMNS>(scratch.sums.data() + column * ROWS, scratch.steps[0], columns, steps);
    }
    return column;
}

// One tile of rows times all columns. `next`: the bytes of the tile that comes after, to be fetched meanwhile.
template <class Type>
void multiply_tile(const Product &op, Scratch &scratch, int64_t number, const char *next) {
    constexpr int BLOCKS = CHUNK / Type::STEPS;
    scratch.sums.assign(op.count * ROWS, 0.0f);
    const char *rows = op.tile(number, scratch);
    const int64_t blocks = op.steps / Type::STEPS;
    for (int64_t first = 0; first < blocks; first += BLOCKS) {
        const int here = (int)(blocks - first < BLOCKS ? blocks - first : BLOCKS);
        for (int b = 0; b < here; b++) {
            for (int t = 0; t < TILES; t++)
                Type::unpack(rows + t * LANE_ROWS * op.stride + (first + b) * Type::BYTES, op.stride,
                             &scratch.steps[b * Type::STEPS][t]);
            const char *bytes = next + (first + b) * Type::BYTES * ROWS;
            for (int i = 0; i < Type::BYTES * ROWS; i += 64) __builtin_prefetch(bytes + i, 0, 2);
        }
        int64_t column = 0;
        const int64_t step = first * Type::STEPS;
        column = multiply_some<Type, MOST_COLUMNS>(op, scratch, column, step, here * Type::STEPS);
        column = multiply_some<Type, 3>(op, scratch, column, step, here * Type::STEPS);
        multiply_some<Type, 1>(op, scratch, column, step, here * Type::STEPS);
    }
    const int64_t left = op.rows - number * ROWS, count = left < ROWS ? left : ROWS;
    for (int64_t column = 0; column < op.count; column++)
        std::memcpy(op.out + column * op.out_stride + number * ROWS * sizeof(float), &scratch.sums[column * ROWS],
                    count * sizeof(float));
}

template <class Type>
void compute_type(const Tensor *node, int threads) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    static std::vector<Piece> pieces;  // products are computed one after the other
    const int64_t steps = x->ne[0] / STEP, count = x->ne[1];
    pieces.resize(steps * count);
    const Product op{weights->data, weights->nb[1], weights->ne[1], steps, count, pieces.data(), node->data, node->nb[1]};
    const int64_t tiles = (op.rows + ROWS - 1) / ROWS;
    std::atomic<int64_t> untaken{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t i = 0; i < steps * count; i++)
            round_piece((const float *)(x->data + i / steps * x->nb[1]) + i % steps * STEP, pieces[i]);
        static thread_local Scratch scratch;
        // A tile is taken before the one before it is computed, so that whoever will compute it fetches it.
        for (int64_t next = untaken++, tile; (tile = next) < tiles;) {
            next = untaken++;
            multiply_tile<Type>(op, scratch, tile, op.weights + (next < tiles ? next : tile) * ROWS * op.stride);
        }
    }
}

template <class... Types>
struct List {
    // Whether it is one of these types; calls what is given with it.
    template <class Do>
    static bool find(const Tensor *weights, Do what) {
        return ((weights->type == Types::ID && (what(Types{}), true)) || ...);
    }
};
using Known = List<Q8_0, Q4_0, Q5_0, Q4_K, Q5_K, Q6_K>;

// Whether it is a product that can be computed here.
bool takes(const Tensor *node) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    const auto flat = [](const Tensor *t) { return t->ne[2] == 1 && t->ne[3] == 1; };
    if (node->type != F32 || x->type != F32 || !rows_are_dense(x, 4) || !rows_are_dense(node, 4)) return false;
    if (!flat(weights) || !flat(x) || !flat(node)) return false;
    return Known::find(weights, [](auto) {});
}

void compute(const Tensor *node, int threads) {
    Known::find(node->src[0], [=](auto type) { compute_type<decltype(type)>(node, threads); });
}

}  // namespace
}  // namespace products

#else

namespace products {
namespace {

constexpr bool AVAILABLE = false;
bool takes(const Tensor *) { return false; }
void compute(const Tensor *, int) {}

}  // namespace
}  // namespace products

#endif

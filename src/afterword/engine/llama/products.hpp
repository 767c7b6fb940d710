// Products of quantized weights with activations, the same bits for a column whatever other columns there are.
//
// Activations are rounded to 8 bits, 32 at a time, as llama.cpp does. Integers are summed exactly; what an integer sum weighs
// is added, step by step of 32 elements from the first, to one running float for each row and column. So the order of
// additions depends on neither the number of columns nor of threads nor on the processor, and there is one path for a single
// token and for a thousand. Weights are read as they lie in the file: some rows at a time are unpacked, a row to a lane, and
// multiplied with all columns.
//
// It needs instructions that multiply bytes (AVX2 or Arm's dot products); elsewhere `takes` says no and llama.cpp computes.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lanes.hpp"
#include "ggml.hpp"

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

namespace products {
namespace {

using Bytes = wide_ints;  // of each lane's row 4 bytes
using Floats = wide;      // of each lane's row one

constexpr bool AVAILABLE = true;
constexpr int STEP = 32;  // elements
constexpr int LINE = 64;  // bytes of a cache's line
constexpr int LANE_ROWS = WIDE, TILES = 2, ROWS = TILES * LANE_ROWS;
constexpr int CHUNK = 16;  // steps, at most, that are unpacked before they are multiplied: they stay in the first cache
constexpr int MOST_COLUMNS = WIDE > LANES ? 8 : 4;  // multiplied together: as many as there are registers for their sums

// A step of a row for each lane, unpacked: weights, what a unit of them is worth in each half, what is taken off.
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

// ---- what the processor multiplies

// Products of four bytes, added. Weights are from 0 to 63, or where MIXED any byte without sign; or, with SIGNED, from -128
// to 127. Activations are from -127 to 127.
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

// ---- activations

inline Bytes round_numbers(Floats x) {
    const Floats zero = all<Floats>(12582912.0f);  // from here on floats are whole numbers
    return (Bytes)(x + zero) - (Bytes)zero;
}

inline int32_t total(Bytes x) {
    i8 parts[WIDE / LANES], y = {};
    std::memcpy(parts, &x, sizeof x);
    for (const i8 &part : parts) y += part;
    return ((y[0] + y[4]) + (y[1] + y[5])) + ((y[2] + y[6]) + (y[3] + y[7]));
}

void round_piece(const float *from, Piece &to) {
    using Eight = int8_t __attribute__((vector_size(WIDE)));
    constexpr int VECTORS = STEP / WIDE;
    Floats x[VECTORS], most = {};
    for (int i = 0; i < VECTORS; i++) {
        x[i] = load<Floats>(from + i * WIDE);
        most = larger(larger(x[i], -x[i]), most);
    }
    const float highest = largest(most), units = highest == 0 ? 0 : 127 / highest;
    Bytes sums[2] = {};
    for (int i = 0; i < VECTORS; i++) {
        const Bytes whole = round_numbers(x[i] * units);
        const Eight small = __builtin_convertvector(whole, Eight);
        std::memcpy(to.elements + i * WIDE, &small, sizeof small);
        sums[i * 2 / VECTORS] += whole;
    }
    to.scale = highest / 127;
    for (int half = 0; half < 2; half++) to.halves[half] = total(sums[half]);
    to.sum = to.scale * (float)(to.halves[0] + to.halves[1]);
}

// ---- weights

// 16 bytes of every fourth row.
inline Bytes read_rows(const char *from, size_t stride) {
#if defined(__AVX512F__)
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + 4 * stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + 8 * stride)), 2);
    return (Bytes)_mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + 12 * stride)), 3);
#elif defined(__AVX2__)
    return (Bytes)_mm256_loadu2_m128i((const __m128i *)(from + 4 * stride), (const __m128i *)from);
#else
    Bytes x;
    for (int i = 0; i < LANE_ROWS / 4; i++) std::memcpy((char *)&x + 16 * i, from + 4 * i * stride, 16);
    return x;
#endif
}

#ifdef __AVX512F__
#define WITHIN_FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#else
#define WITHIN_FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#endif

// Four numbers of 32 bits from each row: the first of every row, the second, and so on.
inline void read_columns(const char *from, size_t stride, Bytes (&to)[4]) {
    Bytes r[4], a[4];
    for (int i = 0; i < 4; i++) r[i] = read_rows(from + i * stride, stride);
    for (int i = 0; i < 2; i++) {
        a[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], WITHIN_FOURS(0, WIDE, 1, WIDE + 1));
        a[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], WITHIN_FOURS(2, WIDE + 2, 3, WIDE + 3));
    }
    for (int i = 0; i < 2; i++) {
        to[2 * i] = SHUFFLE(a[i], a[i + 2], WITHIN_FOURS(0, 1, WIDE, WIDE + 1));
        to[2 * i + 1] = SHUFFLE(a[i], a[i + 2], WITHIN_FOURS(2, 3, WIDE + 2, WIDE + 3));
    }
}

inline Floats read_halves(const char *from, size_t stride) {
    alignas(32) half bits[LANE_ROWS];
    for (int i = 0; i < LANE_ROWS; i++) std::memcpy(&bits[i], from + i * stride, 2);
    return widen_all(bits);
}

inline Floats to_floats(Bytes x) { return __builtin_convertvector(x, Floats); }

// Some bits of every byte; the shift must not bring in bits of the next byte that the mask lets through.
inline Bytes bits(Bytes x, int shift, int mask) { return (x >> shift) & mask * 0x01010101; }
inline Bytes nibbles(Bytes x, int which) { return bits(x, 4 * which, 0x0f); }
inline Floats unsigned_byte(Bytes x, int which) { return to_floats((x >> 8 * which) & 0xff); }
inline Floats signed_byte(Bytes x, int which) { return to_floats((x << (24 - 8 * which)) >> 24); }

// Each type: what ggml calls it, bytes and steps of a block, by how much the unpacked weights are too large, whether each
// half of a step has a scale of its own, whether something is taken off (`least`); and how a block of each row is unpacked
// into steps that are `TILES` apart.

struct Q8_0 {
    static constexpr int ID = 8, BYTES = 34, STEPS = 1, EXCESS = MIXED ? 128 : 0;
    static constexpr bool SIGNED = !MIXED, HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        for (int part = 0; part < 2; part++) {
            Bytes columns[4];
            read_columns(from + 2 + 16 * part, stride, columns);
            for (int i = 0; i < 4; i++) to->weights[4 * part + i] = MIXED ? columns[i] ^ (int32_t)0x80808080 : columns[i];
        }
        to->scales[0] = read_halves(from, stride);
    }
};

struct Q4_0 {
    static constexpr int ID = 2, BYTES = 18, STEPS = 1, EXCESS = 8;
    static constexpr bool SIGNED = false, HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        Bytes columns[4];
        read_columns(from + 2, stride, columns);
        for (int i = 0; i < 8; i++) to->weights[i] = nibbles(columns[i % 4], i / 4);
        to->scales[0] = read_halves(from, stride);
    }
};

struct Q5_0 {
    static constexpr int ID = 6, BYTES = 22, STEPS = 1, EXCESS = 16;
    static constexpr bool SIGNED = false, HALVES = false, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        Bytes fifth, columns[4];
        for (int i = 0; i < LANE_ROWS; i++) std::memcpy((char *)&fifth + 4 * i, from + i * stride + 2, 4);
        read_columns(from + 6, stride, columns);
        for (int i = 0; i < 8; i++) {
            // Four bits to four bytes: copies of them, each moved seven bits further than the one before.
            const Bytes spread = bits(((fifth >> 4 * i) & 15) * 0x00204081, 0, 1);
            to->weights[i] = nibbles(columns[i % 4], i / 4) | spread << 4;
        }
        to->scales[0] = read_halves(from, stride);
    }
};

// Scales and least values of Q4_K and Q5_K: 6 bits each, eight of either, packed into 12 bytes behind two halves.
inline void unpack_header(const char *from, size_t stride, Step *to) {
    Bytes header[4];
    read_columns(from, stride, header);
    const Floats scale = read_halves(from, stride), least = read_halves(from + 2, stride);
    const Bytes scales[2] = {bits(header[1], 0, 0x3f), bits(header[3], 0, 0x0f) | bits(header[1], 2, 0x30)};
    const Bytes leasts[2] = {bits(header[2], 0, 0x3f), bits(header[3], 4, 0x0f) | bits(header[2], 2, 0x30)};
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) {
        to[step * TILES].scales[0] = scale * unsigned_byte(scales[step / 4], step % 4);
        to[step * TILES].least = least * unsigned_byte(leasts[step / 4], step % 4);
    }
}

struct Q4_K {
    static constexpr int ID = 12, BYTES = 144, STEPS = 8, EXCESS = 0;
    static constexpr bool SIGNED = false, HALVES = false, LEAST = true;

    static void unpack(const char *from, size_t stride, Step *to) {
        unpack_header(from, stride, to);
        for (int part = 0; part < 8; part++) {  // 16 bytes: half of two steps
            Bytes columns[4];
            read_columns(from + 16 + 16 * part, stride, columns);
            Step *pair = to + part / 2 * 2 * TILES;
            for (int i = 0; i < 4; i++) {
                pair[0].weights[part % 2 * 4 + i] = nibbles(columns[i], 0);
                pair[TILES].weights[part % 2 * 4 + i] = nibbles(columns[i], 1);
            }
        }
    }
};

struct Q5_K {
    static constexpr int ID = 13, BYTES = 176, STEPS = 8, EXCESS = 0;
    static constexpr bool SIGNED = false, HALVES = false, LEAST = true;

    static void unpack(const char *from, size_t stride, Step *to) {
        unpack_header(from, stride, to);
        Bytes fifth[2][4];
        for (int half = 0; half < 2; half++) read_columns(from + 16 + 16 * half, stride, fifth[half]);
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            Bytes columns[4];
            read_columns(from + 48 + 16 * part, stride, columns);
            const int step = part / 2 * 2;
            for (int i = 0; i < 4; i++) {
                const Bytes high = fifth[part % 2][i];
                for (int j = 0; j < 2; j++)
                    to[(step + j) * TILES].weights[part % 2 * 4 + i] = nibbles(columns[i], j) | bits(high, step + j, 1) << 4;
            }
        }
    }
};

struct Q6_K {
    static constexpr int ID = 14, BYTES = 210, STEPS = 8, EXCESS = 32;
    static constexpr bool SIGNED = false, HALVES = true, LEAST = false;

    static void unpack(const char *from, size_t stride, Step *to) {
        for (int quarter = 0; quarter < 4; quarter++) {  // 16 bytes of high bits: half of four steps
            Bytes high[4], low[2][4];
            const int four = quarter / 2, part = quarter % 2;
            read_columns(from + 128 + 16 * quarter, stride, high);
            for (int j = 0; j < 2; j++) read_columns(from + 64 * four + 32 * j + 16 * part, stride, low[j]);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const Bytes top = bits(high[i], 2 * s, 3) << 4;
                    to[(4 * four + s) * TILES].weights[4 * part + i] = nibbles(low[s % 2][i], s / 2) | top;
                }
            }
        }
        Bytes scales[4];
        read_columns(from + 192, stride, scales);
        const Floats scale = read_halves(from + 208, stride);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            to[i / 2 * TILES].scales[i % 2] = scale * signed_byte(scales[i / 4], i % 4);
    }
};

// ---- rows by columns

// Memory that is needed soon: so many lines of it are asked for at every step, while there is other work.
struct Soon {
    const char *at;
    int lines;

    void fetch() {
        for (int i = 0; i < lines; i++, at += LINE) __builtin_prefetch(at, 0, 2);
    }
};

// Adds some steps of a tile of rows times some columns to their sums.
template <class Type, int COLUMNS>
void multiply(float *sums, const Step *weights, const Piece *const *columns, int steps, Soon &soon) {
    Floats total[COLUMNS][TILES];
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) total[c][t] = load<Floats>(sums + c * ROWS + t * LANE_ROWS);
    for (int s = 0; s < steps; s++, weights += TILES) {
        soon.fetch();
        Bytes exact[COLUMNS][TILES];
        const auto start = [&](int half) {
            for (int c = 0; c < COLUMNS; c++) {
                const int32_t *halves = columns[c][s].halves;
                const int32_t sum = Type::HALVES ? halves[half] : halves[0] + halves[1];
                for (int t = 0; t < TILES; t++) exact[c][t] = Bytes{} - Type::EXCESS * sum;
            }
        };
        const auto finish = [&](int half) {
            for (int t = 0; t < TILES; t++)
                for (int c = 0; c < COLUMNS; c++) {
                    const Floats part = to_floats(exact[c][t]) * weights[t].scales[half];
                    total[c][t] = fused(part, all<Floats>(columns[c][s].scale), total[c][t]);
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
                    exact[c][t] = dot<Type::SIGNED>(exact[c][t], weights[t].weights[i], Bytes{} + four);
            }
        }
        finish(Type::HALVES);
        if (Type::LEAST)
            for (int t = 0; t < TILES; t++)
                for (int c = 0; c < COLUMNS; c++)
                    total[c][t] = fused(-weights[t].least, all<Floats>(columns[c][s].sum), total[c][t]);
    }
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) store(sums + c * ROWS + t * LANE_ROWS, total[c][t]);
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
int64_t multiply_some(const Product &op, Scratch &scratch, int64_t column, int64_t step, int steps, Soon &soon) {
    for (; column + COLUMNS <= op.count; column += COLUMNS) {
        const Piece *columns[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) columns[c] = op.pieces + (column + c) * op.steps + step;
        multiply<Type, COLUMNS>(scratch.sums.data() + column * ROWS, scratch.steps[0], columns, steps, soon);
    }
    return column;
}

// One tile of rows times all columns. `next`: the tile that comes after, which is fetched meanwhile.
template <class Type>
void multiply_tile(const Product &op, Scratch &scratch, int64_t number, const char *next) {
    // For few columns memory is what takes time: pieces are shorter, so that it is asked more evenly.
    const int most = (op.count > MOST_COLUMNS ? CHUNK : CHUNK / 2) / Type::STEPS;
    scratch.sums.assign(op.count * ROWS, 0.0f);
    const char *rows = op.tile(number, scratch);
    const int64_t blocks = op.steps / Type::STEPS, groups = (op.count + MOST_COLUMNS - 1) / MOST_COLUMNS;
    const int64_t lines = (Type::BYTES * ROWS / Type::STEPS + LINE - 1) / LINE;  // of a step
    Soon soon{next, (int)((lines + groups) / (groups + 1))};
    for (int64_t first = 0; first < blocks; first += most) {
        const int here = (int)(blocks - first < most ? blocks - first : most);
        for (int b = 0; b < here; b++) {
            for (int step = 0; step < Type::STEPS; step++) soon.fetch();
            for (int t = 0; t < TILES; t++)
                Type::unpack(rows + t * LANE_ROWS * op.stride + (first + b) * Type::BYTES, op.stride,
                             &scratch.steps[b * Type::STEPS][t]);
        }
        const int64_t step = first * Type::STEPS;
        const int steps = here * Type::STEPS;
        int64_t column = multiply_some<Type, MOST_COLUMNS>(op, scratch, 0, step, steps, soon);
        column = multiply_some<Type, 4>(op, scratch, column, step, steps, soon);
        column = multiply_some<Type, 2>(op, scratch, column, step, steps, soon);
        multiply_some<Type, 1>(op, scratch, column, step, steps, soon);
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

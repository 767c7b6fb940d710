// Reads all logits of a row for a sampler chain. core/row_scan.py declares the interface.
//
// A chain is computed in numpy, on the few tokens that these functions find. Sums serve for decisions that their rounding
// cannot change (core/whole_row.py), so their bits may differ between machines.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "logit_blocks.hpp"
#include "simd.hpp"

namespace {

// A row of logits, without those that samplers have changed. core/row_scan.py declares the same.
struct ScannedRow {
    float *row;
    int64_t length;
    List<int64_t> changed;  // ids
    float *largest;         // of each block
};

// The changed logits are minus infinity until the destructor restores them.
class WithoutChanged {
    const ScannedRow &scanned;
    std::vector<float> before;

    template <class Visit>
    void each(Visit visit) {
        for (int64_t i = 0; i < scanned.changed.count; i++) {
            const int64_t id = scanned.changed.first[i];
            if (id >= 0 && id < scanned.length) visit(i, scanned.row[id]);
        }
    }

   public:
    explicit WithoutChanged(const ScannedRow &scanned) : scanned(scanned), before(scanned.changed.count) {
        each([this](int64_t i, float &logit) { before[i] = std::exchange(logit, MINUS_INFINITY); });
    }

    WithoutChanged(const WithoutChanged &) = delete;

    ~WithoutChanged() {
        each([this](int64_t i, float &logit) { logit = before[i]; });
    }
};

constexpr int DOUBLES = WIDE / 2;
using doubles = double __attribute__((vector_size(DOUBLES * sizeof(double))));
using long_ints = int64_t __attribute__((vector_size(DOUBLES * sizeof(double))));
using narrow_floats = float __attribute__((vector_size(DOUBLES * sizeof(float))));

inline doubles load_doubles(const float *from) { return __builtin_convertvector(load<narrow_floats>(from), doubles); }

inline double sum(doubles x) {
    double total = 0;
    for (int i = 0; i < DOUBLES; i++) total += x[i];
    return total;
}

// e to the power of x for x from -700 to 0, with a relative error below 10^-11.
inline doubles exponential(doubles x) {
    const doubles zero = doubles{} + 0x1.8p52;
    const doubles shifted = x * 1.4426950408889634 + zero;  // the nearest integer to x / log(2), in the last bits
    const doubles n = shifted - zero;
    const doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 1.9082149292705877e-10;
    doubles p = r * (1 / 362880.0) + 1 / 40320.0;  // the Taylor series
    p = p * r + 1 / 5040.0;
    p = p * r + 1 / 720.0;
    p = p * r + 1 / 120.0;
    p = p * r + 1 / 24.0;
    p = p * r + 1 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return (doubles)((long_ints)p + ((long_ints)shifted << 52));
}

// One bit for each lane of at least `limit`, the lowest bit for the first.
inline uint32_t lanes_above(wide x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GE_OQ);
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < WIDE; i++) bits |= (uint32_t)(x[i] >= limit) << i;
    return bits;
#endif
}

// The logits of a block; after the end of the row minus infinity, in `padded`.
const float *whole_block(const ScannedRow &scanned, int64_t block, float *padded) {
    const float *first = scanned.row + block * BLOCK;
    const int64_t count = std::min(BLOCK, scanned.length - block * BLOCK);
    if (count == BLOCK) return first;
    std::fill(std::copy(first, first + count, padded), padded + BLOCK, MINUS_INFINITY);
    return padded;
}

// The largest logit of a block. Four chains of comparisons, because one would wait for the results of its instructions.
float largest_of_block(const ScannedRow &scanned, int64_t block) {
    const float *logits = scanned.row + block * BLOCK;
    const int64_t count = std::min(BLOCK, scanned.length - block * BLOCK);
    if (count < BLOCK) return largest_of(logits, count);
    wide most[4];
    for (int i = 0; i < 4; i++) most[i] = load<wide>(logits + i * WIDE);
    for (int64_t at = 4 * WIDE; at < BLOCK; at += 4 * WIDE)
        for (int i = 0; i < 4; i++) most[i] = larger(load<wide>(logits + at + i * WIDE), most[i]);
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// Logarithms: of a weight of which as many as tokens are nothing beside the largest; of the least weight.
constexpr double NO_WEIGHT = -42, LEAST = -700;

}  // namespace

extern "C" {

int64_t scanned_row_size() { return sizeof(ScannedRow); }

// Writes the largest logit of each block; with `again` only of those with changed logits.
void scan_largest(const ScannedRow *scanned, int32_t again) {
    const WithoutChanged without(*scanned);
    if (!again) {
        for (int64_t block = 0; block < blocks_of(scanned->length); block++)
            scanned->largest[block] = largest_of_block(*scanned, block);
        return;
    }
    int64_t last = -1;
    for (const int64_t id : scanned->changed) {
        const int64_t block = id / BLOCK;
        if (id < 0 || id >= scanned->length || block == last) continue;
        scanned->largest[last = block] = largest_of_block(*scanned, block);
    }
}

// Writes the ids of the logits of at least `limit` but not of minus infinity, in ascending order. Returns their number. `ids`
// has room for all tokens of each block whose largest logit is at least `limit`.
int64_t scan_above(const ScannedRow *scanned, float limit, int64_t *ids) {
    const WithoutChanged without(*scanned);
    limit = std::max(limit, LOWEST);
    int64_t count = 0;
    for (int64_t start = 0; start < scanned->length; start += BLOCK)
        if (scanned->largest[start / BLOCK] >= limit)
            for (int64_t at = start; at < std::min(start + BLOCK, scanned->length); at += WIDE) {
                const wide logits = load_partial(scanned->row, at, scanned->length, MINUS_INFINITY);
                for (uint32_t bits = lanes_above(logits, limit); bits; bits &= bits - 1)
                    ids[count++] = at + __builtin_ctz(bits);
            }
    return count;
}

// Writes for each block the sum of the weights exp((x - most) * factor). Returns the sum of (x - most) * factor times the
// weight. No logit may be larger than `most`.
double scan_weights(const ScannedRow *scanned, double most, double factor, double *weights) {
    const WithoutChanged without(*scanned);
    float padded[BLOCK];
    doubles products = {};
    for (int64_t block = 0; block < blocks_of(scanned->length); block++) {
        weights[block] = 0;
        if (!((scanned->largest[block] - most) * factor > NO_WEIGHT)) continue;
        const float *logits = whole_block(*scanned, block, padded);
        doubles total = {};
        for (int64_t at = 0; at < BLOCK; at += DOUBLES) {
            doubles x = (load_doubles(logits + at) - most) * factor;
            x = x > LEAST ? x : doubles{} + LEAST;
            const doubles weight = exponential(x);
            total += weight;
            products += x * weight;
        }
        weights[block] = sum(total);
    }
    return sum(products);
}

// Writes the number of logits above minus infinity, the sum of x - around, and the sum of its squares.
void scan_moments(const ScannedRow *scanned, double around, double *moments) {
    const WithoutChanged without(*scanned);
    float padded[BLOCK];
    doubles count = {}, total = {}, squares = {};
    for (int64_t block = 0; block < blocks_of(scanned->length); block++) {
        const float *logits = whole_block(*scanned, block, padded);
        for (int64_t at = 0; at < BLOCK; at += DOUBLES) {
            const doubles logit = load_doubles(logits + at);
            const long_ints finite = logit >= (double)LOWEST;
            const doubles x = finite ? logit - around : doubles{};
            count += finite ? doubles{} + 1 : doubles{};
            total += x;
            squares += x * x;
        }
    }
    moments[0] = sum(count), moments[1] = sum(total), moments[2] = sum(squares);
}
}

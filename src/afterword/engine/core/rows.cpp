// What the sampler does with a whole row of logits, each in one walk over memory. rows.py says what and why.
//
// Sums of a block are of eight running sums, one a lane, so they depend on the block alone: not on how many lanes the
// machine takes at once, nor on which thread took the block. A row's length is any. Where there is nowhere to write to
// (null), only the sums are wanted.

#include <algorithm>

#include "../lanes.hpp"

namespace {

constexpr int64_t BLOCK = 256;             // as in rows.py
constexpr int64_t WORTH_A_THREAD = 16384;  // numbers: fewer take less time than waking it

int most_threads = 1;

// As many from `at` on as the machine takes; what is beyond the end reads as `rest`.
wide some(const float *row, int64_t at, int64_t end, float rest) {
    if (at + WIDE <= end) return load<wide>(row + at);
    wide x = all<wide>(rest);
    for (int64_t i = at; i < end; i++) x[i - at] = row[i];
    return x;
}

void put(float *row, int64_t at, int64_t end, wide x) {
    if (!row) return;
    if (at + WIDE <= end) return store(row + at, x);
    for (int64_t i = at; i < end; i++) row[i] = x[i - at];
}

// Calls `walk(block, start, end)` for each block of a row.
template <class Walk>
void each_block(int64_t length, Walk walk) {
    const int64_t blocks = (length + BLOCK - 1) / BLOCK, worth = 1 + length / WORTH_A_THREAD;
    const int threads = (int)(worth < most_threads ? worth : most_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * BLOCK;
        walk(block, start, start + BLOCK < length ? start + BLOCK : length);
    }
}

}  // namespace

extern "C" {

void rows_threads(int threads) { most_threads = threads; }

void rows_maxima(const float *row, int64_t length, float *maxima) {
    each_block(length, [=](int64_t block, int64_t start, int64_t end) {
        wide most = all<wide>(-__builtin_inff());
        for (int64_t at = start; at < end; at += WIDE) most = larger(some(row, at, end, -__builtin_inff()), most);
        maxima[block] = largest(most);
    });
}

// Of the row with `count` other numbers in it: those at `ids`, which rise.
void rows_exponentials(const float *row, int64_t length, float shift, float divisor, const int64_t *ids,
                       const float *values, int64_t count, float *weights, float *sums) {
    const float factor = 1 / divisor;
    each_block(length, [=](int64_t block, int64_t start, int64_t end) {
        const int64_t *first = std::lower_bound(ids, ids + count, start), *last = std::lower_bound(first, ids + count, end);
        float edited[BLOCK];
        const float *from = row + start;
        if (first != last) {
            from = std::copy(from, row + end, edited) - (end - start);
            for (const int64_t *id = first; id != last; id++) edited[*id - start] = values[id - ids];
        }
        f8 total = {};
        for (int64_t at = 0; at < end - start; at += WIDE) {
            const wide x = exponential((some(from, at, end - start, -__builtin_inff()) - shift) * factor);
            put(weights ? weights + start : nullptr, at, end - start, x);
            add(total, x);
        }
        sums[block] = sum(total);
    });
}

void rows_keep(const float *weights, int64_t length, int64_t place, float least, float *kept, float *sums) {
    each_block(length, [=](int64_t block, int64_t start, int64_t end) {
        f8 total = {};
        for (int64_t at = start; at < end; at += WIDE) {
            const wide x = some(weights, at, end, 0);
            wide y;
            if (at + WIDE <= place) y = x >= least ? x : wide{};
            else if (at >= place) y = x > least ? x : wide{};
            else for (int i = 0; i < WIDE; i++) y[i] = x[i] > least || (x[i] == least && at + i < place) ? x[i] : 0;
            put(kept, at, end, y);
            add(total, y);
        }
        sums[block] = sum(total);
    });
}

int64_t rows_above(const float *row, int64_t length, float value) {
    int64_t count = 0;
    for (int64_t at = 0; at < length; at++) count += row[at] > value;
    return count;
}
}

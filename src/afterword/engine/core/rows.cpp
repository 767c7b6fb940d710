// What the sampler does with a whole row of logits, each in one walk over memory. rows.py says what and why.
//
// Sums of a block are of eight running sums, one a lane, so they depend on the block alone. A row's length is any.
// Where there is nowhere to write to (null), only the sums are wanted.

#include "../lanes.hpp"

namespace {

constexpr int64_t BLOCK = 256;  // as in rows.py

int64_t end_of(int64_t start, int64_t length) { return start + BLOCK < length ? start + BLOCK : length; }

// The eight from `at` on; what is beyond the end reads as `rest`.
f8 some(const float *row, int64_t at, int64_t end, float rest) {
    if (at + LANES <= end) return load(row + at);
    f8 x = all(rest);
    for (int64_t i = at; i < end; i++) x[i - at] = row[i];
    return x;
}

void put(float *row, int64_t at, int64_t end, f8 x) {
    if (!row) return;
    if (at + LANES <= end) return store(row + at, x);
    for (int64_t i = at; i < end; i++) row[i] = x[i - at];
}

}  // namespace

extern "C" {

void rows_maxima(const float *row, int64_t length, float *maxima) {
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t end = end_of(start, length);
        f8 most = all(-__builtin_inff());
        for (int64_t at = start; at < end; at += LANES) most = larger(some(row, at, end, -__builtin_inff()), most);
        *maxima++ = largest(most);
    }
}

void rows_exponentials(const float *row, int64_t length, float shift, float divisor, float *weights, float *sums) {
    const f8 factor = all(1 / divisor);
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t end = end_of(start, length);
        f8 total = all(0);
        for (int64_t at = start; at < end; at += LANES) {
            const f8 x = exponential((some(row, at, end, -__builtin_inff()) - all(shift)) * factor);
            put(weights, at, end, x);
            total += x;
        }
        *sums++ = sum(total);
    }
}

void rows_keep(const float *weights, int64_t length, int64_t place, float least, float *kept, float *sums) {
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t end = end_of(start, length);
        f8 total = all(0);
        for (int64_t at = start; at < end; at += LANES) {
            const f8 x = some(weights, at, end, 0);
            f8 y;
            if (at + LANES <= place) y = x >= all(least) ? x : all(0);
            else if (at >= place) y = x > all(least) ? x : all(0);
            else for (int i = 0; i < LANES; i++) y[i] = x[i] > least || (x[i] == least && at + i < place) ? x[i] : 0;
            put(kept, at, end, y);
            total += y;
        }
        *sums++ = sum(total);
    }
}

int64_t rows_above(const float *row, int64_t length, float value) {
    int64_t count = 0;
    for (int64_t at = 0; at < length; at++) count += row[at] > value;
    return count;
}
}

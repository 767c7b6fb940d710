// What the sampler does with whole rows of logits, in as few walks over memory as there can be. rows.py says what and why.
//
// Sums of a block are of eight running sums, one a lane, so they depend on the block alone: not on how many lanes the
// machine takes at once, nor on which thread took the block. A row's length is any.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../lanes.hpp"

namespace {

constexpr int64_t BLOCK = 256;             // as in rows.py
constexpr int64_t WORTH_A_THREAD = 16384;  // numbers: fewer take less time than waking it
constexpr float NOTHING = -__builtin_inff();
constexpr double BELOW_ONE = 1 - 0x1p-53;

int most_threads = 1;

int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// As many from `at` on as the machine takes; what is beyond the end reads as `rest`.
wide some(const float *row, int64_t at, int64_t end, float rest) {
    if (at + WIDE <= end) return load<wide>(row + at);
    wide x = all<wide>(rest);
    for (int64_t i = at; i < end; i++) x[i - at] = row[i];
    return x;
}

void put(float *row, int64_t at, int64_t end, wide x) {
    if (at + WIDE <= end) return store(row + at, x);
    for (int64_t i = at; i < end; i++) row[i] = x[i - at];
}

// Calls `walk(row, block, start, end)` for each block of some rows.
template <class Walk>
void each_block(int64_t rows, int64_t length, Walk walk) {
    const int64_t blocks = blocks_of(length), worth = 1 + rows * length / WORTH_A_THREAD;
    const int threads = (int)(worth < most_threads ? worth : most_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows * blocks; i++) {
        const int64_t block = i % blocks, start = block * BLOCK;
        walk(i / blocks, block, start, std::min(start + BLOCK, length));
    }
}

float largest_of(const float *numbers, int64_t count) {
    wide most = all<wide>(NOTHING);
    for (int64_t at = 0; at < count; at += WIDE) most = larger(some(numbers, at, count, NOTHING), most);
    return largest(most);
}

// Sum of exponentials of numbers that are lowered by `shift` and multiplied; `write` takes them.
template <class Write>
float exponentials(const float *numbers, int64_t count, float shift, float factor, Write write) {
    f8 total = {};
    for (int64_t at = 0; at < count; at += WIDE) {
        const wide x = exponential((some(numbers, at, count, NOTHING) - shift) * factor);
        write(at, x);
        add(total, x);
    }
    return sum(total);
}

// Natural log of the sum of a row's exponentials, from what is known of its blocks.
double log_total(const float *maxima, const float *sums, int64_t blocks) {
    const float highest = *std::max_element(maxima, maxima + blocks);
    double total = 0;
    for (int64_t i = 0; i < blocks; i++)
        if (maxima[i] > NOTHING) total += sums[i] * std::exp((double)maxima[i] - highest);
    return total > 0 ? highest + std::log(total) : NAN;
}

void find_likeliest(const float *row, int64_t length, const float *maxima, int64_t count, int64_t *ids) {
    // A heap of the best so far, with the worst of them on top. Ids rise, so an equal that comes later is no better.
    const auto better = [=](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
    int64_t size = 0;
    for (int64_t start = 0; start < length; start += BLOCK) {
        if (size == count && !(maxima[start / BLOCK] > row[ids[0]])) continue;
        for (int64_t at = start; at < std::min(start + BLOCK, length); at++) {
            if (size == count && !(row[at] > row[ids[0]])) continue;
            if (size == count) std::pop_heap(ids, ids + size--, better);
            ids[size++] = at;
            std::push_heap(ids, ids + size, better);
        }
    }
    std::sort_heap(ids, ids + size, better);
}

// A row with other numbers at some ids, which rise.
struct Edited {
    const float *row;
    int64_t length;
    const int64_t *ids;
    const float *values;
    int64_t count;

    // A block: as it lies there, or a copy with its edits.
    const float *block(int64_t start, int64_t end, float *copy) const {
        const int64_t *first = std::lower_bound(ids, ids + count, start), *last = std::lower_bound(first, ids + count, end);
        if (first == last) return row + start;
        std::copy(row + start, row + end, copy);
        for (const int64_t *id = first; id != last; id++) copy[*id - start] = values[id - ids];
        return copy;
    }

    // The largest of each block, from those without edits.
    std::vector<float> maxima(const float *as_it_was) const {
        std::vector<float> most(as_it_was, as_it_was + blocks_of(length));
        float copy[BLOCK];
        for (int64_t i = 0, block = -1; i < count; i++) {
            if (ids[i] / BLOCK == block) continue;
            block = ids[i] / BLOCK;
            const int64_t start = block * BLOCK, end = std::min(start + BLOCK, length);
            most[block] = largest_of(this->block(start, end, copy), end - start);
        }
        return most;
    }

    // The first that is as large as `highest`.
    int64_t likeliest(const std::vector<float> &maxima, float highest) const {
        const int64_t start = BLOCK * (std::find(maxima.begin(), maxima.end(), highest) - maxima.begin());
        if (start >= length) return 0;  // not a row of numbers
        float copy[BLOCK];
        const int64_t end = std::min(start + BLOCK, length);
        const float *inside = block(start, end, copy);
        return start + (std::find(inside, inside + (end - start), highest) - inside);
    }
};

// The n-th number in [0, 1) that comes of a seed, as in rows.py.
double number(uint64_t seed, uint64_t n) {
    if (n) {
        seed += n * 0x9e3779b97f4a7c15;
        seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9;
        seed = (seed ^ seed >> 27) * 0x94d049bb133111eb;
        seed ^= seed >> 31;
    }
    return (double)(seed >> 11) * 0x1p-53;
}

// A place drawn in proportion to its weight. What is left of the draw, in [0, 1), is as good as a new one.
template <class Weight>
int64_t pick(int64_t count, Weight weight, double &draw) {
    double total = 0, before = 0, here = 0;
    for (int64_t i = 0; i < count; i++) total += weight(i);
    const double target = draw * total;
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        const double next = weight(i);
        if (!(next > 0)) continue;
        before += here, here = next, found = i;
        if (before + here > target) break;
    }
    draw = std::min((target - before) / here, BELOW_ONE);
    return found;
}

// Weights, of which those larger than `least` stay, or as large and before `place`, with the sum of each block of these.
struct Weights {
    std::vector<float> &all;
    int64_t place;
    float least = 0;
    std::vector<double> sums;

    double total() const {
        double sum = 0;
        for (const double block : sums) sum += block;
        return sum;
    }

    bool stays(float weight, int64_t at) const { return weight > least || (weight == least && at < place); }

    void keep(int64_t before, float lowest) {
        place = before, least = lowest;
        each_block(1, all.size(), [this](int64_t, int64_t block, int64_t start, int64_t end) {
            f8 total = {};
            for (int64_t at = start; at < end; at += WIDE) {
                const wide x = some(all.data(), at, end, 0);
                wide y;
                if (at + WIDE <= place) y = x >= least ? x : wide{};
                else if (at >= place) y = x > least ? x : wide{};
                else for (int i = 0; i < WIDE; i++) y[i] = stays(x[i], at + i) ? x[i] : 0;
                add(total, y);
            }
            sums[block] = sum(total);
        });
    }

    int64_t pick(double draw) const {
        const int64_t start = BLOCK * ::pick(sums.size(), [this](int64_t i) { return sums[i]; }, draw);
        const auto weight = [this, start](int64_t i) { return stays(all[start + i], start + i) ? (double)all[start + i] : 0; };
        return start + ::pick(std::min(BLOCK, (int64_t)all.size() - start), weight, draw);
    }
};

// A token of the nucleus: see plain.py.
int64_t from_nucleus(Weights weights, double wanted, uint64_t seed) {
    for (uint64_t n = 0;; n++) {
        const int64_t place = weights.pick(number(seed, n));
        weights.keep(place, weights.all[place]);
        if (weights.total() < wanted) return place;
    }
}

// The `count` likeliest that stay and, of these, as many as weigh `top_p` of them.
std::vector<int64_t> find_few(const Weights &weights, int64_t count, double top_p, std::vector<double> &cumulated) {
    const int64_t length = weights.all.size();
    std::vector<float> maxima(blocks_of(length));
    each_block(1, length, [&](int64_t, int64_t block, int64_t start, int64_t end) {
        maxima[block] = largest_of(&weights.all[start], end - start);
    });
    std::vector<int64_t> ids(std::min(count, length));
    find_likeliest(weights.all.data(), length, maxima.data(), ids.size(), ids.data());
    double total = 0;
    for (const int64_t id : ids) cumulated.push_back(total += weights.stays(weights.all[id], id) ? weights.all[id] : 0);
    const auto end = std::lower_bound(cumulated.begin(), cumulated.end(), top_p * total);
    cumulated.resize(std::min<size_t>(end - cumulated.begin() + 1, cumulated.size()));
    return ids;
}

}  // namespace

extern "C" {

void rows_threads(int threads) { most_threads = threads; }

// Of `count` rows. `totals` are numbers for those that are wanted, and so stay those that are none.
void rows_survey(const float *rows, int64_t count, int64_t length, float *maxima, double *totals) {
    const int64_t blocks = blocks_of(length);
    std::vector<float> sums(count * blocks);
    each_block(count, length, [=, &sums](int64_t row, int64_t block, int64_t start, int64_t end) {
        const float *numbers = rows + row * length + start;
        const float most = maxima[row * blocks + block] = largest_of(numbers, end - start);
        if (totals[row] == totals[row])
            sums[row * blocks + block] = exponentials(numbers, end - start, most, 1, [](int64_t, wide) {});
    });
    for (int64_t row = 0; row < count; row++)
        if (totals[row] == totals[row]) totals[row] = log_total(maxima + row * blocks, &sums[row * blocks], blocks);
}

// How many are larger than `value`; `maxima` are of the row's blocks.
int64_t rows_above(const float *row, int64_t length, const float *maxima, float value) {
    int64_t count = 0;
    for (int64_t start = 0; start < length; start += BLOCK)
        if (maxima[start / BLOCK] > value)
            for (int64_t at = start; at < std::min(start + BLOCK, length); at++) count += row[at] > value;
    return count;
}

// Writes the ids of the `count` largest, largest first and among equals the lower id; `maxima` are of the row's blocks.
void rows_likeliest(const float *row, int64_t length, const float *maxima, int64_t count, int64_t *ids) {
    find_likeliest(row, length, maxima, count, ids);
}

// Draws an id for each seed. `maxima` are of the row's blocks without its edits.
void rows_draw(const float *row, int64_t length, const float *maxima, const int64_t *ids, const float *values, int64_t count,
               double temperature, double top_p, int64_t top_k, double min_p, const uint64_t *seeds, int64_t draws,
               int64_t *chosen) {
    static thread_local std::vector<float> kept;  // since fresh pages cost more than the arithmetic that is done in them
    std::vector<float> &scratch = kept;           // this thread's, also for those that help it
    const Edited edited{row, length, ids, values, count};
    const std::vector<float> most = edited.maxima(maxima);
    const float highest = *std::max_element(most.begin(), most.end()), factor = 1 / (float)temperature;
    if (!(temperature > 0)) return (void)std::fill(chosen, chosen + draws, edited.likeliest(most, highest));
    scratch.resize(length);
    Weights weights{scratch, length, 0, std::vector<double>(most.size())};
    each_block(1, length, [&](int64_t, int64_t block, int64_t start, int64_t end) {
        float copy[BLOCK];
        weights.sums[block] = exponentials(edited.block(start, end, copy), end - start, highest, factor,
                                           [&](int64_t at, wide x) { put(&scratch[start], at, end - start, x); });
    });
    if (min_p > 0) weights.keep(length, (float)min_p);
    const double wanted = top_p * weights.total();
    // The likeliest weighs 1 and may be all of the nucleus; or the row is not of numbers.
    if (!(wanted > 1)) return (void)std::fill(chosen, chosen + draws, edited.likeliest(most, highest));
    std::vector<double> cumulated;
    const std::vector<int64_t> few = top_k ? find_few(weights, top_k, top_p, cumulated) : std::vector<int64_t>();
    for (int64_t i = 0; i < draws; i++) {
        if (top_k) {
            const double target = number(seeds[i], 0) * cumulated.back();
            chosen[i] = few[std::upper_bound(cumulated.begin(), cumulated.end() - 1, target) - cumulated.begin()];
        } else {
            chosen[i] = top_p < 1 ? from_nucleus(weights, wanted, seeds[i]) : weights.pick(number(seeds[i], 0));
        }
    }
}
}

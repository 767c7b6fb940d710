// Reads rows of logits: log probabilities, ranks, the most likely tokens, and tokens sampled after penalties and filters.
// core/sampler_kernel.py declares the interface; core/numpy_kernel.py computes the same with numpy.
//
// The sum of a block is kept in eight lanes on every machine. So it depends on the block alone, and not on the width of the
// machine's registers or on the thread that computed it. A row may have any length.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "simd.hpp"
#include "logit_blocks.hpp"
#include "parallel.hpp"
#include "row_scan.hpp"

namespace {

constexpr int64_t PART = 64;    // blocks that a thread takes at a time; waking a thread takes longer than reading fewer
constexpr double BELOW_ONE = 1 - 0x1p-53;

// The weight of a logit x: exp((x - most) * factor). `factor` is 1 / temperature.
struct Scale {
    float most, factor;

    // A finite `most`, because the difference of two infinities is NaN.
    Scale(float most, float factor) : most(std::max(most, LOWEST)), factor(factor) {}

    wide operator()(wide x) const { return exponential((x - most) * factor); }
};

// The sum of the weights of `count` logits. `take(at, logits, weights)` returns the weights that are added.
template <class Take>
float sum_weights(const float *numbers, int64_t count, Scale scale, Take take) {
    f8 total = {};
    for (int64_t at = 0; at < count; at += WIDE) {
        const wide x = load_partial(numbers, at, count, MINUS_INFINITY);
        add(total, take(at, x, scale(x)));
    }
    return sum(total);
}

// Of each block of a row: its largest logit and, unless the temperature is 0, the sum of its weights relative to that logit.
struct Blocks {
    float factor;
    std::vector<float> largest, weights;

    Blocks(int64_t length, double temperature)
        : factor(temperature > 0 ? 1 / (float)temperature : 0), largest(blocks_of(length)), weights(largest.size()) {}

    // All largest logits come first, so that no weight has to wait for one. The weights take long and use no memory, so the next
    // blocks are prefetched meanwhile.
    void read(const float *row, int64_t length, int64_t first, int64_t end) {
        const auto size = [=](int64_t block) { return std::min(BLOCK, length - block * BLOCK); };
        for (int64_t i = first; i < end; i++) largest[i] = largest_of(row + i * BLOCK, size(i));
        if (!(factor > 0)) return;
        for (int64_t i = first; i < end; i++) {
            for (int64_t at = 0; at < BLOCK; at += LINE / 4) __builtin_prefetch(row + (i + end - first) * BLOCK + at);
            weights[i] = sum_weights(row + i * BLOCK, size(i), {largest[i], factor}, [](int64_t, wide, wide all) { return all; });
        }
    }

    float highest() const { return *std::max_element(largest.begin(), largest.end()); }

    // The weight of the largest logit of each block, relative to the largest of the row.
    std::vector<float> factors() const {
        const Scale scale(highest(), factor);
        const int64_t count = largest.size();
        std::vector<float> factors(blocks_of(count) * BLOCK);
        for (int64_t at = 0; at < count; at += WIDE)
            store(&factors[at], scale(load_partial(largest.data(), at, count, MINUS_INFINITY)));
        return factors;
    }

    // The natural logarithm of the sum of the row's exponentials; NaN where the largest logit is not finite.
    double log_total() const {
        const float most = highest();
        const double total = std::inner_product(weights.begin(), weights.end(), factors().begin(), 0.0);
        return std::isfinite(most) ? most + std::log(total) : NAN;
    }
};

void find_top(const float *row, int64_t length, const std::vector<float> &maxima, int64_t count, int64_t *ids) {
    // A heap of the largest logits so far, the smallest of them on top. Of equal logits the lower id stays.
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

// The id of the first logit that equals `highest`; 0 if there is none, as in a row of NaNs.
int64_t find_first(const float *row, int64_t length, const std::vector<float> &maxima, float highest) {
    const int64_t start = BLOCK * (std::find(maxima.begin(), maxima.end(), highest) - maxima.begin());
    const int64_t end = std::min(start + BLOCK, length);
    const int64_t found = start < end ? std::find(row + start, row + end, highest) - row : end;
    return found < end ? found : 0;
}

int64_t count_above(const float *row, int64_t length, const std::vector<float> &maxima, float value) {
    int64_t count = 0;
    for (int64_t start = 0; start < length; start += BLOCK)
        if (maxima[start / BLOCK] > value)
            for (int64_t at = start; at < std::min(start + BLOCK, length); at++) count += row[at] > value;
    return count;
}

// The n-th random number of a seed, in [0, 1). core/numpy_kernel.py has the same.
double random_number(uint64_t seed, uint64_t n) {
    if (n) {
        seed += n * 0x9e3779b97f4a7c15;
        seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9;
        seed = (seed ^ seed >> 27) * 0x94d049bb133111eb;
        seed ^= seed >> 31;
    }
    return (double)(seed >> 11) * 0x1p-53;
}

// Draws an index with probability proportional to its weight. `uniform`, in [0, 1), is replaced by its remainder,
// which is distributed like a new random number.
template <class Weight>
int64_t pick(const Weight *weights, int64_t count, double &uniform) {
    const double target = uniform * std::accumulate(weights, weights + count, 0.0);
    double before = 0, here = 0;
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!(weights[i] > 0)) continue;
        before += here, here = weights[i], found = i;
        if (before + here > target) break;
    }
    uniform = std::min((target - before) / here, BELOW_ONE);
    return found;
}

// The logits from which a token is drawn: those larger than `least`, and those equal to it with an id below `id_limit`.
//
// Weights are computed again where they are needed, in few blocks: storing them would take longer.
class CandidateSet {
    const float *row;
    int64_t length;
    const Blocks *blocks;
    std::vector<float> factors;
    std::vector<double> weights;  // of the candidates of each block, relative to the row's largest logit
    float least = MINUS_INFINITY;
    int64_t id_limit = 0;

    int64_t size(int64_t block) const { return std::min(BLOCK, length - block * BLOCK); }

    // The weight of the candidates of a block, relative to its largest logit. Calls `take(at, weights)` for each vector.
    template <class Take>
    float sum_weights(int64_t block, Take take) const {
        const int64_t start = block * BLOCK;
        const Scale scale(blocks->largest[block], blocks->factor);
        return ::sum_weights(row + start, size(block), scale, [=](int64_t at, wide x, wide weights) {
            const int32_t before = std::clamp<int64_t>(id_limit - start - at, 0, WIDE);
            weights = (x > least) | ((x == least) & (lanes() < before)) ? weights : wide{};
            take(at, weights);
            return weights;
        });
    }

   public:
    CandidateSet(const float *row, int64_t length, const Blocks &blocks)
        : row(row),
          length(length),
          blocks(&blocks),
          factors(blocks.factors()),
          weights(blocks.weights.begin(), blocks.weights.end()) {
        for (size_t i = 0; i < weights.size(); i++) weights[i] *= factors[i];
    }

    double total() const { return std::accumulate(weights.begin(), weights.end(), 0.0); }

    // Draws an id with probability proportional to its weight.
    int64_t pick(double uniform) const {
        const int64_t block = ::pick(weights.data(), weights.size(), uniform);
        float each[BLOCK];
        sum_weights(block, [&each](int64_t at, wide weights) { store(each + at, weights); });
        return block * BLOCK + ::pick(each, size(block), uniform);
    }

    // Keeps only the logits larger than `number`, and those equal to it with an id below `before`. Stops and returns true as
    // soon as their weight is known to be below `enough`; the weights of the blocks are not complete then.
    bool keep(float number, int64_t before, double enough) {
        least = number, id_limit = before;
        double most = total();
        for (size_t block = 0; block < weights.size() && !(most < enough); block++) {
            const float stays = blocks->largest[block] < least ? 0 : sum_weights(block, [](int64_t, wide) {});
            most -= weights[block];
            most += weights[block] = (double)stays * factors[block];
        }
        return most < enough;
    }
};

// Draws a token of the nucleus (top_p). core/numpy_kernel.py describes the method.
int64_t sample_nucleus(CandidateSet candidates, const float *row, double wanted, uint64_t seed) {
    for (uint64_t n = 0;; n++) {
        const int64_t id = candidates.pick(random_number(seed, n));
        if (candidates.keep(row[id], id, wanted)) return id;
    }
}

// The query about a row, and below it the results. core/sampler_kernel.py declares the same under this name.
struct NativeRowQuery {
    int64_t reported, given, top_count;  // whether to return log probabilities, not logits; a token id or -1; length of `top`
    List<uint64_t> seeds;                // one token is drawn for each
    double temperature, top_p, min_p;
    int64_t top_k;
    double presence, frequency, repetition;
    List<int64_t> generated;  // distinct
    const int64_t *times;     // how often each occurs
    List<int64_t> seen;       // tokens of the prompt; distinct, sorted
    List<int64_t> biased;
    const double *biases;
    List<int64_t> banned;
    List<uint32_t> mask;  // empty, or one bit for each id that may be drawn, the lowest bit first
    List<int64_t> asked;  // ids whose log probabilities are returned, in any order

    double value;  // log probability or logit of the given token
    int64_t rank;
    int64_t *top;
    double *top_values;
    int64_t *sampled;
    double *sampled_values;
    double *asked_values;
};

// A row with temporary changes. The destructor restores it.
class AdjustedRow {
    float *const row;
    const int64_t length;
    std::vector<std::pair<int64_t, float>> before;

    // Replaces a logit by `change(logit)`. Ids outside the row are ignored: requests are checked before, but memory safety must
    // not depend on that.
    template <class Change>
    void edit(int64_t id, Change change) {
        if (id < 0 || id >= length) return;
        before.emplace_back(id, row[id]);
        row[id] = change(row[id]);
    }

    void penalize(int64_t id, float factor) {
        edit(id, [=](float x) { return x > 0 ? x / factor : x * factor; });
    }

   public:
    // Applies biases, penalties and bans, in this order. The repetition penalty applies to tokens of the prompt and the sample.
    AdjustedRow(float *row, int64_t length, const NativeRowQuery &query) : row(row), length(length) {
        for (int64_t i = 0; i < query.biased.count; i++)
            edit(query.biased.first[i], [&](float x) { return x + (float)query.biases[i]; });
        if (query.repetition != 1) {
            for (const int64_t id : query.seen) penalize(id, query.repetition);
            for (const int64_t id : query.generated)
                if (!std::binary_search(query.seen.begin(), query.seen.end(), id)) penalize(id, query.repetition);
        }
        if (query.presence != 0 || query.frequency != 0)
            for (int64_t i = 0; i < query.generated.count; i++) {
                const float penalty = query.times[i] * query.frequency + query.presence;
                edit(query.generated.first[i], [=](float x) { return x - penalty; });
            }
        for (const int64_t id : query.banned) edit(id, [](float) { return MINUS_INFINITY; });
    }

    AdjustedRow(const AdjustedRow &) = delete;

    ~AdjustedRow() {
        for (auto edit = before.rbegin(); edit != before.rend(); edit++) row[edit->first] = edit->second;
    }

    // Reads the changed blocks again.
    void read_changed(Blocks &blocks) const {
        std::vector<bool> read_again(blocks.largest.size());
        for (const auto &[id, _] : before) {
            const int64_t block = id / BLOCK;
            if (!read_again[block]) blocks.read(row, length, block, block + 1);
            read_again[block] = true;
        }
    }
};

// Draws from the `top_k` largest logits. Of these, those below `least` are removed (min_p), then those beyond the nucleus (top_p).
void sample_top_k(const float *row, int64_t length, const Blocks &blocks, float least, const NativeRowQuery &query) {
    std::vector<int64_t> ids(std::min(query.top_k, length));
    find_top(row, length, blocks.largest, ids.size(), ids.data());
    std::vector<double> weights;  // cumulative
    for (const int64_t id : ids)
        if (row[id] >= least || weights.empty())
            weights.push_back((weights.empty() ? 0 : weights.back()) + std::exp((row[id] - row[ids[0]]) / query.temperature));
    const auto last = std::lower_bound(weights.begin(), weights.end() - 1, query.top_p * weights.back());
    for (int64_t i = 0; i < query.seeds.count; i++) {
        const auto found = std::upper_bound(weights.begin(), last, random_number(query.seeds.first[i], 0) * *last);
        query.sampled[i] = ids[found - weights.begin()];
    }
}

// Draws a token for each seed from a changed row: temperature, then min_p, top_k, top_p.
void sample_tokens(const float *row, int64_t length, const Blocks &blocks, const NativeRowQuery &query) {
    const float highest = blocks.highest();
    const auto choose_top = [&] {
        std::fill_n(query.sampled, query.seeds.count, find_first(row, length, blocks.largest, highest));
    };
    if (!(query.temperature > 0)) return choose_top();
    const float least = highest + query.temperature * std::log(query.min_p);
    if (query.top_k) return sample_top_k(row, length, blocks, least, query);
    CandidateSet candidates(row, length, blocks);
    if (query.min_p > 0) candidates.keep(least, length, MINUS_INFINITY);
    const double wanted = query.top_p * candidates.total();
    if (!(wanted > 1)) return choose_top();  // the largest logit alone is the nucleus, or the row has a NaN
    for (int64_t i = 0; i < query.seeds.count; i++) {
        const uint64_t seed = query.seeds.first[i];
        query.sampled[i] =
            query.top_p < 1 ? sample_nucleus(candidates, row, wanted, seed) : candidates.pick(random_number(seed, 0));
    }
}

// Draws from the logits of the ids in the query's mask. All others become minus infinity in a copy of the row.
void sample_masked(const float *row, int64_t length, const NativeRowQuery &query, double temperature) {
    thread_local std::vector<float> copy;
    copy.assign(length, MINUS_INFINITY);
    for (int64_t word = 0; word < std::min(query.mask.count, (length + 31) / 32); word++)
        for (uint32_t bits = query.mask.first[word]; bits; bits &= bits - 1) {
            const int64_t id = word * 32 + __builtin_ctz(bits);
            if (id < length) copy[id] = row[id];
        }
    const AdjustedRow edited(copy.data(), length, query);
    Blocks blocks(length, temperature);
    for (int64_t block = 0; block < blocks_of(length); block++) {
        const uint32_t *first = query.mask.first + block * (BLOCK / 32);
        const uint32_t *end = std::min(first + BLOCK / 32, query.mask.end());
        if (std::any_of(first, std::max(first, end), [](uint32_t bits) { return bits != 0; }))
            blocks.read(copy.data(), length, block, block + 1);
        else
            blocks.largest[block] = MINUS_INFINITY, blocks.weights[block] = 0;
    }
    sample_tokens(copy.data(), length, blocks, query);
}

void process_row(float *row, int64_t length, NativeRowQuery &query, int threads) {
    const double temperature = query.seeds.count && !query.top_k ? query.temperature : 0;  // 0: no weights are needed to draw
    const bool masked = query.mask.count > 0, whole = query.reported || query.top_count || query.given >= 0;
    Blocks unmodified(length, query.reported ? 1 : temperature), tempered(length, temperature);
    const bool apart = !masked && temperature > 0 && tempered.factor != unmodified.factor;
    const int64_t blocks = masked && !whole ? 0 : blocks_of(length);
    parallel_for(threads, (blocks + PART - 1) / PART, [&](int64_t part) {
        const int64_t first = part * PART, end = std::min(first + PART, blocks);
        unmodified.read(row, length, first, end);
        if (apart) tempered.read(row, length, first, end);
    });
    const double total = query.reported ? unmodified.log_total() : 0;
    if (query.top_count) find_top(row, length, unmodified.largest, query.top_count, query.top);
    for (int64_t i = 0; i < query.top_count; i++) query.top_values[i] = row[query.top[i]] - total;
    if (query.given >= 0) {
        query.value = row[query.given] - total;
        query.rank = 1 + count_above(row, length, unmodified.largest, row[query.given]);
    }
    for (int64_t i = 0; i < query.asked.count; i++) query.asked_values[i] = row[query.asked.first[i]] - total;
    if (!query.seeds.count) return;
    if (masked) {
        sample_masked(row, length, query, temperature);
    } else {
        const AdjustedRow edited(row, length, query);
        Blocks &sampled_from = apart ? tempered : unmodified;
        edited.read_changed(sampled_from);
        sample_tokens(row, length, sampled_from, query);
    }
    for (int64_t i = 0; i < query.seeds.count; i++) query.sampled_values[i] = row[query.sampled[i]] - total;
}

}  // namespace

extern "C" {

int64_t row_query_size() { return sizeof(NativeRowQuery); }

// Reads `count` rows of `length` logits, one query for each. Rows are changed meanwhile and restored. `run`: null for a
// single thread.
void rows_read(float *rows, int64_t count, int64_t length, NativeRowQuery *queries, int threads, Run run) {
    chosen_run = run;
    if (count * length < PART * BLOCK) threads = 1;
    parallel_for(count > 1 ? threads : 1, count, [=](int64_t i) {
        if (queries[i].reported || queries[i].given >= 0 || queries[i].seeds.count)
            process_row(rows + i * length, length, queries[i], count > 1 ? 1 : threads);
    });
    if (run) run(0, nullptr, nullptr);  // the threads sleep until the next pass, which frees cores for other processes
}
}

// What the sampler does with whole rows of logits, in as few walks over memory as there can be. rows.py says what and why.
//
// Sums of a block are of eight running sums, one a lane, so they depend on the block alone: not on how many lanes the
// machine takes at once, nor on which thread took the block. A row's length is any.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "simd.hpp"
#include "parallel.hpp"

namespace {

constexpr int64_t BLOCK = 256;  // as in rows.py
constexpr int64_t PART = 64;    // blocks: fewer take less time than waking another thread
constexpr float NOTHING = -__builtin_inff(), LOWEST = -__FLT_MAX__;
constexpr double BELOW_ONE = 1 - 0x1p-53;

int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// As many from `at` on as the machine takes; what is beyond the end reads as `rest`.
wide some(const float *row, int64_t at, int64_t end, float rest) {
    if (at + WIDE <= end) return load<wide>(row + at);
    wide x = all<wide>(rest);
    for (int64_t i = at; i < end; i++) x[i - at] = row[i];
    return x;
}

float largest_of(const float *numbers, int64_t count) {
    wide most = all<wide>(NOTHING);
    for (int64_t at = 0; at < count; at += WIDE) most = larger(some(numbers, at, count, NOTHING), most);
    return largest(most);
}

// What a number weighs: e to the power of how far it is below `most`, times a factor.
struct Scale {
    float most, factor;

    // Minus infinity is at no distance from itself.
    Scale(float most, float factor) : most(std::max(most, LOWEST)), factor(factor) {}

    wide operator()(wide x) const { return exponential((x - most) * factor); }
};

// Sum of what numbers weigh; `take(at, numbers, weights)` may leave some out.
template <class Take>
float weigh(const float *numbers, int64_t count, Scale scale, Take take) {
    f8 total = {};
    for (int64_t at = 0; at < count; at += WIDE) {
        const wide x = some(numbers, at, count, NOTHING);
        add(total, take(at, x, scale(x)));
    }
    return sum(total);
}

// A row's blocks: the largest number of each and, unless the temperature is 0, what all of it weighs where that weighs 1.
struct Blocks {
    float factor;
    std::vector<float> largest, weights;

    Blocks(int64_t length, double temperature)
        : factor(temperature > 0 ? 1 / (float)temperature : 0), largest(blocks_of(length)), weights(largest.size()) {}

    // All largest first, so that no weight has to wait for the one that it is measured by; and what comes next is asked for
    // meanwhile, as weights take long and no memory.
    void read(const float *row, int64_t length, int64_t first, int64_t end) {
        const auto size = [=](int64_t block) { return std::min(BLOCK, length - block * BLOCK); };
        for (int64_t i = first; i < end; i++) largest[i] = largest_of(row + i * BLOCK, size(i));
        if (!(factor > 0)) return;
        for (int64_t i = first; i < end; i++) {
            for (int64_t at = 0; at < BLOCK; at += LINE / 4) __builtin_prefetch(row + (i + end - first) * BLOCK + at);
            weights[i] = weigh(row + i * BLOCK, size(i), {largest[i], factor}, [](int64_t, wide, wide all) { return all; });
        }
    }

    float highest() const { return *std::max_element(largest.begin(), largest.end()); }

    // What the largest of each weighs where the largest of all weighs 1.
    std::vector<float> factors() const {
        const Scale scale(highest(), factor);
        const int64_t count = largest.size();
        std::vector<float> factors(blocks_of(count) * BLOCK);
        for (int64_t at = 0; at < count; at += WIDE) store(&factors[at], scale(some(largest.data(), at, count, NOTHING)));
        return factors;
    }

    // Natural log of the sum of the row's exponentials; no number where the row is not of numbers.
    double log_total() const {
        const float most = highest();
        const double total = std::inner_product(weights.begin(), weights.end(), factors().begin(), 0.0);
        return std::isfinite(most) ? most + std::log(total) : NAN;
    }
};

void find_top(const float *row, int64_t length, const std::vector<float> &maxima, int64_t count, int64_t *ids) {
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

// A row's first number that is as large as `highest`; 0 if there is none, as in a row that is not of numbers.
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

// The n-th number in [0, 1) that comes of a seed, as in plain.py.
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
int64_t pick(const Weight *weights, int64_t count, double &draw) {
    const double target = draw * std::accumulate(weights, weights + count, 0.0);
    double before = 0, here = 0;
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!(weights[i] > 0)) continue;
        before += here, here = weights[i], found = i;
        if (before + here > target) break;
    }
    draw = std::min((target - before) / here, BELOW_ONE);
    return found;
}

// A row's numbers to draw from, of which those larger than `least` stay, or as large and before `place`.
//
// What a number weighs is computed where it is needed, which is in few blocks: to write it down would take longer.
class CandidateSet {
    const float *row;
    int64_t length;
    const Blocks *blocks;
    std::vector<float> factors;
    std::vector<double> weights;  // what stays of each block, where the row's largest number weighs 1
    float least = NOTHING;
    int64_t place = 0;

    int64_t size(int64_t block) const { return std::min(BLOCK, length - block * BLOCK); }

    // What stays of a block, where its largest number weighs 1; `take(at, weights)` hears of each number.
    template <class Take>
    float weigh(int64_t block, Take take) const {
        const int64_t start = block * BLOCK;
        const Scale scale(blocks->largest[block], blocks->factor);
        return ::weigh(row + start, size(block), scale, [=](int64_t at, wide x, wide weights) {
            const int32_t before = std::clamp<int64_t>(place - start - at, 0, WIDE);
            weights = (x > least) | ((x == least) & (lanes() < before)) ? weights : wide{};
            take(at, weights);
            return weights;
        });
    }

   public:
    CandidateSet(const float *row, int64_t length, const Blocks &blocks)
        : row(row), length(length), blocks(&blocks), factors(blocks.factors()),
          weights(blocks.weights.begin(), blocks.weights.end()) {
        for (size_t i = 0; i < weights.size(); i++) weights[i] *= factors[i];
    }

    double total() const { return std::accumulate(weights.begin(), weights.end(), 0.0); }

    // A number in proportion to its weight.
    int64_t pick(double draw) const {
        const int64_t block = ::pick(weights.data(), weights.size(), draw);
        float each[BLOCK];
        weigh(block, [&each](int64_t at, wide weights) { store(each + at, weights); });
        return block * BLOCK + ::pick(each, size(block), draw);
    }

    // Lets no others stay than those larger than `number`, or as large and before `before`. Ends as soon as they are known to
    // weigh less than `enough`, and says so: what they weigh is not known then.
    bool keep(float number, int64_t before, double enough) {
        least = number, place = before;
        double most = total();
        for (size_t block = 0; block < weights.size() && !(most < enough); block++) {
            const float stays = blocks->largest[block] < least ? 0 : weigh(block, [](int64_t, wide) {});
            most -= weights[block];
            most += weights[block] = (double)stays * factors[block];
        }
        return most < enough;
    }
};

// A token of the nucleus: see plain.py.
int64_t sample_nucleus(CandidateSet pool, const float *row, double wanted, uint64_t seed) {
    for (uint64_t n = 0;; n++) {
        const int64_t place = pool.pick(number(seed, n));
        if (pool.keep(row[place], place, wanted)) return place;
    }
}

template <class Number>
struct List {
    const Number *first;
    int64_t count;

    const Number *begin() const { return first; }
    const Number *end() const { return first + count; }
};

// What is wanted of a row, and what comes of it: as rows.py declares it.
struct RowQuery {
    int64_t reported, given, top_count;  // whether log probabilities are wanted; a token or -1; how many of the likeliest
    List<uint64_t> seeds;                // a draw for each
    double temperature, top_p, min_p;
    int64_t top_k;
    double presence, frequency, repetition;
    List<int64_t> generated;  // distinct
    const int64_t *times;     // of each
    List<int64_t> seen;       // of the prompt; distinct, rising
    List<int64_t> biased;
    const double *biases;
    List<int64_t> banned;

    double value;  // of the given token
    int64_t rank;
    int64_t *top;
    double *top_values;
    int64_t *chosen;
    double *chosen_values;
};

// A row while other numbers stand in it: as they are taken back, it is what it was.
class AdjustedRow {
    float *const row;
    const int64_t length;
    std::vector<std::pair<int64_t, float>> before;

    // `change` makes a number of what is there. Ids are known to be in the row; were one not, nothing would be lost.
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
    // Bias, penalties and bans, in this order. The repetition penalty is for what the prompt or the sample has.
    AdjustedRow(float *row, int64_t length, const RowQuery &task) : row(row), length(length) {
        for (int64_t i = 0; i < task.biased.count; i++)
            edit(task.biased.first[i], [&](float x) { return x + (float)task.biases[i]; });
        if (task.repetition != 1) {
            for (const int64_t id : task.seen) penalize(id, task.repetition);
            for (const int64_t id : task.generated)
                if (!std::binary_search(task.seen.begin(), task.seen.end(), id)) penalize(id, task.repetition);
        }
        if (task.presence != 0 || task.frequency != 0)
            for (int64_t i = 0; i < task.generated.count; i++) {
                const float penalty = task.times[i] * task.frequency + task.presence;
                edit(task.generated.first[i], [=](float x) { return x - penalty; });
            }
        for (const int64_t id : task.banned) edit(id, [](float) { return NOTHING; });
    }

    AdjustedRow(const AdjustedRow &) = delete;

    ~AdjustedRow() {
        for (auto edit = before.rbegin(); edit != before.rend(); edit++) row[edit->first] = edit->second;
    }

    void renew(Blocks &blocks) const {
        std::vector<bool> renewed(blocks.largest.size());
        for (const auto &[id, _] : before) {
            const int64_t block = id / BLOCK;
            if (!renewed[block]) blocks.read(row, length, block, block + 1);
            renewed[block] = true;
        }
    }
};

// Draws from the likeliest numbers, of which those that are not below `least` stay and, of these, as many as weigh `top_p`.
void sample_top_k(const float *row, int64_t length, const Blocks &blocks, float least, const RowQuery &task) {
    std::vector<int64_t> ids(std::min(task.top_k, length));
    find_top(row, length, blocks.largest, ids.size(), ids.data());
    std::vector<double> weights;  // of each with those before it
    for (const int64_t id : ids)
        if (row[id] >= least || weights.empty())
            weights.push_back((weights.empty() ? 0 : weights.back()) + std::exp((row[id] - row[ids[0]]) / task.temperature));
    const auto last = std::lower_bound(weights.begin(), weights.end() - 1, task.top_p * weights.back());
    for (int64_t i = 0; i < task.seeds.count; i++) {
        const auto found = std::upper_bound(weights.begin(), last, number(task.seeds.first[i], 0) * *last);
        task.chosen[i] = ids[found - weights.begin()];
    }
}

// Draws from a row with its edits: temperature, then min_p, top_k, top_p.
void draw(const float *row, int64_t length, const Blocks &blocks, const RowQuery &task) {
    const float highest = blocks.highest();
    const auto choose_top = [&] {
        std::fill_n(task.chosen, task.seeds.count, find_first(row, length, blocks.largest, highest));
    };
    if (!(task.temperature > 0)) return choose_top();
    const float least = highest + task.temperature * std::log(task.min_p);
    if (task.top_k) return sample_top_k(row, length, blocks, least, task);
    CandidateSet pool(row, length, blocks);
    if (task.min_p > 0) pool.keep(least, length, NOTHING);
    const double wanted = task.top_p * pool.total();
    if (!(wanted > 1)) return choose_top();  // it weighs 1 and is all of the nucleus; or the row is not of numbers
    for (int64_t i = 0; i < task.seeds.count; i++) {
        const uint64_t seed = task.seeds.first[i];
        task.chosen[i] = task.top_p < 1 ? sample_nucleus(pool, row, wanted, seed) : pool.pick(number(seed, 0));
    }
}

void process_row(float *row, int64_t length, RowQuery &task, int threads) {
    const double temperature = task.seeds.count && !task.top_k ? task.temperature : 0;  // of what is drawn by its weight
    Blocks plain(length, task.reported ? 1 : temperature), warm(length, temperature);
    const bool apart = temperature > 0 && warm.factor != plain.factor;
    const int64_t blocks = blocks_of(length);
    parallel_for(threads, (blocks + PART - 1) / PART, [&](int64_t part) {
        const int64_t first = part * PART, end = std::min(first + PART, blocks);
        plain.read(row, length, first, end);
        if (apart) warm.read(row, length, first, end);
    });
    const double total = task.reported ? plain.log_total() : 0;
    if (task.top_count) find_top(row, length, plain.largest, task.top_count, task.top);
    for (int64_t i = 0; i < task.top_count; i++) task.top_values[i] = row[task.top[i]] - total;
    if (task.given >= 0) {
        task.value = row[task.given] - total;
        task.rank = 1 + count_above(row, length, plain.largest, row[task.given]);
    }
    if (!task.seeds.count) return;
    {
        const AdjustedRow edited(row, length, task);
        Blocks &drawn = apart ? warm : plain;
        edited.renew(drawn);
        draw(row, length, drawn, task);
    }
    for (int64_t i = 0; i < task.seeds.count; i++) task.chosen_values[i] = row[task.chosen[i]] - total;
}

}  // namespace

extern "C" {

int64_t rows_task_size() { return sizeof(RowQuery); }

// Reads `count` rows, each for what is wanted of it. They are as they were afterwards.
void rows_read(float *rows, int64_t count, int64_t length, RowQuery *tasks, int threads, Run team) {
    pool_run = team;
    if (count * length < PART * BLOCK) threads = 1;
    parallel_for(count > 1 ? threads : 1, count, [=](int64_t i) {
        if (tasks[i].reported || tasks[i].given >= 0 || tasks[i].seeds.count)
            process_row(rows + i * length, length, tasks[i], count > 1 ? 1 : threads);
    });
    if (team) team(0, nullptr, nullptr);  // others are not needed before the next pass, and whom we write to needs a core
}
}

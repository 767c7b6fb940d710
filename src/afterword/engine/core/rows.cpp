// What the sampler does with whole rows of logits, in as few walks over memory as there can be. rows.py says what and why.
//
// Sums of a block are of eight running sums, one a lane, so they depend on the block alone: not on how many lanes the
// machine takes at once, nor on which thread took the block. A row's length is any.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../lanes.hpp"
#include "../threads.hpp"

namespace {

constexpr int64_t BLOCK = 256;             // as in rows.py
constexpr int64_t WORTH_A_THREAD = 16384;  // numbers: fewer take less time than waking another
constexpr float NOTHING = -__builtin_inff();
constexpr double BELOW_ONE = 1 - 0x1p-53;

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

// Calls `walk(block, start, end)` for each block of a row, in several threads if a row is all there is.
template <class Walk>
void each_block(int64_t length, int threads, Walk walk) {
    constexpr int64_t PART = WORTH_A_THREAD / BLOCK;
    const int64_t blocks = blocks_of(length);
    in_parts(threads, (blocks + PART - 1) / PART, [=](int64_t part) {
        for (int64_t block = part * PART; block < std::min((part + 1) * PART, blocks); block++)
            walk(block, block * BLOCK, std::min((block + 1) * BLOCK, length));
    });
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

// A row's first number that is as large as `highest`; 0 if there is none, as in a row that is not of numbers.
int64_t find_first(const float *row, int64_t length, const std::vector<float> &maxima, float highest) {
    const int64_t start = BLOCK * (std::find(maxima.begin(), maxima.end(), highest) - maxima.begin());
    if (start >= length) return 0;
    return std::find(row + start, row + std::min(start + BLOCK, length), highest) - row;
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
    int threads;
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
        each_block(all.size(), threads, [this](int64_t block, int64_t start, int64_t end) {
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
    each_block(length, weights.threads, [&](int64_t block, int64_t start, int64_t end) {
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

template <class Number>
struct List {
    const Number *first;
    int64_t count;

    const Number *begin() const { return first; }
    const Number *end() const { return first + count; }
};

// What is wanted of a row, and what comes of it: as rows.py declares it.
struct Task {
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
class Edited {
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
    Edited(float *row, int64_t length, const Task &task) : row(row), length(length) {
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

    Edited(const Edited &) = delete;

    ~Edited() {
        for (auto edit = before.rbegin(); edit != before.rend(); edit++) row[edit->first] = edit->second;
    }

    void renew(std::vector<float> &maxima) const {
        std::vector<bool> renewed(maxima.size());
        for (const auto &[id, _] : before) {
            const int64_t block = id / BLOCK, start = block * BLOCK;
            if (renewed[block]) continue;
            renewed[block] = true;
            maxima[block] = largest_of(row + start, std::min(BLOCK, length - start));
        }
    }
};

// Draws from a row with its edits: temperature, then min_p, top_k, top_p.
void draw(const float *row, int64_t length, const std::vector<float> &maxima, const Task &task, int threads) {
    static thread_local std::vector<float> kept;  // since fresh pages cost more than the arithmetic that is done in them
    std::vector<float> &scratch = kept;           // this thread's, also for those that help it
    const float highest = *std::max_element(maxima.begin(), maxima.end());
    const auto all_likeliest = [&] { std::fill_n(task.chosen, task.seeds.count, find_first(row, length, maxima, highest)); };
    if (!(task.temperature > 0)) return all_likeliest();
    scratch.resize(length);
    Weights weights{scratch, threads, length, 0, std::vector<double>(maxima.size())};
    const float factor = 1 / (float)task.temperature;
    each_block(length, threads, [&](int64_t block, int64_t start, int64_t end) {
        const auto write = [&](int64_t at, wide x) { put(&scratch[start], at, end - start, x); };
        weights.sums[block] = exponentials(row + start, end - start, highest, factor, write);
    });
    if (task.min_p > 0) weights.keep(length, (float)task.min_p);
    const double wanted = task.top_p * weights.total();
    if (!(wanted > 1)) return all_likeliest();  // it weighs 1 and is all of the nucleus; or the row is not of numbers
    std::vector<double> cumulated;
    const std::vector<int64_t> few = task.top_k ? find_few(weights, task.top_k, task.top_p, cumulated) : std::vector<int64_t>();
    for (int64_t i = 0; i < task.seeds.count; i++) {
        const uint64_t seed = task.seeds.first[i];
        if (task.top_k) {
            const auto found = std::upper_bound(cumulated.begin(), cumulated.end() - 1, number(seed, 0) * cumulated.back());
            task.chosen[i] = few[found - cumulated.begin()];
        } else {
            task.chosen[i] = task.top_p < 1 ? from_nucleus(weights, wanted, seed) : weights.pick(number(seed, 0));
        }
    }
}

void read_row(float *row, int64_t length, Task &task, int threads) {
    std::vector<float> maxima(blocks_of(length)), sums(maxima.size());
    each_block(length, threads, [&](int64_t block, int64_t start, int64_t end) {
        maxima[block] = largest_of(row + start, end - start);
        if (task.reported) sums[block] = exponentials(row + start, end - start, maxima[block], 1, [](int64_t, wide) {});
    });
    const double total = task.reported ? log_total(maxima.data(), sums.data(), maxima.size()) : 0;
    if (task.top_count) find_likeliest(row, length, maxima.data(), task.top_count, task.top);
    for (int64_t i = 0; i < task.top_count; i++) task.top_values[i] = row[task.top[i]] - total;
    if (task.given >= 0) {
        task.value = row[task.given] - total;
        task.rank = 1 + count_above(row, length, maxima, row[task.given]);
    }
    if (!task.seeds.count) return;
    {
        const Edited edited(row, length, task);
        edited.renew(maxima);
        draw(row, length, maxima, task, threads);
    }
    for (int64_t i = 0; i < task.seeds.count; i++) task.chosen_values[i] = row[task.chosen[i]] - total;
}

}  // namespace

extern "C" {

int64_t rows_task_size() { return sizeof(Task); }

// Reads `count` rows, each for what is wanted of it. They are as they were afterwards.
void rows_read(float *rows, int64_t count, int64_t length, Task *tasks, int threads, Run team) {
    of_the_team = team;
    if (count * length < WORTH_A_THREAD) threads = 1;
    in_parts(count > 1 ? threads : 1, count, [=](int64_t i) {
        if (tasks[i].reported || tasks[i].given >= 0 || tasks[i].seeds.count)
            read_row(rows + i * length, length, tasks[i], count > 1 ? 1 : threads);
    });
}
}

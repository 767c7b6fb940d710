// Runs sampler_kernel.cpp on fixed rows of logits and prints a hash of each result. See `driver.hpp`.

#include "../../src/afterword/engine/kernels/sampler_kernel.cpp"

#include "driver.hpp"

namespace {

struct Filter {
    const char *name;
    double temperature, top_p, min_p;
    int64_t top_k;
    double presence, frequency, repetition;
};

const Filter FILTERS[] = {
    {"greedy", 0, 1, 0, 0, 0, 0, 1},         {"plain", 1, 1, 0, 0, 0, 0, 1},
    {"nucleus", 0.75, 0.875, 0, 0, 0, 0, 1}, {"top_k", 1.5, 0.9375, 0.03125, 40, 0.5, 0.25, 1},
    {"min_p", 1, 1, 0.0625, 0, 0, 0, 1.5},
};

struct Answer {
    std::vector<int64_t> top, sampled;
    std::vector<double> top_values, sampled_values;
};

uint64_t read_rows(int64_t count, int64_t length, Run run, int threads) {
    Random random(5);
    std::vector<float> rows = random.numbers(count * length, 8);
    if (count > 3) rows[3 * length + 7] = __builtin_nanf("");
    const std::vector<float> before = rows;
    std::vector<uint64_t> seeds(50);
    for (uint64_t &seed : seeds) seed = random.bits();
    const std::vector<int64_t> generated = {3, 99, 5}, times = {2, 1, 1}, seen = {5, 7, 200}, banned = {11, length + 1};
    const std::vector<int64_t> biased = {1, length - 1, -1};
    const std::vector<double> biases = {2, 20, 1};
    std::vector<NativeRowQuery> queries(count);
    std::vector<Answer> answers(count);
    for (int64_t i = 0; i < count; i++) {
        const Filter &filter = FILTERS[i % 5];
        Answer &to = answers[i];
        to.top.resize(5), to.top_values.resize(5), to.sampled.resize(seeds.size()), to.sampled_values.resize(seeds.size());
        NativeRowQuery &query = queries[i];
        query = {};
        query.reported = i % 2 == 0, query.given = i % 3 ? 17 : -1, query.top_count = 5;
        query.seeds = {seeds.data(), (int64_t)seeds.size()};
        query.temperature = filter.temperature, query.top_p = filter.top_p, query.min_p = filter.min_p,
        query.top_k = filter.top_k;
        query.presence = filter.presence, query.frequency = filter.frequency, query.repetition = filter.repetition;
        query.generated = {generated.data(), 3}, query.times = times.data(), query.seen = {seen.data(), 3};
        query.biased = {biased.data(), 3}, query.biases = biases.data(), query.banned = {banned.data(), 2};
        query.top = to.top.data(), query.top_values = to.top_values.data();
        query.sampled = to.sampled.data(), query.sampled_values = to.sampled_values.data();
    }
    rows_read(rows.data(), count, length, queries.data(), threads, run);
    if (std::memcmp(rows.data(), before.data(), rows.size() * sizeof(float))) std::printf("the rows changed\n"), std::exit(1);
    Hash hash;
    for (int64_t i = 0; i < count; i++) {
        hash.add(&queries[i].value, 1), hash.add(&queries[i].rank, 1);
        hash.add(answers[i].top), hash.add(answers[i].top_values);
        hash.add(answers[i].sampled), hash.add(answers[i].sampled_values);
    }
    return hash.result();
}

// Scans a row in all ways. Only the ids and the largest logits have the same bits on every machine.
uint64_t scan_row(int64_t length) {
    Random random(9);
    std::vector<float> row = random.numbers(length, 8);
    row[length / 2] = MINUS_INFINITY;
    const std::vector<float> before = row;
    const std::vector<int64_t> changed = {-1, 0, 2, 300, length - 1, length};
    std::vector<float> largest(blocks_of(length));
    std::vector<double> weights(largest.size()), moments(3);
    std::vector<int64_t> ids(largest.size() * BLOCK);
    const ScannedRow whole = {row.data(), length, {nullptr, 0}, largest.data()};
    const ScannedRow part = {row.data(), length, {changed.data(), (int64_t)changed.size()}, largest.data()};
    Hash hash;
    for (const ScannedRow *scanned : {&whole, &part}) {
        scan_largest(scanned, scanned == &part);
        hash.add(largest.data(), largest.size());
        for (const float limit : {MINUS_INFINITY, -1.0f, 2.5f, 100.0f}) hash.add(ids.data(), scan_above(scanned, limit, ids.data()));
        const double products = scan_weights(scanned, 32, 1.5, weights.data());
        scan_moments(scanned, 32, moments.data());
        if (!(products < 0) || !(weights[0] > 0) || moments[0] != length - (scanned == &part ? 5 : 1))
            std::printf("wrong sums\n"), std::exit(1);
    }
    if (std::memcmp(row.data(), before.data(), row.size() * sizeof(float))) std::printf("the row changed\n"), std::exit(1);
    return hash.result();
}

}  // namespace

void run_sampler(const Options &options, void *run) {
    report("sampler/rows", options, [=](int threads) { return read_rows(10, 5003, (Run)run, threads); });
    report("sampler/scan", options, [](int) { return scan_row(5003); });
    report("sampler/a long row", options, [=](int threads) { return read_rows(1, 100001, (Run)run, threads); });
}

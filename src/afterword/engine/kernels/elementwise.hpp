// The operations between products and attention: norms, sums, differences, products, quotients, rotary embedding, SET_ROWS and
// GET_ROWS. Functions of single elements are in activations.hpp, copies in copies.hpp.
//
// They are computed here because each change between ggml's CPU backend and this one takes longer than the operation. One thread
// computes a row, and the order of its operations is fixed. Other operations, and forms that `supports` refuses, are left to
// ggml.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "simd.hpp"
#include "parallel.hpp"
#include "ggml.hpp"

namespace elementwise {
namespace {

constexpr int64_t ALONE = 1 << 15;          // fewer elements are computed by one thread, sooner than others could join
constexpr int64_t PART = 1 << 13;           // elements that a thread takes at a time
constexpr int IN_PAIRS = 0, IN_HALVES = 2;  // ggml's numbers of the orders of rotary embedding
constexpr int IN_SECTIONS = 8, INTERLEAVED = 40;  // halves, and each pair turns with one of the token's four positions

// i % n, mostly without a division, which takes as long as the work on a short row.
int64_t repeated(int64_t i, int64_t n) { return i < n ? i : i % n; }

// The indices of row `i` of a tensor in its dimensions 1 to 3.
struct RowIndex {
    int64_t i1, i2 = 0, i3 = 0;

    RowIndex(const Tensor *x, int64_t i) : i1(i) {
        if (i1 < x->ne[1]) return;
        i2 = i1 / x->ne[1], i1 %= x->ne[1];
        if (i2 < x->ne[2]) return;
        i3 = i2 / x->ne[2], i2 %= x->ne[2];
    }

    // The indices of the next row of the same tensor.
    void advance(const Tensor *x) {
        if (++i1 < x->ne[1]) return;
        i1 = 0;
        if (++i2 < x->ne[2]) return;
        i2 = 0, i3++;
    }
};

int64_t rows_of(const Tensor *x) { return x->ne[1] * x->ne[2] * x->ne[3]; }

// The address of a row. The rows of a tensor with fewer of them are repeated.
float *row(const Tensor *x, RowIndex at) {
    return (float *)(x->data + repeated(at.i1, x->ne[1]) * x->nb[1] + repeated(at.i2, x->ne[2]) * x->nb[2] +
                     repeated(at.i3, x->ne[3]) * x->nb[3]);
}

// Calls `work` with the numbers of a first row and of the row behind the last one, for parts that make up all rows. `length`:
// elements of a row.
template <class Work>
void parallel_parts(int threads, int64_t rows, int64_t length, const Work &work) {
    if (!length || !rows) return;  // llama.cpp clears the states of no sequence with empty tensors
    const int64_t size = PART / length + 1, parts = rows * length < ALONE ? 1 : (rows + size - 1) / size;
    if (parts == 1) return work(0, rows);
    parallel_for(threads, parts, [&](int64_t i) { work(i * size, std::min((i + 1) * size, rows)); });
}

// Calls `work` with the number of each row.
template <class Work>
void parallel_rows(int threads, int64_t rows, int64_t length, const Work &work) {
    parallel_parts(threads, rows, length, [&](int64_t first, int64_t end) {
        for (; first < end; first++) work(first);
    });
}

// Calls `work(i, vector)` for each vector of a row: `i` is its first element, and the type of `vector` is `wide` or `f8`.
template <class Do>
void for_lanes(int64_t length, const Do &work) {
    int64_t i = 0;
    for (; i + WIDE <= length; i += WIDE) work(i, wide{});
    for (; i < length; i += LANES) work(i, f8{});
}

// The same for rows of any length: the type of `vector` is `float` for elements that fill no vector.
template <class Do>
void for_elements(int64_t length, const Do &work) {
    int64_t i = length / LANES * LANES;
    for_lanes(i, work);
    for (; i < length; i++) work(i, float{});
}

bool dense_floats(const Tensor *x) { return x->type == F32 && rows_are_dense(x, sizeof(float)); }
bool floats(const Tensor *x) { return dense_floats(x) && x->ne[0] % LANES == 0; }
bool same_rows(const Tensor *a, const Tensor *b) { return a->ne[1] == b->ne[1] && a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3]; }
bool same_shape(const Tensor *a, const Tensor *b) { return a->ne[0] == b->ne[0] && same_rows(a, b); }

float setting(const Tensor *node, int i) {
    float x;
    std::memcpy(&x, &node->params[i], sizeof x);
    return x;
}

// ---- norms: each row divided by the root of its mean square, or minus its mean and divided by its standard deviation

struct RmsNorm {
    static constexpr const char *NAME = "RMS_NORM";
    static bool supports(const Tensor *node) { return floats(node) && floats(node->src[0]); }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        const int64_t length = x->ne[0];
        const float least = setting(node, 0);
        parallel_rows(threads, rows_of(node), length, [=](int64_t i) {
            const float *from = row(x, {x, i});
            float *to = row(node, {node, i});
            f8 squares{};
            for (int64_t k = 0; k < length; k += LANES) squares = fused(load(from + k), load(from + k), squares);
            const float scale = 1 / std::sqrt(sum(squares) / (float)length + least);
            for_lanes(length, [=](int64_t k, auto v) { store(to + k, load<decltype(v)>(from + k) * scale); });
        });
    }
};

struct Norm {
    static constexpr const char *NAME = "NORM";
    static bool supports(const Tensor *node) { return floats(node) && floats(node->src[0]); }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        const int64_t length = x->ne[0];
        const float least = setting(node, 0);
        parallel_rows(threads, rows_of(node), length, [=](int64_t i) {
            const float *from = row(x, {x, i});
            float *to = row(node, {node, i});
            f8 total{}, squares{};
            for (int64_t k = 0; k < length; k += LANES) total += load(from + k);
            const float mean = sum(total) / (float)length;
            for (int64_t k = 0; k < length; k += LANES) {
                const f8 distance = load(from + k) - mean;
                squares = fused(distance, distance, squares);
            }
            const float scale = 1 / std::sqrt(sum(squares) / (float)length + least);
            for_lanes(length, [=](int64_t k, auto v) { store(to + k, (load<decltype(v)>(from + k) - mean) * scale); });
        });
    }
};

// ---- sums, differences, products and quotients, element by element; rows of the second operand, or their only element, are repeated

template <class Two>
struct Binary {
    static bool supports(const Tensor *node) {
        const Tensor *a = node->src[0], *b = node->src[1];
        return dense_floats(node) && dense_floats(a) && dense_floats(b) && node->ne[0] == a->ne[0] && same_rows(node, a) &&
               (a->ne[0] == b->ne[0] || b->ne[0] == 1);
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *a = node->src[0], *b = node->src[1];
        const bool one = b->ne[0] == 1;
        parallel_rows(threads, rows_of(node), a->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            const float *x = row(a, at), *y = row(b, at);
            float *to = row(node, at);
            const auto each = [=](auto second) {
                for_elements(a->ne[0], [=](int64_t k, auto v) { store(to + k, Two{}(load<decltype(v)>(x + k), second(k, v))); });
            };
            if (one) each([number = *y](int64_t, auto v) { return all<decltype(v)>(number); });
            else each([=](int64_t k, auto v) { return load<decltype(v)>(y + k); });
        });
    }
};

struct Sum : Binary<std::plus<>> {
    static constexpr const char *NAME = "ADD";
};
struct Difference : Binary<std::minus<>> {
    static constexpr const char *NAME = "SUB";
};
struct Mul : Binary<std::multiplies<>> {
    static constexpr const char *NAME = "MUL";
};
struct Div : Binary<std::divides<>> {
    static constexpr const char *NAME = "DIV";
};

// ---- rotary embedding: rotates pairs of elements of a head, which are neighbours or half a head apart

// How the angles of a model are changed for longer contexts than it was trained on: all by one factor, or those of slow pairs more
// than those of fast ones (YaRN).
class Stretching {
    const float speed, mix;  // mix: 0 without YaRN
    float first = 0, range = 1;

   public:
    Stretching(const Tensor *node, int pairs) : speed(setting(node, 6)), mix(setting(node, 7)) {
        if (mix == 0) return;
        const double base = setting(node, 5), length = node->params[4];
        // The pair that turns `turns` times in the original context.
        const auto pair_of = [=](double turns) { return pairs * std::log(length / (turns * 2 * M_PI)) / std::log(base); };
        first = (float)std::max(0.0, std::floor(pair_of(setting(node, 9))));
        const auto end = (float)std::min(2.0 * pairs - 1, std::ceil(pair_of(setting(node, 10))));
        range = std::max(0.001f, end - first);
    }

    // The angle for one position.
    float of(int pair, float angle) const {
        if (mix == 0) return speed * angle;
        const float kept = (1 - std::min(1.0f, std::max(0.0f, ((float)pair - first) / range))) * mix;
        return fused(speed * angle, 1 - kept, angle * kept);
    }

    // The factor of cosines and sines.
    float size() const { return mix == 0 ? 1 : 1 + 0.1f * std::log(1 / speed); }
};

// Which of a token's positions turns a pair. Models for images have four of them: time, height, width and one more.
class Sections {
    const bool several, interleaved;
    int pairs[4];

   public:
    static constexpr int FIRST = 11, POSITIONS = 4;  // the parameter with the first section's number of pairs

    explicit Sections(const Tensor *node)
        : several(node->params[2] == IN_SECTIONS || node->params[2] == INTERLEAVED), interleaved(node->params[2] == INTERLEAVED) {
        std::memcpy(pairs, node->params + FIRST, sizeof pairs);
    }

    int positions() const { return several ? POSITIONS : 1; }
    int all() const { return pairs[0] + pairs[1] + pairs[2] + pairs[3]; }
    bool valid() const { return !several || (*std::min_element(pairs, pairs + POSITIONS) >= 0 && all() > 0); }

    int of(int pair) const {
        if (!several) return 0;
        int i = pair % all();
        if (interleaved) return i < 3 * pairs[i % 3] ? i % 3 : 3;
        int section = 0;
        while (section < 3 && i >= pairs[section]) i -= pairs[section++];
        return section;
    }
};

// Cosines and sines of a pass, [token][cosines, sines][pair]. They are kept, because all layers use the same.
class Angles {
    int32_t params[16] = {};
    std::vector<int32_t> positions;
    std::vector<float> factors, table;  // factors: divide the angle of each pair; empty if there are none

    // Copies the tensor to `kept`. Returns whether it differed.
    template <class T>
    static bool replace(std::vector<T> &kept, const Tensor *now) {
        const T *first = now ? (const T *)now->data : nullptr, *end = now ? first + now->ne[0] : nullptr;
        if (std::equal(first, end, kept.begin(), kept.end())) return false;
        kept.assign(first, end);
        return true;
    }

   public:
    const float *of(const Tensor *node, int pairs) {
        const bool new_positions = replace(positions, node->src[1]), new_factors = replace(factors, node->src[2]);
        if (!new_positions && !new_factors && !std::memcmp(params, node->params, sizeof params)) return table.data();
        std::memcpy(params, node->params, sizeof params);
        const float base = setting(node, 5);
        const Stretching stretching(node, pairs);
        const float size = setting(node, 8) * stretching.size();
        const Sections sections(node);
        const size_t tokens = positions.size() / sections.positions();
        table.resize(tokens * 2 * pairs);
        for (int pair = 0; pair < pairs; pair++) {
            const float angle = (float)std::pow((double)base, -(double)pair / pairs);
            const float one = stretching.of(pair, factors.empty() ? angle : angle / factors[pair]);
            const int32_t *position = positions.data() + sections.of(pair) * tokens;
            for (size_t i = 0; i < tokens; i++) {
                float *to = &table[i * 2 * pairs + pair];
                to[0] = size * std::cos(position[i] * one), to[pairs] = size * std::sin(position[i] * one);
            }
        }
        return table.data();
    }
};

Angles angles;  // used by one operation at a time

struct Rope {
    static constexpr const char *NAME = "ROPE";
    static constexpr int FIRST_TURNED = 15;  // the parameter with the first element that is rotated
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *at = node->src[1], *factors = node->src[2];
        const int elements = node->params[1], order = node->params[2], first = node->params[FIRST_TURNED];
        const Sections sections(node);
        const bool is_order = order == IN_PAIRS || order == IN_HALVES || order == IN_SECTIONS || order == INTERLEAVED;
        return floats(node) && floats(x) && x->ne[3] == 1 && at->type == I32 && is_order && sections.valid() &&
               at->ne[0] == x->ne[2] * sections.positions() && elements % 2 == 0 && first >= 0 && first + elements <= x->ne[0] &&
               (!factors || (factors->type == F32 && factors->ne[0] >= elements / 2));
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0];
        const int pairs = node->params[1] / 2;
        const int first = node->params[FIRST_TURNED], end = first + 2 * pairs;
        const bool halves = node->params[2] != IN_PAIRS;
        const float *table = angles.of(node, pairs);
        parallel_rows(threads, rows_of(node), x->ne[0], [=](int64_t i) {
            const RowIndex at(node, i);
            const float *from = row(x, at), *cosines = table + at.i2 * 2 * pairs, *sines = cosines + pairs;
            float *to = row(node, at);
            const auto angle = [=](int pair, int one, int other) {
                const float a = from[first + one], b = from[first + other];
                to[first + one] = fused(a, cosines[pair], -b * sines[pair]);
                to[first + other] = fused(a, sines[pair], b * cosines[pair]);
            };
            if (halves)
                for (int pair = 0; pair < pairs; pair++) angle(pair, pair, pair + pairs);
            else
                for (int pair = 0; pair < pairs; pair++) angle(pair, 2 * pair, 2 * pair + 1);
            for (int64_t k = 0; k < x->ne[0]; k++)
                if (k < first || k >= end) to[k] = from[k];
        });
    }
};

// ---- SET_ROWS and GET_ROWS: rows are written to the KV cache, and rows are written and read by their numbers

bool are_numbers(const Tensor *x) { return x->type == I64 || x->type == I32; }

int64_t number(const Tensor *numbers, int64_t i, int64_t list = 0, int64_t lists = 0) {
    const char *at =
        numbers->data + i * numbers->nb[0] + repeated(list, numbers->ne[1]) * numbers->nb[1] +
        repeated(lists, numbers->ne[2]) * numbers->nb[2];
    return numbers->type == I64 ? *(const int64_t *)at : *(const int32_t *)at;
}

// Each matrix of the first operand has its own list, or several share one.
struct SetRows {
    static constexpr const char *NAME = "SET_ROWS";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *where = node->src[1];
        const bool is_halves = node->type == F16 && rows_are_dense(node, sizeof(half)) && floats(x);
        return (is_halves || (dense_floats(node) && dense_floats(x))) && x->ne[0] == node->ne[0] && are_numbers(where) &&
               where->ne[0] == x->ne[1] && where->ne[1] && where->ne[2] && where->ne[3] == 1 && x->ne[2] == node->ne[2] &&
               x->ne[3] == node->ne[3] && x->ne[2] % where->ne[1] == 0 && x->ne[3] % where->ne[2] == 0;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0], *where = node->src[1];
        parallel_rows(threads, rows_of(x), x->ne[0], [=](int64_t i) {
            const RowIndex at(x, i);
            const float *from = row(x, at);
            char *to = node->data + number(where, at.i1, at.i2, at.i3) * node->nb[1] + at.i2 * node->nb[2] + at.i3 * node->nb[3];
            if (node->type == F32) std::memcpy(to, from, x->ne[0] * sizeof(float));
            else
                for (int64_t k = 0; k < x->ne[0]; k += LANES) narrow((half *)to + k, load(from + k));
        });
    }
};

// Each matrix of the first operand has its own list.
struct GetRows {
    static constexpr const char *NAME = "GET_ROWS";
    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *which = node->src[1];
        return dense_floats(node) && dense_floats(x) && are_numbers(which) && x->ne[2] == which->ne[1] &&
               x->ne[3] == which->ne[2] && which->ne[3] == 1;
    }
    static void compute(const Tensor *node, int threads) {
        const Tensor *x = node->src[0], *which = node->src[1];
        // Rows are cut into pieces, because a recurrent state of a megabyte is one row.
        const int64_t length = x->ne[0], size = std::min(length, PART), pieces = length ? (length + size - 1) / size : 0;
        parallel_rows(threads, rows_of(node) * pieces, size, [=](int64_t piece) {
            const RowIndex at(node, piece / pieces);
            const int64_t first = piece % pieces * size;
            const char *from = x->data + number(which, at.i1, at.i2, at.i3) * x->nb[1] + at.i2 * x->nb[2] + at.i3 * x->nb[3];
            std::memcpy(row(node, at) + first, (const float *)from + first, std::min(size, length - first) * sizeof(float));
        });
    }
};

}  // namespace
}  // namespace elementwise

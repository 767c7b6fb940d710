// Attention. The bits of a query's output do not depend on the other queries of the pass.
//
// llama.cpp has several attention kernels, chooses one by the shape of the pass, and they add in different orders. Here the
// operations of a query and their order are fixed: keys in blocks of 64 from the first cell of the KV cache, each score a
// running sum over the elements of the head, each output a running sum over the cells. The tile of queries changes only which
// queries share the unpacking of a block.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.hpp"
#include "parallel.hpp"
#include "ggml.hpp"

namespace attention {
namespace {

constexpr int BLOCK = 64, MOST_ROWS = 128;
constexpr int MANY = WIDE > LANES ? 6 : 4, FEW = WIDE > LANES ? 4 : 2;  // queries and vectors with sums that fit the registers

// ---- vectors

// `value` in lanes where x is a number, else x. `exponential` and `larger` would hide NaNs.
inline wide unless_nan(wide x, wide value) { return x == x ? value : x; }

inline wide hyperbolic_tangent(wide x) {
    const wide most = all<wide>(20.0f), bounded = x > most ? most : larger(x, -most);
    return unless_nan(x, 1.0f - 2.0f / (exponential(2.0f * bounded) + 1.0f));
}

// Transposes a matrix of eight by eight.
inline void transpose(f8 (&r)[LANES]) {
    f8 a[LANES], b[LANES];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = SHUFFLE(a[4 * i + j], a[4 * i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[4 * i + 2 * j + 1] = SHUFFLE(a[4 * i + j], a[4 * i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        r[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// ---- one operation

// The operands and parameters of one operation. Shapes: queries [head, token, query head, stream], keys and values [head, cell,
// head, stream], mask [cell, token, 1 or query head, 1 or stream], sinks [query head], output [head, query head, token, stream].
struct Attention {
    const Tensor *q, *k, *v, *mask, *sinks, *out;
    int64_t tokens, cells, group;  // group: query heads that share one head of keys
    int dk, dv;
    float scale, steepness, cap, base0, base1;
    uint32_t flat_heads;

    explicit Attention(const Tensor *node)
        : q(node->src[0]),
          k(node->src[1]),
          v(node->src[2]),
          mask(node->src[3]),
          sinks(node->src[4]),
          out(node),
          tokens(q->ne[1]),
          cells(k->ne[1]),
          group(q->ne[2] / k->ne[2]),
          dk((int)k->ne[0]),
          dv((int)v->ne[0]) {
        float given[3];
        std::memcpy(given, node->params, sizeof given);
        scale = given[0], steepness = given[1], cap = given[2];
        if (cap != 0) scale /= cap;
        flat_heads = 1u << (uint32_t)std::floor(std::log2((double)q->ne[2]));
        base0 = std::pow(2.0f, -steepness / flat_heads);
        base1 = std::pow(2.0f, -steepness / 2 / flat_heads);
    }

    // The factor of a head for the values of the mask (ALiBi).
    float slope(int64_t head) const {
        if (steepness <= 0) return 1;
        const uint32_t h = (uint32_t)head;
        return h < flat_heads ? std::pow(base0, h + 1) : std::pow(base1, 2 * (h - flat_heads) + 1);
    }

    float sink(int64_t head) const { return ((const float *)sinks->data)[head]; }

    const half *mask_of(int64_t token, int64_t head, int64_t stream) const {
        if (!mask) return nullptr;
        return (const half *)(mask->data + token * mask->nb[1] + head % mask->ne[2] * mask->nb[2] +
                              stream % mask->ne[3] * mask->nb[3]);
    }
};

// Buffers of one thread, kept from one operation to the next.
struct Scratch {
    std::vector<float> memory;
    float *keys, *values, *scores, *sums;  // keys [dk][BLOCK], values [BLOCK][dv], scores [row][BLOCK], sums [row][dv]

    void fit(int dk, int dv) {
        const size_t parts[] = {(size_t)dk * BLOCK, (size_t)BLOCK * dv, (size_t)MOST_ROWS * BLOCK, (size_t)MOST_ROWS * dv};
        const size_t all = parts[0] + parts[1] + parts[2] + parts[3];
        if (memory.size() < all) memory.resize(all);
        keys = memory.data(), values = keys + parts[0], scores = values + parts[1], sums = scores + parts[2];
    }
};

// ---- a block of keys and values

// Cells beyond the end of the KV cache are read as zeros; `masked` hides them.
void unpack_keys(float *to, const char *from, size_t stride, int dk, int cells) {
    static const half nothing[LANES] = {};
    for (int cell = 0; cell < BLOCK; cell += LANES) {
        for (int d = 0; d < dk; d += LANES) {
            f8 rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = widen(cell + i < cells ? (const half *)(from + (cell + i) * stride) + d : nothing);
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(to + (d + i) * BLOCK + cell, rows[i]);
        }
    }
}

void unpack_values(float *to, const char *from, size_t stride, int dv, int cells) {
    for (int cell = 0; cell < cells; cell++) {
        const half *row = (const half *)(from + cell * stride);
        int d = 0;
        for (; d + WIDE <= dv; d += WIDE) store(to + cell * dv + d, widen_all(row + d));
        for (; d < dv; d += LANES) store(to + cell * dv + d, widen(row + d));
    }
    std::memset(to + cells * dv, 0, sizeof(float) * (BLOCK - cells) * dv);
}

// Scores of ROWS queries with the keys of a block: running sums over the elements of the head, from the first.
template <int ROWS, int COLUMNS>
void multiply(float *scores, const float *const *queries, const float *keys, int dk) {
    for (int cell = 0; cell < BLOCK; cell += COLUMNS * WIDE) {
        wide sums[ROWS][COLUMNS] = {};
        for (int d = 0; d < dk; d++) {
            for (int c = 0; c < COLUMNS; c++) {
                const wide key = load<wide>(keys + d * BLOCK + cell + c * WIDE);
                for (int r = 0; r < ROWS; r++) sums[r][c] = fused(all<wide>(queries[r][d]), key, sums[r][c]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) store(scores + r * BLOCK + cell + c * WIDE, sums[r][c]);
    }
}

void multiply_all(float *scores, const float *const *queries, const float *keys, int dk, int count) {
    int i = 0;
    for (; i + MANY <= count; i += MANY) multiply<MANY, FEW>(scores + i * BLOCK, queries + i, keys, dk);
    for (; i + 2 <= count; i += 2) multiply<2, 4>(scores + i * BLOCK, queries + i, keys, dk);
    for (; i < count; i++) multiply<1, 4>(scores + i * BLOCK, queries + i, keys, dk);
}

// A query's weights in a block, the factor for its running sums, and the sums.
struct BlockWeights {
    const float *weights;
    float factor;
    float *sums;
};

// Adds the values, times the weights of ROWS queries, to their running sums, from the first cell to the last. With SKIP cells
// of weight 0 are left out: 0 times an infinity or a NaN is NaN, and a masked cell can hold such values of another request.
// Finite values give the same sums with and without SKIP.
template <bool SKIP, class V, int ROWS, int COLUMNS>
void weigh(const BlockWeights *blocks, const float *values, int dv, int d) {
    constexpr int WIDTH = sizeof(V) / sizeof(float);
    V total[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) total[r][c] = load<V>(blocks[r].sums + d + c * WIDTH) * blocks[r].factor;
    for (int cell = 0; cell < BLOCK; cell++) {
        for (int c = 0; c < COLUMNS; c++) {
            const V value = load<V>(values + cell * dv + d + c * WIDTH);
            for (int r = 0; r < ROWS; r++) {
                if (SKIP && blocks[r].weights[cell] == 0) continue;
                total[r][c] = fused(all<V>(blocks[r].weights[cell]), value, total[r][c]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) store(blocks[r].sums + d + c * WIDTH, total[r][c]);
}

template <bool SKIP, int ROWS>
void weigh_rows(const BlockWeights *blocks, const float *values, int dv) {
    int d = 0;
    for (; d + FEW * WIDE <= dv; d += FEW * WIDE) weigh<SKIP, wide, ROWS, FEW>(blocks, values, dv, d);
    for (; d < dv; d += LANES) weigh<SKIP, f8, ROWS, 1>(blocks, values, dv, d);
}

template <bool SKIP>
void weigh_all(const BlockWeights *blocks, const float *values, int dv, int count) {
    int i = 0;
    for (; i + MANY <= count; i += MANY) weigh_rows<SKIP, MANY>(blocks + i, values, dv);
    for (; i + 2 <= count; i += 2) weigh_rows<SKIP, 2>(blocks + i, values, dv);
    for (; i < count; i++) weigh_rows<SKIP, 1>(blocks + i, values, dv);
}

// ---- a tile of queries over all blocks

struct Query {
    const float *elements;
    const half *mask;
    float slope, highest;
    f8 total;     // the running sum of the weights, in lanes
    bool masked;  // whether the scores of the current block need `masked`
};

// A query before the first block. A sink is a score of its head that has no value: it enters the maximum and the total only.
Query begin(const Attention &op, const float *elements, int64_t token, int64_t head, int64_t stream) {
    Query query = {elements, op.mask_of(token, head, stream), op.slope(head), -INFINITY, all(0), true};
    if (!op.sinks) return query;
    query.highest = op.sink(head);
    query.total[0] = query.highest < INFINITY ? 1 : NAN;  // `fmax` and `exponential` would hide a sink that is NaN
    return query;
}

// Which cells of a block a query does not see: all; none, and the mask leaves the scores as they are; or anything else, such as
// a block that the end of the KV cache cuts.
enum Hidden { ALL, SOME, NONE };

// A window hides most blocks, and blocks before a prompt's last one are shown, so whole blocks are compared at once.
Hidden hidden_cells(const half *mask, int cells) {
    if (cells < BLOCK) {
        for (int i = 0; i < cells; i++)
            if (!mask || mask[i] != 0xfc00) return SOME;
        return ALL;
    }
    if (!mask) return NONE;
    half hidden = 0, shown = 0;
    for (int i = 0; i < BLOCK; i++) hidden |= mask[i], shown |= mask[i] ^ 0xfc00;
    return !hidden ? NONE : shown ? SOME : ALL;
}

// The rows of a tile that see any cell of a block. Query heads that share a mask are adjacent.
int rows_seeing(int *seeing, Query *queries, int count, int64_t cell, int cells) {
    int found = 0;
    Hidden hidden = ALL;
    for (int r = 0; r < count; r++) {
        const half *mask = queries[r].mask;
        if (!r || mask != queries[r - 1].mask) hidden = hidden_cells(mask ? mask + cell : nullptr, cells);
        queries[r].masked = hidden == SOME;
        if (hidden != ALL) seeing[found++] = r;
    }
    return found;
}

// Scores plus the mask times the slope. Where the mask is minus infinity so is the result, even if the score is not finite.
template <class V>
V with_mask(V mask, float slope, V scores) {
    return mask == all<V>(-INFINITY) ? mask : fused(mask, all<V>(slope), scores);
}

// The same for the scores of the cells from `cell` on. Cells from `here` on are beyond the end of the KV cache and get minus
// infinity.
wide masked(const Query &query, wide scores, int64_t cell, int here) {
    if (!query.masked || (here >= WIDE && !query.mask)) return scores;
    if (here >= WIDE) return with_mask(widen_all(query.mask + cell), query.slope, scores);
    for (int i = 0; i < WIDE; i++) {
        half one[LANES] = {i < here && query.mask ? query.mask[cell + i] : (half)0};
        scores[i] = i < here ? with_mask(widen(one), query.slope, all(scores[i]))[0] : -INFINITY;
    }
    return scores;
}

// Replaces the scores of a block by weights relative to the highest score so far. Returns the factor for the running sums.
float weights_of(Query &query, float *scores, int64_t cell, int cells, const Attention &op) {
    wide part[BLOCK / WIDE], most = all<wide>(-INFINITY);
    for (int i = 0; i < BLOCK / WIDE; i++) {
        wide x = load<wide>(scores + i * WIDE) * op.scale;
        if (op.cap != 0) x = op.cap * hyperbolic_tangent(x);
        part[i] = x = masked(query, x, cell + i * WIDE, cells - i * WIDE);
        most = larger(x, most);
    }
    const float highest = std::fmax(query.highest, largest(most));
    const float factor = highest == query.highest ? 1 : exponential(all(query.highest - highest))[0];
    query.highest = highest;
    f8 total{};
    for (int i = 0; i < BLOCK / WIDE; i++) {
        const wide below = part[i] - highest, weight = unless_nan(below, exponential(below));
        store(scores + i * WIDE, weight);
        add(total, weight);
    }
    query.total = fused(query.total, all(factor), total);
    return factor;
}

// Computes a tile of queries over all blocks. Returns whether all outputs are finite. See `weigh` for SKIP.
template <bool SKIP>
bool attend(const Attention &op, Scratch &scratch, int64_t stream, int64_t kv_head, int64_t first, int count) {
    Query queries[MOST_ROWS];
    for (int r = 0; r < count; r++) {
        const int64_t token = (first + r) / op.group, head = kv_head * op.group + (first + r) % op.group;
        const float *elements = (const float *)(op.q->data + token * op.q->nb[1] + head * op.q->nb[2] + stream * op.q->nb[3]);
        queries[r] = begin(op, elements, token, head, stream);
    }
    std::memset(scratch.sums, 0, sizeof(float) * count * op.dv);
    const char *keys = op.k->data + kv_head * op.k->nb[2] + stream * op.k->nb[3];
    const char *values = op.v->data + kv_head * op.v->nb[2] + stream * op.v->nb[3];
    for (int64_t cell = 0; cell < op.cells; cell += BLOCK) {
        const int cells = (int)(op.cells - cell < BLOCK ? op.cells - cell : BLOCK);
        int seeing[MOST_ROWS];
        const int seeing_count = rows_seeing(seeing, queries, count, cell, cells);
        if (!seeing_count) continue;
        unpack_keys(scratch.keys, keys + cell * op.k->nb[1], op.k->nb[1], op.dk, cells);
        unpack_values(scratch.values, values + cell * op.v->nb[1], op.v->nb[1], op.dv, cells);
        const float *elements[MOST_ROWS];
        for (int i = 0; i < seeing_count; i++) elements[i] = queries[seeing[i]].elements;
        multiply_all(scratch.scores, elements, scratch.keys, op.dk, seeing_count);
        BlockWeights blocks[MOST_ROWS];
        for (int i = 0; i < seeing_count; i++) {
            float *scores = scratch.scores + i * BLOCK;
            const float factor = weights_of(queries[seeing[i]], scores, cell, cells, op);
            blocks[i] = {scores, factor, scratch.sums + seeing[i] * op.dv};
        }
        weigh_all<SKIP>(blocks, scratch.values, op.dv, seeing_count);
    }
    f8 finite{};  // a sum of zeros, or NaN where an output is not finite
    for (int r = 0; r < count; r++) {
        const int64_t token = (first + r) / op.group, head = kv_head * op.group + (first + r) % op.group;
        float *out = (float *)(op.out->data + head * op.out->nb[1] + token * op.out->nb[2] + stream * op.out->nb[3]);
        const float total = sum(queries[r].total);
        const f8 part = all(total == 0 ? 0 : 1 / total);
        for (int d = 0; d < op.dv; d += LANES) {
            const f8 value = load(scratch.sums + r * op.dv + d) * part;
            finite += value * 0.0f;
            store(out + d, value);
        }
    }
    return sum(finite) == 0;
}

// The number of queries in a tile: as many as leave at least one tile for each thread. Later tiles see more cells, so large ones
// must leave several.
int tile(int64_t rows, int64_t heads, int threads) {
    int64_t size = MOST_ROWS;
    const auto tiles = [&] { return (rows + size - 1) / size * heads; };
    if (tiles() < 4 * threads) size /= 2;
    while (size > 1 && tiles() < threads) size /= 2;
    return (int)(size < rows ? size : rows);
}

void compute(const Tensor *node, int threads) {
    const Attention op(node);
    const int64_t rows = op.tokens * op.group, heads = op.k->ne[2], streams = op.q->ne[3];
    const int size = tile(rows, heads * streams, threads);
    const int64_t tiles = (rows + size - 1) / size, work = tiles * heads * streams;
    parallel_for(threads, work, [&](int64_t i) {
        static thread_local Scratch scratch;
        scratch.fit(op.dk, op.dv);
        // The last tiles see the most cells, so they begin first.
        const int64_t first = (tiles - 1 - i / (heads * streams)) * size, head = i % heads, stream = i / heads % streams;
        const int count = (int)(rows - first < size ? rows - first : size);
        if (!attend<false>(op, scratch, stream, head, first, count)) attend<true>(op, scratch, stream, head, first, count);
    });
}

// Whether this attention can be computed here.
bool supports(const Tensor *node) {
    const Tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3], *sinks = node->src[4];
    return node->type == F32 && q->type == F32 && k->type == F16 && v->type == F16 &&
           (!sinks || (sinks->type == F32 && rows_are_dense(sinks, 4) && sinks->ne[0] == q->ne[2])) &&
           (!mask || (mask->type == F16 && rows_are_dense(mask, 2))) && rows_are_dense(q, 4) && rows_are_dense(k, 2) &&
           rows_are_dense(v, 2) && k->ne[0] % LANES == 0 && v->ne[0] % LANES == 0 && q->ne[0] == k->ne[0] &&
           k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[3] == k->ne[3] &&
           q->ne[2] % k->ne[2] == 0 && node->ne[0] == v->ne[0];
}

}  // namespace
}  // namespace attention

// Products of weight matrices and activations. The bits of a column do not depend on the other columns.
//
// Each step of 32 elements is summed by itself (exactly, where its elements are integers). The sums of the steps are added, from
// the first to the last, to one running float for each row and column. So the order of additions depends neither on the
// number of columns or threads nor on the processor, and the same code multiplies one column and a thousand. A tile of rows,
// in the order of the file or packed (packing.hpp), is unpacked (weight_formats.hpp) and multiplied with all columns.
//
// The code needs instructions that multiply bytes: AVX2 and FMA, or Arm's dot products. Elsewhere `supports` returns false
// and ggml computes the products.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "parallel.hpp"
#include "ggml.hpp"

namespace products {
namespace {

// Whether a matrix holds weights of the model. ggml uses the same operation for products of two computed matrices, such as
// queries and keys.
bool of_model(const Tensor *matrix) { return !matrix->op && !matrix->view_src; }

}  // namespace
}  // namespace products

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_FEATURE_DOTPROD)
#include "prefetch.hpp"
#include "weight_formats.hpp"

namespace products {
namespace {

constexpr bool AVAILABLE = true;
constexpr int CHUNK = 16;    // steps that are unpacked before they are multiplied, at most; half of it is at least one block
constexpr int AHEAD = 8192;  // bytes between a packed weight and the address that is prefetched, for a single column
constexpr int64_t FAR_AHEAD = 1 << 19;  // bytes that a thread may prefetch before their product begins: half of a large cache
constexpr int MOST_COLUMNS = WIDE > LANES ? 8 : 4;  // multiplied together: their sums fit the registers

// A tile has one or two groups of rows. Two groups share the loads of activations; for a single column, which has few of them,
// one group is faster.
template <int TILES>
constexpr int ROWS = TILES *LANE_ROWS;

// The sums of a tile for some columns, in registers.
template <int TILES, int COLUMNS>
using Sums = Floats[COLUMNS][TILES];

// Adds a step of bytes: exact sums of integers, then their products with both scales.
template <class Type, int TILES, int COLUMNS>
inline void add_step(Sums<TILES, COLUMNS> &total, const ByteStep *weights, const BytePiece *const *columns, int s) {
    constexpr int FIT = PAIRS ? INT16_MAX / (2 * 127 * Type::MOST) : 0;  // vectors whose sums of two products fit 16 bits
    constexpr bool IN_PAIRS = !Type::HALVES && FIT >= STEP / 8, TWICE = FIT < STEP / 4;
    Bytes exact[COLUMNS][TILES], pairs[COLUMNS][TILES] = {};
    const auto start = [&](int half) {
        for (int c = 0; c < COLUMNS; c++) {
            const int32_t *halves = columns[c][s].halves;
            const int32_t sum = Type::HALVES ? halves[half] : halves[0] + halves[1];
            for (int t = 0; t < TILES; t++) exact[c][t] = Bytes{} - Type::EXCESS * sum;
        }
    };
    const auto finish = [&](int half) {
        for (int t = 0; t < TILES; t++)
            for (int c = 0; c < COLUMNS; c++) {
                const Floats part = to_floats(exact[c][t]) * weights[t].scales[half];
                total[c][t] = fused(part, all<Floats>(columns[c][s].scale), total[c][t]);
            }
    };
    const auto join = [&] {
        for (int c = 0; c < COLUMNS; c++)
            for (int t = 0; t < TILES; t++) exact[c][t] += join_pairs(pairs[c][t]), pairs[c][t] = Bytes{};
    };
    if (!IN_PAIRS) start(0);
#pragma GCC unroll 8
    for (int i = 0; i < STEP / 4; i++) {
        if (IN_PAIRS && TWICE && i == STEP / 8) start(0), join();
        if (Type::HALVES && i == STEP / 8) finish(0), start(1);
        for (int c = 0; c < COLUMNS; c++) {
            int32_t four;
            std::memcpy(&four, columns[c][s].elements + 4 * i, 4);
            for (int t = 0; t < TILES; t++)
                if (IN_PAIRS) pairs[c][t] = add_pairs(pairs[c][t], weights[t].weights[i], Bytes{} + four);
                else exact[c][t] = dot<Type::SIGNED>(exact[c][t], weights[t].weights[i], Bytes{} + four);
        }
    }
    if (IN_PAIRS && !TWICE) start(0);
    if (IN_PAIRS) join();
    finish(Type::HALVES);
    if (Type::LEAST)
        for (int t = 0; t < TILES; t++)
            for (int c = 0; c < COLUMNS; c++) total[c][t] = fused(-weights[t].least, all<Floats>(columns[c][s].sum), total[c][t]);
}

// Adds a step with integers as scales of its halves: the sum of both halves is exact.
template <class Type, int TILES, int COLUMNS>
inline void add_step(Sums<TILES, COLUMNS> &total, const UnitStep *weights, const BytePiece *const *columns, int s) {
    static_assert(!PAIRS || (STEP / 2 * Type::MOST + 16 * Type::EXCESS) * 127 <= INT16_MAX, "the sums of a half fit 16 bits");
    Bytes exact[COLUMNS][TILES] = {}, part[COLUMNS][TILES];
#pragma GCC unroll 8
    for (int i = 0; i < STEP / 4; i++) {
        const int half = i / (STEP / 8);
        for (int c = 0; c < COLUMNS; c++) {
            if (i % (STEP / 8) == 0)
                for (int t = 0; t < TILES; t++) part[c][t] = begin_half(-Type::EXCESS * columns[c][s].halves[half]);
            int32_t four;
            std::memcpy(&four, columns[c][s].elements + 4 * i, 4);
            for (int t = 0; t < TILES; t++) part[c][t] = add_to_half(part[c][t], weights[t].weights[i], Bytes{} + four);
        }
        if (i % (STEP / 8) == STEP / 8 - 1)
            for (int c = 0; c < COLUMNS; c++)
                for (int t = 0; t < TILES; t++) exact[c][t] += end_half(part[c][t], weights[t].units[half]);
    }
    for (int t = 0; t < TILES; t++)
        for (int c = 0; c < COLUMNS; c++) {
            Floats sum = to_floats(exact[c][t]) * weights[t].scale;
            if (Type::LEAST)
                sum = fused(-weights[t].least, to_floats(multiply_halves(weights[t].leasts, columns[c][s].halves)), sum);
            total[c][t] = fused(sum, all<Floats>(columns[c][s].scale), total[c][t]);
        }
}

// Adds a step of floats: its elements are summed one after the other, and this sum is added to the running float. So the error
// of a long sum grows more slowly.
template <class Type, int TILES, int COLUMNS>
inline void add_step(Sums<TILES, COLUMNS> &total, const Plain::Step *weights, const Plain::Piece *const *columns, int s) {
    Sums<TILES, COLUMNS> part = {};
    for (int i = 0; i < STEP; i++)
        for (int c = 0; c < COLUMNS; c++)
            for (int t = 0; t < TILES; t++)
                part[c][t] = fused(weights[t].weights[i], all<Floats>(columns[c][s].elements[i]), part[c][t]);
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) total[c][t] += part[c][t];
}

// Adds some steps to the sums in memory. `first`: the sums begin at 0.
template <class Type, int TILES, int COLUMNS>
void multiply(float *sums, const typename Type::Step *weights, const typename Type::Piece *const *columns, int steps, bool first,
              Prefetcher &prefetcher) {
    Sums<TILES, COLUMNS> total = {};
    for (int c = 0; c < COLUMNS && !first; c++)
        for (int t = 0; t < TILES; t++) total[c][t] = load<Floats>(sums + c * ROWS<TILES> + t * LANE_ROWS);
    for (int s = 0; s < steps; s++, weights += TILES) {
        prefetcher.fetch();
        add_step<Type, TILES, COLUMNS>(total, weights, columns, s);
    }
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) store(sums + c * ROWS<TILES> + t * LANE_ROWS, total[c][t]);
}

// The tiles of one thread, which follow each other in memory. A thread with an empty queue takes tiles from another's back.
class alignas(LINE) TileQueue {
    std::atomic<uint64_t> range{0};  // the first tile in the lower half, the end in the upper half

    template <class Change>
    bool take(Change change) {
        uint64_t seen = range;
        while ((uint32_t)seen < seen >> 32)
            if (range.compare_exchange_weak(seen, change(seen))) return true;
        return false;
    }

   public:
    void assign(int64_t first, int64_t end) { range = (uint64_t)end << 32 | (uint64_t)first; }

    // Takes an eighth of the tiles, so that other threads can still take some.
    bool take_front(int64_t &first, int64_t &end) {
        return take([&](uint64_t seen) {
            first = (uint32_t)seen;
            const int64_t count = (int64_t)(seen >> 32) - first;
            end = first + (count + 7) / 8;
            return seen + (uint64_t)(end - first);
        });
    }

    bool take_back(int64_t &tile) {
        return take([&](uint64_t seen) { return tile = (seen >> 32) - 1, seen - ((uint64_t)1 << 32); });
    }
};

// Buffers of one thread, kept from one product to the next.
template <class Type, int TILES>
struct Scratch {
    alignas(64) typename Type::Step steps[CHUNK][TILES];
    std::vector<float> sums;  // [column][ROWS]
    std::vector<char> rows;   // a padded copy of the last tile, if the matrix ends within it
};

// One column of a product: its activations, and where its results are written.
template <class Type>
struct Column {
    const typename Type::Piece *pieces;
    char *out;
};

// The operands and the result of one product: `count` columns of `steps` pieces each.
template <class Type, class Rows>
struct Product {
    const char *weights;
    size_t stride;
    int64_t rows, steps, count;
    const Column<Type> *columns;

    static constexpr bool PACKED = std::is_same_v<Rows, Packed>;

    // Block `block` of each row of a group.
    Rows group(const char *first, int64_t block) const {
        if constexpr (PACKED) return {first + block * Type::BYTES * LANE_ROWS};
        else return {first + block * Type::BYTES, stride};
    }

    // `count` rows from `row` on. Where a matrix in file order has fewer, `copy` holds them, padded with zeros. Packed matrices are
    // padded already.
    const char *tile(int64_t row, int64_t count, std::vector<char> &copy) const {
        const char *first = weights + row * stride;
        if (PACKED || rows - row >= count) return first;
        copy.assign(count * stride, 0);
        std::memcpy(copy.data(), first, (rows - row) * stride);
        return copy.data();
    }
};

template <class Type, class Rows, int TILES, int COLUMNS>
int64_t multiply_some(const Product<Type, Rows> &op, Scratch<Type, TILES> &scratch, int64_t column, int64_t step, int steps,
                      Prefetcher &prefetcher) {
    for (; column + COLUMNS <= op.count; column += COLUMNS) {
        const typename Type::Piece *columns[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) columns[c] = op.columns[column + c].pieces + step;
        multiply<Type, TILES, COLUMNS>(scratch.sums.data() + column * ROWS<TILES>, scratch.steps[0], columns, steps, step == 0,
                                       prefetcher);
    }
    return column;
}

// Multiplies the rows of a tile with few columns, which is bounded by memory. A block is unpacked into registers and multiplied at
// once, so that the loads of weights are spread evenly.
template <class Type, class Rows, int TILES, int COLUMNS>
void multiply_few(const Product<Type, Rows> &op, const char *rows, float *sums, Prefetcher prefetcher) {
    const typename Type::Piece *columns[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) columns[c] = op.columns[c].pieces;
    Sums<TILES, COLUMNS> total = {};
    for (int64_t step = 0; step < op.steps; step += Type::STEPS) {
        typename Type::Step weights[Type::STEPS][TILES];
        for (int s = 0; s < Type::STEPS; s++) prefetcher.fetch(true);
        for (int t = 0; t < TILES; t++)
            Type::unpack(op.group(rows + t * LANE_ROWS * op.stride, step / Type::STEPS), &weights[0][t], TILES);
        for (int s = 0; s < Type::STEPS; s++) {
            prefetcher.fetch(true);
            add_step<Type, TILES, COLUMNS>(total, weights[s], columns, (int)step + s);
        }
    }
    for (int c = 0; c < COLUMNS; c++)
        for (int t = 0; t < TILES; t++) store(sums + c * ROWS<TILES> + t * LANE_ROWS, total[c][t]);
}

// Multiplies the rows of a tile with all columns. They are unpacked once for all of them, some steps at a time.
template <class Type, class Rows, int TILES>
void multiply_many(const Product<Type, Rows> &op, const char *rows, Scratch<Type, TILES> &scratch, const char *next, int64_t lines) {
    // Where one group of columns is all, memory bounds the product: shorter chunks spread the prefetches more evenly.
    const int most = (op.count > MOST_COLUMNS ? CHUNK : CHUNK / 2) / Type::STEPS;
    const int64_t blocks = op.steps / Type::STEPS, groups = (op.count + MOST_COLUMNS - 1) / MOST_COLUMNS;
    Prefetcher prefetcher{next, (int)((lines + groups) / (groups + 1))};
    for (int64_t first = 0; first < blocks; first += most) {
        const int here = (int)(blocks - first < most ? blocks - first : most);
        for (int b = 0; b < here; b++) {
            for (int step = 0; step < Type::STEPS; step++) prefetcher.fetch();
            for (int t = 0; t < TILES; t++)
                Type::unpack(op.group(rows + t * LANE_ROWS * op.stride, first + b), &scratch.steps[b * Type::STEPS][t], TILES);
        }
        const int64_t step = first * Type::STEPS;
        const int steps = here * Type::STEPS;
        int64_t column = multiply_some<Type, Rows, TILES, MOST_COLUMNS>(op, scratch, 0, step, steps, prefetcher);
        column = multiply_some<Type, Rows, TILES, 4>(op, scratch, column, step, steps, prefetcher);
        column = multiply_some<Type, Rows, TILES, 2>(op, scratch, column, step, steps, prefetcher);
        multiply_some<Type, Rows, TILES, 1>(op, scratch, column, step, steps, prefetcher);
    }
}

// Multiplies one tile with all columns: one group of rows with a single column, two groups with more. `next`: the memory that is
// prefetched meanwhile.
template <class Type, class Rows, int TILES>
void multiply_tile(const Product<Type, Rows> &op, Scratch<Type, TILES> &scratch, int64_t number, const char *next) {
    constexpr int ROWS = products::ROWS<TILES>;
    const char *rows = op.tile(number * ROWS, ROWS, scratch.rows);
    const int64_t lines = (Type::BYTES * ROWS / Type::STEPS + LINE - 1) / LINE;  // cache lines of a step
    const Prefetcher few{next, (int)(lines + 1) / 2};
    float *sums = scratch.sums.data();
    if constexpr (TILES == 1) multiply_few<Type, Rows, TILES, 1>(op, rows, sums, few);
    else if (op.count == 2) multiply_few<Type, Rows, TILES, 2>(op, rows, sums, few);
    else if (op.count == 3) multiply_few<Type, Rows, TILES, 3>(op, rows, sums, few);
    else if (op.count == 4) multiply_few<Type, Rows, TILES, 4>(op, rows, sums, few);
    else multiply_many<Type, Rows, TILES>(op, rows, scratch, next, lines);
    const int64_t left = op.rows - number * ROWS, count = left < ROWS ? left : ROWS;
    for (int64_t column = 0; column < op.count; column++) {
        char *to = op.columns[column].out + number * ROWS * sizeof(float);
        const float *sums = &scratch.sums[column * ROWS];
        if (count == ROWS) std::memcpy(to, sums, ROWS * sizeof(float));  // a constant size
        else std::memcpy(to, sums, count * sizeof(float));
    }
}

// This thread's buffers, with sums for `count` columns.
template <class Type, int TILES>
Scratch<Type, TILES> &scratch_for(int64_t count) {
    static thread_local Scratch<Type, TILES> scratch;
    if ((int64_t)scratch.sums.size() < count * ROWS<TILES>) scratch.sums.resize(count * ROWS<TILES>);
    return scratch;
}

// The first tile of a thread's share.
inline int64_t first_tile_of(int64_t tiles, int64_t thread, int64_t threads) { return tiles * thread / threads; }

// Divides the tiles among the queues of `threads` threads, which are used by one product at a time.
std::vector<TileQueue> &queues_of(int64_t tiles, int threads) {
    static std::vector<TileQueue> queues;
    if (queues.size() != (size_t)threads) queues = std::vector<TileQueue>(threads);
    for (int64_t i = 0; i < threads; i++)
        queues[i].assign(first_tile_of(tiles, i, threads), first_tile_of(tiles, i + 1, threads));
    return queues;
}

// Calls `multiply` with the tiles of a thread's queue, then with tiles from the other queues.
template <class Do>
void take_tiles(std::vector<TileQueue> &queues, size_t thread, const Do &multiply) {
    int64_t tile, end;
    while (queues[thread].take_front(tile, end))
        for (; tile < end; tile++) multiply(tile);
    for (TileQueue &other : queues)
        while (other.take_back(tile)) multiply(tile);
}

// Remembers which matrix was multiplied after which, to prefetch the next one.
class NextWeights {
    struct Matrix {
        const char *weights;
        int64_t tiles, size;
        const Matrix *next;
    };
    std::unordered_map<const char *, Matrix> matrices;
    Matrix *last = nullptr;

   public:
    // Records that these weights are multiplied now. Returns a function: the range that each thread prefetches afterwards.
    auto after(const char *weights, int64_t tiles, int64_t size, int threads) {
        Matrix &now = matrices[weights];
        now = {weights, tiles, size, now.next};
        if (last) last->next = &now;
        last = &now;
        return [threads, next = now.next](int64_t thread) {
            if (!next) return MemoryRange{};
            const char *first = next->weights + first_tile_of(next->tiles, thread, threads) * next->size;
            const char *end = next->weights + first_tile_of(next->tiles, thread + 1, threads) * next->size;
            return MemoryRange{first, end - first > FAR_AHEAD ? first + FAR_AHEAD : end};
        };
    }
};

NextWeights next_weights;  // used by one product at a time

template <int TILES, class Type, class Rows>
void multiply_all(const Product<Type, Rows> &op, int threads) {
    const int64_t tiles = (op.rows + ROWS<TILES> - 1) / ROWS<TILES>;
    const size_t size = ROWS<TILES> * op.stride, ahead = op.PACKED && op.count == 1 ? AHEAD : size;
    std::vector<TileQueue> &queues = queues_of(tiles, threads);
    const auto next = next_weights.after(op.weights, tiles, size, threads);
    run_threads(threads, [&](int thread) {
        Scratch<Type, TILES> &scratch = scratch_for<Type, TILES>(op.count);
        take_tiles(queues, thread,
                   [&](int64_t tile) { multiply_tile<Type, Rows, TILES>(op, scratch, tile, op.weights + tile * size + ahead); });
        return next(thread);
    });
}

// The columns of activations or results, which recurrent layers arrange by sequence: (elements, tokens, sequences).
// `step`: bytes from one to the next, 0 if the columns have no constant distance.
struct Columns {
    int64_t count;
    size_t step;
};

Columns columns_of(const Tensor *t) {
    if (t->ne[2] == 1) return {t->ne[1], t->nb[1]};
    if (t->ne[1] == 1) return {t->ne[2], t->nb[2]};
    return {t->ne[1] * t->ne[2], t->nb[2] == t->ne[1] * t->nb[1] ? t->nb[1] : 0};
}

// Converts `count` columns of activations to pieces, `steps` for each. `at(i)`: the address of column i.
template <class Type, class At>
const typename Type::Piece *prepare_columns(int64_t count, int64_t steps, int threads, const At &at) {
    static std::vector<typename Type::Piece> pieces;  // used by one product at a time
    pieces.resize(steps * count);
    parallel_for(count > 1 ? threads : 1, count, [&](int64_t i) {
        const float *from = (const float *)at(i);
        for (int64_t step = 0; step < steps; step++) Type::prepare(from + step * STEP, pieces[i * steps + step]);
    });
    return pieces.data();
}

// `count` columns of this type, used by one product at a time.
template <class Type>
Column<Type> *columns_for(int64_t count) {
    static std::vector<Column<Type>> columns;
    columns.resize(count);
    return columns.data();
}

template <class Type, class Rows>
void compute_type(const Tensor *node, int threads) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    const Columns from = columns_of(x), to = columns_of(node);
    const int64_t steps = x->ne[0] / STEP, count = from.count;
    if (count == 0) return;  // a pass without outputs
    const auto *pieces = prepare_columns<Type>(count, steps, threads, [=](int64_t i) { return x->data + i * from.step; });
    Column<Type> *const columns = columns_for<Type>(count);
    for (int64_t i = 0; i < count; i++) columns[i] = {pieces + i * steps, node->data + i * to.step};
    const Product<Type, Rows> op{weights->data, weights->nb[1], weights->ne[1], steps, count, columns};
    if (count > 1) multiply_all<2>(op, threads);
    else multiply_all<1>(op, threads);
}

// Whether this product can be computed here.
bool supports(const Tensor *node) {
    const Tensor *weights = node->src[0], *x = node->src[1];
    if (node->type != F32 || x->type != F32 || !rows_are_dense(x, 4) || !rows_are_dense(node, 4)) return false;
    if (weights->ne[2] != 1 || weights->ne[3] != 1 || x->ne[3] != 1) return false;
    if (!columns_of(x).step || !columns_of(node).step) return false;
    if (!of_model(weights) || x->ne[0] % STEP) return false;
    return KnownTypes::find(weights->type, [](auto) {});
}

// `packed`: the weights are in the order that `pack` writes.
void compute(const Tensor *node, int threads, bool packed) {
    KnownTypes::find(node->src[0]->type, [=](auto type) {
        if (packed) compute_type<decltype(type), Packed>(node, threads);
        else compute_type<decltype(type), InFile>(node, threads);
    });
}

// Bytes of a packed matrix. Its rows are padded to whole tiles.
size_t packed_size(const Tensor *weights) {
    const int64_t rows = weights->ne[1] * weights->ne[2] * weights->ne[3];
    return (rows + ROWS<2> - 1) / ROWS<2> * ROWS<2> * weights->nb[1];
}

// Calls `use` with the packing of a matrix and the bytes of a block.
template <class Do>
void with_packing(const Tensor *weights, Do use) {
    KnownTypes::find(weights->type, [=](auto type) {
        using Type = decltype(type);
        use(Packing<Type>{weights->data, (int64_t)weights->nb[1] / Type::BYTES}, Type::BYTES);
    });
}

// Packs whole blocks. `file` holds `size` bytes of the matrix from `offset` on, in the order of the file.
void pack(const Tensor *weights, const char *file, size_t offset, size_t size, int threads) {
    with_packing(weights, [=](auto packing, size_t block) {
        packing.pack(const_cast<char *>(file), offset / block, size / block, threads);
    });
}

// Writes such blocks to `file`.
void unpack(const Tensor *weights, char *file, size_t offset, size_t size) {
    with_packing(weights, [=](auto packing, size_t block) { packing.unpack(file, offset / block, size / block); });
}

}  // namespace
}  // namespace products

#else

namespace products {
namespace {

constexpr bool AVAILABLE = false;
bool supports(const Tensor *) { return false; }
void compute(const Tensor *, int, bool) {}
size_t packed_size(const Tensor *) { return 0; }
void pack(const Tensor *, const char *, size_t, size_t, int) {}
void unpack(const Tensor *, char *, size_t, size_t) {}

}  // namespace
}  // namespace products

#endif

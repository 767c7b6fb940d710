// The operations of recurrent layers: the short convolution over a sequence's last tokens, and the gated delta net, whose state is
// one matrix for each head and sequence.
//
// A token is computed after the ones before it, with the same operations in the same order in a prompt and alone. So a state
// depends neither on the number of tokens in a pass nor on the other sequences.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "activations.hpp"
#include "copies.hpp"
#include "elementwise.hpp"
#include "ggml.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace recurrence {
namespace {

using copies::is_contiguous, elementwise::dense_floats, elementwise::parallel_rows;

// Whether the parameters from `first` on are zero. A later ggml may give these operations parameters that are not known here.
bool has_no_parameters(const Tensor *node, int first) {
    return std::all_of(node->params + first, std::end(node->params), [](int32_t x) { return x == 0; });
}

// ---- the convolution: each channel's sum over the last elements, one for each tap

// First operand F32 (taps - 1 + tokens, channels, sequences), second F32 (taps, channels), result F32 (channels, tokens,
// sequences).
struct Convolution {
    static constexpr const char *NAME = "SSM_CONV";
    static constexpr int64_t MOST_TAPS = 16, TOKENS = 48;  // TOKENS: computed at a time

    static bool supports(const Tensor *node) {
        const Tensor *x = node->src[0], *weights = node->src[1];
        return has_no_parameters(node, 0) && dense_floats(node) && dense_floats(x) && dense_floats(weights) &&
               weights->ne[0] <= MOST_TAPS && weights->ne[1] == node->ne[0] &&
               x->ne[0] == weights->ne[0] - 1 + node->ne[1] && x->ne[1] == node->ne[0] && x->ne[2] == node->ne[2] && x->ne[3] == 1 && node->ne[3] == 1;
    }

    static void compute(const Tensor *node, int threads) {
        const int64_t groups = (node->ne[0] + WIDE - 1) / WIDE;
        parallel_rows(threads, groups, WIDE * node->ne[1] * node->ne[2], [=](int64_t i) { compute_channels(node, i * WIDE); });
    }

   private:
    // The elements from `first` on of up to `WIDE` rows, one row to a lane.
    static void read_lanes(const char *rows, size_t stride, int64_t lanes, int64_t first, int64_t count, float (*to)[WIDE]) {
        for (int64_t lane = 0; lane < lanes; lane++) {
            const float *from = (const float *)(rows + lane * stride) + first;
            for (int64_t k = 0; k < count; k++) to[k][lane] = from[k];
        }
    }

    static void compute_channels(const Tensor *node, int64_t channel) {
        const Tensor *x = node->src[0], *weights = node->src[1];
        const int64_t taps = weights->ne[0], tokens = node->ne[1], lanes = std::min<int64_t>(WIDE, node->ne[0] - channel);
        float factors[MOST_TAPS][WIDE], read[MOST_TAPS + TOKENS][WIDE];
        if (lanes < WIDE) std::memset(factors, 0, sizeof factors), std::memset(read, 0, sizeof read);
        read_lanes(weights->data + channel * weights->nb[1], weights->nb[1], lanes, 0, taps, factors);
        for (int64_t sequence = 0; sequence < node->ne[2]; sequence++)
            for (int64_t first = 0; first < tokens; first += TOKENS) {
                const int64_t count = std::min(TOKENS, tokens - first);
                read_lanes(x->data + channel * x->nb[1] + sequence * x->nb[2], x->nb[1], lanes, first, taps - 1 + count, read);
                char *to = node->data + channel * sizeof(float) + first * node->nb[1] + sequence * node->nb[2];
                for (int64_t token = 0; token < count; token++, to += node->nb[1]) {
                    wide sum{};
                    for (int64_t tap = 0; tap < taps; tap++)
                        sum = fused(load<wide>(read[token + tap]), load<wide>(factors[tap]), sum);
                    if (lanes == WIDE) store((float *)to, sum);
                    else std::memcpy(to, &sum, lanes * sizeof(float));
                }
            }
    }
};

// ---- the gated delta net

// Sixteen elements: as many lanes on every machine, because sums are kept in them.
constexpr int SUMS = 16, PARTS = SUMS / WIDE;
struct Sixteen {
    wide part[PARTS] = {};
};

inline Sixteen load_sixteen(const float *from) {
    Sixteen x;
    for (int i = 0; i < PARTS; i++) x.part[i] = load<wide>(from + i * WIDE);
    return x;
}

inline void add_products(Sixteen &sums, const Sixteen &a, const Sixteen &b) {
    for (int i = 0; i < PARTS; i++) sums.part[i] = fused(a.part[i], b.part[i], sums.part[i]);
}

inline float total(const Sixteen &x) {
#ifdef __AVX512F__
    const __m512d bits = (__m512d)x.part[0];
    return sum((f8)_mm512_castpd512_pd256(bits) + (f8)_mm512_extractf64x4_pd(bits, 1));
#else
    return sum(x.part[0] + x.part[1]);
#endif
}

// Where the states of sequences are: the first one's address, and the distance of the next in bytes.
struct States {
    char *first;
    size_t stride;
    float *of(int64_t sequence) const { return (float *)(first + sequence * stride); }
};

// A row of the state belongs to an element of the values: s. For each token with the keys k, queries q, values v, decay g and rate b:
//   change = (v - sum(s * g * k)) * b;  s = s * g + k * change;  result = sum(s * q) / root(length)
// The last sum is computed as sum(s * g * q) + change * sum(k * q) with the state before the token, so that a row is read once for
// both sums.
class DeltaNet {
    static constexpr int64_t LONGEST = 256, TOKENS = 16;  // elements of a row; tokens that are computed at a time
    static constexpr int TOGETHER = WIDE == SUMS ? 4 : 2;  // rows whose sums are kept in registers

    // What all rows of a head need for one token.
    struct Token {
        float decay[LONGEST], decayed_keys[LONGEST], decayed_queries[LONGEST];
        float keys_with_queries, rate;
        const float *keys, *values;
        float *results;
    };

    // e to the power of g. A NaN stays one.
    template <class V>
    static V decay_of(V g) {
        const V power = activations::limited_power(g);
        return g == g ? power : g;
    }

    static const float *at(const Tensor *x, int64_t head, int64_t token, int64_t sequence) {
        return (const float *)(x->data + head * x->nb[1] + token * x->nb[2] + sequence * x->nb[3]);
    }

    static void prepare(const Tensor *node, int64_t head, int64_t token, int64_t sequence, Token &to) {
        const Tensor *queries = node->src[0], *keys = node->src[1], *values = node->src[2], *decays = node->src[3];
        const int64_t length = values->ne[0], heads = values->ne[1];
        const auto shared = [&](const Tensor *x) {  // several heads, and several sequences, may share keys and queries
            return at(x, head % x->ne[1], token, sequence / (values->ne[3] / x->ne[3]));
        };
        const float *query = shared(queries), *decay = at(decays, head, token, sequence);
        to.keys = shared(keys), to.values = at(values, head, token, sequence);
        to.rate = *at(node->src[4], head, token, sequence);
        to.results = (float *)node->data + ((sequence * values->ne[2] + token) * heads + head) * length;
        const bool one = decays->ne[0] == 1;
        const wide all_decays = all<wide>(decay_of(all<f8>(*decay))[0]);
        Sixteen sums;
        for (int64_t k = 0; k < length; k += WIDE) {
            const wide factor = one ? all_decays : decay_of(load<wide>(decay + k));
            const wide key = load<wide>(to.keys + k), q = load<wide>(query + k);
            store(to.decay + k, factor), store(to.decayed_keys + k, key * factor), store(to.decayed_queries + k, q * factor);
            wide &part = sums.part[k / WIDE % PARTS];
            part = fused(key, q, part);
        }
        to.keys_with_queries = total(sums);
    }

    // Computes `TOGETHER` rows from `row` on for one token. `from` and `to`: the rows, which may be the same.
    static void advance(const float *from, float *to, int64_t length, const Token &token, int64_t row, float scale) {
        Sixteen with_keys[TOGETHER], with_queries[TOGETHER];
        for (int64_t k = 0; k < length; k += SUMS) {
            const Sixteen keys = load_sixteen(token.decayed_keys + k), queries = load_sixteen(token.decayed_queries + k);
            for (int i = 0; i < TOGETHER; i++) {
                const Sixteen state = load_sixteen(from + i * length + k);
                add_products(with_keys[i], state, keys), add_products(with_queries[i], state, queries);
            }
        }
        float change[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            change[i] = (token.values[row + i] - total(with_keys[i])) * token.rate;
            token.results[row + i] = fused(change[i], token.keys_with_queries, total(with_queries[i])) * scale;
        }
        for (int64_t k = 0; k < length; k += WIDE) {
            const wide keys = load<wide>(token.keys + k), decay = load<wide>(token.decay + k);
            for (int i = 0; i < TOGETHER; i++)
                store(to + i * length + k, fused(keys, all<wide>(change[i]), load<wide>(from + i * length + k) * decay));
        }
    }

   public:
    static constexpr const char *NAME = "GATED_DELTA_NET";

    static bool supports(const Tensor *node) {
        const Tensor *queries = node->src[0], *keys = node->src[1], *values = node->src[2], *decays = node->src[3];
        const Tensor *rates = node->src[4], *states = node->src[5];
        const int64_t length = values->ne[0];
        const auto fits = [&](const Tensor *x) {
            return dense_floats(x) && x->ne[0] == length && x->ne[1] && x->ne[3] && values->ne[1] % x->ne[1] == 0 &&
                   x->ne[2] == values->ne[2] && values->ne[3] % x->ne[3] == 0;
        };
        return node->params[0] == 1 && has_no_parameters(node, 1) && length % SUMS == 0 && length <= LONGEST &&
               node->type == F32 && is_contiguous(node) && fits(queries) && fits(keys) && fits(values) && dense_floats(decays) && dense_floats(rates) && rates->ne[0] == 1 &&
               (decays->ne[0] == 1 || decays->ne[0] == length) && elementwise::same_rows(decays, values) &&
               elementwise::same_rows(rates, values) && states->type == F32 && is_contiguous(states) && states->ne[0] == length &&
               states->ne[1] == length && states->ne[2] == values->ne[1] && states->ne[3] == values->ne[3];
    }

    // The node's states: its operand, and the part of its result behind the results of tokens.
    static States read(const Tensor *node) { return {node->src[5]->data, node->src[5]->nb[3]}; }
    static States written(const Tensor *node) { return {node->data + result_bytes(node), node->src[5]->nb[3]}; }
    static size_t result_bytes(const Tensor *node) {
        const Tensor *values = node->src[2];
        return values->ne[0] * values->ne[1] * values->ne[2] * values->ne[3] * sizeof(float);
    }

    static void compute(const Tensor *node, int threads) { compute(node, threads, read(node), written(node)); }

    // `from` and `to` may be the same.
    static void compute(const Tensor *node, int threads, States from, States to) {
        const Tensor *values = node->src[2];
        const int64_t length = values->ne[0], heads = values->ne[1], tokens = values->ne[2], sequences = values->ne[3];
        const int64_t parts = threads > 1 && length % (4 * TOGETHER) == 0 ? 4 : 1, rows = length / parts;  // of a head
        const float scale = 1 / std::sqrt((float)length);
        parallel_for(threads, sequences * heads * parts, [=](int64_t item) {
            const int64_t part = item % parts, head = item / parts % heads, sequence = item / parts / heads;
            const int64_t place = (head * length + part * rows) * length;
            const float *source = from.of(sequence) + place;
            float *target = to.of(sequence) + place;
            Token block[TOKENS];
            for (int64_t first = 0; first < tokens; first += TOKENS) {
                const int64_t count = std::min(TOKENS, tokens - first);
                for (int64_t i = 0; i < count; i++) prepare(node, head, first + i, sequence, block[i]);
                for (int64_t row = 0; row < rows; row += TOGETHER)
                    for (int64_t i = 0; i < count; i++) {
                        const float *state = first + i ? target : source;
                        advance(state + row * length, target + row * length, length, block[i], part * rows + row, scale);
                    }
            }
        });
    }
};

}  // namespace
}  // namespace recurrence

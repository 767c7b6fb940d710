// Finds the delta nets of a graph that can compute their states where the cache holds them.
//
// llama.cpp copies a state twice beside computing it: GET_ROWS gathers the states of a pass's sequences, and CPY writes the new
// ones to consecutive rows of the cache. In a decode of 16 sequences these copies took longer than the states' computation. Most
// passes gather rows from the places to which they will write, because sequences keep their rows while the same ones are computed.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "copies.hpp"
#include "ggml.hpp"
#include "recurrence.hpp"

namespace state_cache {
namespace {

using recurrence::DeltaNet, recurrence::States;

// The nodes of a graph that differ from the usual computation.
class Plan {
    struct Net {
        States from, to;
    };
    const std::vector<const Tensor *> &nodes;
    std::unordered_map<const Tensor *, int> uses;  // how often a tensor is an operand in the graph
    std::unordered_map<int, Net> nets;             // by the number of the node
    std::vector<bool> skipped;

    static bool is_computed(const Tensor *node) { return node->flags & TO_COMPUTE; }

    int uses_of(const Tensor *tensor) const {
        const auto found = uses.find(tensor);
        return found == uses.end() ? 0 : found->second;
    }

    template <class Match>
    int next(int i, const Match &match) const {
        for (i++; i < (int)nodes.size() && !match(nodes[i]);) i++;
        return i < (int)nodes.size() ? i : -1;
    }
    int before(int i, const Tensor *node) const {
        for (i--; i >= 0 && nodes[i] != node;) i--;
        return i;
    }

    // Whether a node's elements are in memory from `first` to `end`.
    static bool overlaps(const Tensor *node, const char *first, const char *end) {
        size_t size = sizeof(float);
        for (int i = 0; i < 4; i++) {
            if (!node->ne[i]) return false;
            size += (node->ne[i] - 1) * node->nb[i];
        }
        return node->data < end && first < node->data + size;
    }

    // Whether a sequence's new state in the cache could replace memory from which the old state of another one is still to be read.
    static bool clash(const Tensor *net, const Tensor *copy) {
        const States from = DeltaNet::read(net);
        if (from.first == copy->data && from.stride == copy->nb[1]) return false;
        return overlaps(net->src[5], copy->data, copy->data + copy->ne[1] * copy->nb[1]);
    }

    // The node that copies the new states to the cache; -1 if anything but that copy may read them.
    template <class Named>
    int writer(int i, const Named &named) const {
        const Tensor *net = nodes[i];
        const size_t results = DeltaNet::result_bytes(net);
        const int write = next(i, [&](const Tensor *node) { return named(node); });
        if (write < 0 || !is_computed(nodes[write]) || named(nodes[write]) != copies::Copy::NAME) return -1;
        const Tensor *copy = nodes[write], *states = copy->src[0];
        if (states->view_src != net || states->view_offset != results || !copies::is_contiguous(states)) return -1;
        if (states->ne[0] * elementwise::rows_of(states) != net->src[5]->ne[0] * elementwise::rows_of(net->src[5])) return -1;
        if (copy->ne[1] != net->src[2]->ne[3] || copy->ne[2] != 1 || copy->ne[3] != 1) return -1;
        // Two views of the result: the states, which only the copy reads, and the results of tokens.
        const int other = next(i, [&](const Tensor *node) { return node->view_src == net && node != states; });
        if (uses_of(net) != 2 || uses_of(states) != 1 || other < 0) return -1;
        const char *end = net->data + results;
        return nodes[other]->src[0] == net && states->src[0] == net && !overlaps(nodes[other], end, end + 1) ? write : -1;
    }

    // The node that gathers the old states; -1 if they have another source or more readers, or a row is not where the new state of
    // the sequence will be.
    template <class Named>
    int gatherer(int i, const Tensor *copy, const Named &named) const {
        const Tensor *states = nodes[i]->src[5], *gather = states->view_src;
        if (!gather || states->src[0] != gather || states->view_offset) return -1;
        const int at = before(i, gather);
        if (at < 0 || !is_computed(gather) || named(gather) != elementwise::GetRows::NAME) return -1;
        if (uses_of(gather) != 1 || uses_of(states) != 1 || gather->ne[0] != copy->ne[0] || gather->ne[1] != copy->ne[1]) return -1;
        const Tensor *cache = gather->src[0];
        for (int64_t row = 0; row < copy->ne[1]; row++) {
            const char *from = cache->data + elementwise::number(gather->src[1], row) * cache->nb[1];
            if (from != copy->data + row * copy->nb[1]) return -1;
        }
        const char *end = copy->data + copy->ne[1] * copy->nb[1];
        for (int k = at + 1; k < i; k++)
            if (named(nodes[k]) && overlaps(nodes[k], copy->data, end)) return -1;
        return at;
    }

   public:
    // `named`: the name of the operation of this library that computes a node, the same pointer for the same operation; null if the
    // node only describes memory.
    template <class Named>
    Plan(const std::vector<const Tensor *> &nodes, const Named &named) : nodes(nodes) {
        const auto is_net = [&](const Tensor *node) { return is_computed(node) && named(node) == DeltaNet::NAME; };
        int i = next(-1, is_net);
        if (i < 0) return;
        skipped.resize(nodes.size());
        for (const Tensor *node : nodes)
            for (const Tensor *source : node->src)
                if (source) uses[source]++;
        for (; i >= 0; i = next(i, is_net)) {
            const int write = writer(i, named);
            if (write < 0) continue;
            const Tensor *copy = nodes[write];
            const States cache{copy->data, copy->nb[1]};
            const int gather = gatherer(i, copy, named);
            if (gather < 0 && clash(nodes[i], copy)) continue;
            nets[i] = {gather < 0 ? DeltaNet::read(nodes[i]) : cache, cache};
            skipped[write] = true;
            if (gather >= 0) skipped[gather] = true;
        }
    }

    bool skips(int i) const { return !skipped.empty() && skipped[i]; }

    // Computes a delta net with its states in the cache. Returns whether the node is one.
    bool compute(int i, int threads) const {
        const auto found = nets.find(i);
        if (found == nets.end()) return false;
        DeltaNet::compute(nodes[i], threads, found->second.from, found->second.to);
        return true;
    }
};

}  // namespace
}  // namespace state_cache

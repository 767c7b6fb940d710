// Prefetches weights into the caches. A pass reads the weights once.
//
// A non-temporal prefetch keeps weights from evicting from the caches what other code uses between two passes. Intel's processors
// bring such lines through the fill buffers of the first-level cache alone. These are too few for the latency of memory: a Xeon
// of the family Ice Lake read 10 instead of 20 GB/s. There, weights are prefetched into the second-level cache.
//
// Where a product is bounded by memory, Intel's processors prefetch the rest of a page by themselves, without the fill buffers. Then
// only the beginning of each page is prefetched here.

#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "parallel.hpp"

namespace products {
namespace {

inline bool is_intel() {
#ifdef __x86_64__
    unsigned most = 0, first = 0, third = 0, second = 0;
    return __get_cpuid(0, &most, &first, &third, &second) && first == signature_INTEL_ebx;
#else
    return false;
#endif
}

const bool NON_TEMPORAL = !is_intel();

constexpr uintptr_t PAGE = 4096, PAGE_HEAD = 512;  // bytes

// Prefetches `lines` cache lines at each step.
struct Prefetcher {
    const char *at;
    int lines;

    // `sparsely`: for a product that is bounded by memory.
    void fetch(bool sparsely = false) {
        for (int i = 0; i < lines; i++, at += LINE) {
            if (NON_TEMPORAL) __builtin_prefetch(at, 0, 0);
            else if (!sparsely || (uintptr_t)at % PAGE < PAGE_HEAD) __builtin_prefetch(at, 0, 1);
        }
    }
};

}  // namespace
}  // namespace products

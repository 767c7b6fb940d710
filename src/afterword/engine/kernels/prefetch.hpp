// Prefetches weights into the caches. A pass reads the weights once.
//
// A non-temporal prefetch keeps weights from evicting from the caches what other code uses between two passes. Intel's processors
// bring such lines through the fill buffers of the first-level cache alone. These are too few for the latency of memory: a Xeon
// of the family Ice Lake read 10 instead of 20 GB/s. There, weights are prefetched into the second-level cache.

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

// Prefetches `lines` cache lines at each step.
struct Prefetcher {
    const char *at;
    int lines;

    void fetch() {
        for (int i = 0; i < lines; i++, at += LINE) {
            if (NON_TEMPORAL) __builtin_prefetch(at, 0, 0);
            else __builtin_prefetch(at, 0, 1);
        }
    }
};

}  // namespace
}  // namespace products

// How work is shared between threads: those of a team (kernels/thread_pool.hpp), or OpenMP's.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <cstdint>

namespace {

constexpr int LINE = 64;  // bytes of a cache's line

// Memory to be read into a thread's cache. It may have been freed since: asking for it does nothing then.
struct MemoryRange {
    const char *at, *end;
};

// Calls `call` with `work` and 0, and with the numbers of as many other threads as come before that returns. So thread 0 does
// whatever no other has begun. What is returned is what that thread reads until the next call. With a count of 0 nothing is
// called, and others leave their cores until the next call.
using Run = void (*)(int count, MemoryRange (*call)(const void *, int), const void *work);

Run pool_run = nullptr;  // or OpenMP

inline int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls `work` in threads, as a `Run` does.
template <class Work>
void run_threads(int count, const Work &work) {
    if (count == 1) work(0);
    else if (pool_run) pool_run(count, [](const void *work, int thread) { return (*(const Work *)work)(thread); }, &work);
    else {
#ifdef _OPENMP
#pragma omp parallel num_threads(count)
#endif
        work(this_thread());
    }
}

// Calls `work` with each number below `count`.
template <class Work>
void parallel_for(int threads, int64_t count, const Work &work) {
    std::atomic<int64_t> taken{0};
    run_threads(threads, [&](int) {
        for (int64_t i; (i = taken++) < count;) work(i);
        return MemoryRange{};
    });
}

}  // namespace

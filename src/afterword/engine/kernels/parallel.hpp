// Loops over several threads: those of the thread pool (thread_pool.hpp), or OpenMP's (openmp.hpp).

#pragma once

#include <atomic>
#include <cstdint>

namespace {

constexpr int LINE = 64;  // bytes of a cache line

// Memory that a thread prefetches. It may have been freed: a prefetch of an unmapped address has no effect.
struct MemoryRange {
    const char *at, *end;
};

// Calls `call(work, 0)`, and `call(work, i)` for those of the other `count - 1` threads that join before thread 0 has returned.
// `call` must therefore take parts of the work from shared counters until none is left. Each thread prefetches the returned
// range until the next run. With a `count` of 0 nothing is called, and waiting threads sleep until the next run.
using Run = void (*)(int count, MemoryRange (*call)(const void *, int), const void *work);

Run chosen_run = nullptr;  // null: everything runs on the calling thread

// Calls `work(thread)` as a `Run` calls `call`.
template <class Work>
void run_threads(int count, const Work &work) {
    if (count == 1 || !chosen_run) work(0);
    else chosen_run(count, [](const void *work, int thread) { return (*(const Work *)work)(thread); }, &work);
}

// Calls `work(i)` for each i from 0 to `count - 1`.
template <class Work>
void parallel_for(int threads, int64_t count, const Work &work) {
    std::atomic<int64_t> taken{0};
    run_threads(threads, [&](int) {
        for (int64_t i; (i = taken++) < count;) work(i);
        return MemoryRange{};
    });
}

}  // namespace

// The kernels' thread pool. Its threads prefetch weights while they wait, and a run does not wait for a thread without a core.
//
// The time to generate one token is bounded by reading all weights once. Elementwise operations and sampling between two
// products use one thread, and memory would be idle meanwhile; so the other threads prefetch the weights of the next product.
// Where other programs use the cores, the operating system may not schedule a thread of the pool; the others do its part.
//
// Where ggml computes operations that take several threads, it uses OpenMP's. Two groups of spinning threads would slow each
// other down, so the kernels use OpenMP then too (`accelerator_use_thread_pool`).

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "parallel.hpp"

namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#ifdef __linux__
inline int this_core() { return sched_getcpu(); }

// Moves this thread to another core. Linux may let a woken thread wait for seconds on the core of a thread that never sleeps,
// while other cores are idle.
inline void leave_core(int core) {
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all)) return;
    others = all;
    CPU_CLR(core, &others);
    if (!CPU_COUNT(&others)) return;
    sched_setaffinity(0, sizeof others, &others);
    sched_setaffinity(0, sizeof all, &all);
}
#else
inline int this_core() { return -1; }
inline void leave_core(int) {}
#endif

class ThreadPool {
    static constexpr int SPINS = 50000;         // before a waiting thread sleeps; about half a millisecond
    static constexpr int PAUSES = 5000;         // then a joined thread may have no core, so `run` yields its own
    static constexpr int PREFETCHED_LINES = 2;  // in each spin

    // Units of `work_word`: the number of the round, whether threads may join it. The bits below count the joined threads.
    static constexpr uint64_t ROUND = 1ull << 32, OPEN = 1ull << 31;

    alignas(LINE) std::atomic<uint64_t> work_word{0};
    alignas(LINE) std::atomic<int> sleeping{0};
    std::mutex mutex;
    std::condition_variable waker;
    MemoryRange (*call)(const void *, int) = nullptr;
    const void *work = nullptr;
    std::atomic<int> wanted{1}, home{-1};  // the number of threads of this round; the core of thread 0
    std::atomic<bool> resting{false};      // whether waiting threads sleep without spinning
    std::atomic<bool> running{false};      // whether `run` is being executed
    int size = 1;

    // `call`, `work` and the static state of the kernels belong to one run. Two at once would compute wrong numbers without
    // a sign of it, so the process ends: the supervisor replaces it.
    struct OneAtATime {
        std::atomic<bool> &flag;

        explicit OneAtATime(std::atomic<bool> &flag) : flag(flag) {
            if (!flag.exchange(true, std::memory_order_acquire)) return;
            std::fputs("Afterword's kernels: a run of the thread pool began before the previous one had ended\n", stderr);
            std::abort();
        }
        ~OneAtATime() { flag.store(false, std::memory_order_release); }
        OneAtATime(const OneAtATime &) = delete;
    };

    [[noreturn]] void serve(int thread, uint64_t seen) {
        for (MemoryRange next{};;) {
            seen = await(seen, next);
            next = {};
            if (thread >= wanted) continue;
            if (const int core = this_core(); core == home) leave_core(core);
            if (!join(seen)) continue;
            next = call(work, thread);
            work_word.fetch_sub(1, std::memory_order_release);
        }
    }

    // Waits for a round other than `seen` and returns it. Prefetches `next` meanwhile.
    uint64_t await(uint64_t seen, MemoryRange next) {
        for (int i = 0; i < SPINS && !resting.load(std::memory_order_relaxed); i++) {
            const uint64_t now = work_word.load(std::memory_order_acquire) / ROUND;
            if (now != seen) return now;
            if (next.at >= next.end) pause();
            else
                for (int line = 0; line < PREFETCHED_LINES; line++, next.at += LINE) __builtin_prefetch(next.at);
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        waker.wait(lock, [&] { return work_word / ROUND != seen; });
        sleeping--;
        return work_word / ROUND;
    }

    // Joins a round if it is still open. A thread that had no core comes too late and takes no part.
    bool join(uint64_t round) {
        uint64_t now = work_word.load(std::memory_order_relaxed);
        while (now / ROUND == round && now & OPEN)
            if (work_word.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) return true;
        return false;
    }

   public:
    // See `Run`. Calls must come one after the other; a call during another one aborts the process.
    void run(int count, MemoryRange (*next_call)(const void *, int), const void *next_work) {
        const OneAtATime only(running);
        resting = !count;
        if (resting) return;
        for (; size < count; size++) std::thread(&ThreadPool::serve, this, size, work_word / ROUND).detach();
        call = next_call, work = next_work, wanted = count, home = this_core();
        work_word = (work_word / ROUND + 1) * ROUND | OPEN;
        if (sleeping) {
            std::lock_guard<std::mutex> lock(mutex);
            waker.notify_all();
        }
        call(work, 0);
        work_word -= OPEN;
        for (int i = 0; work_word.load(std::memory_order_acquire) % ROUND; i++) i < PAUSES ? pause() : std::this_thread::yield();
    }
};

ThreadPool &thread_pool = *new ThreadPool;  // never destroyed: its threads wait until the process ends

void run_in_pool(int count, MemoryRange (*call)(const void *, int), const void *work) { thread_pool.run(count, call, work); }

}  // namespace

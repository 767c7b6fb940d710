// Threads for an operation: our own, which read ahead while they wait and are not waited for while they have no core.
//
// Generating one token is bounded by reading all weights once, and memory would be idle while what lies between two products
// (norms, rotations, the choice of a token) is computed, which takes one thread. So the others read meanwhile what they will
// multiply with next. Where other programs run, a thread that has no core is missed by nobody: the rest do its part.
//
// Where something that takes several threads is left to the library, it has its own, of OpenMP, and two teams that spin would
// be in each other's way: then all threads are OpenMP's.

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

// Go elsewhere, wherever that is. Systems let a thread that was woken wait for seconds behind one that never sleeps, on its
// core, while others are idle most of the time.
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
    static constexpr int SPINS = 50000;    // between two tokens; about half a millisecond
    static constexpr int PATIENCE = 5000;  // then whoever is waited for may have no core
    static constexpr int LINES = 2;        // that are asked for at a time

    static constexpr uint64_t ROUND = 1ull << 32, OPEN = 1ull << 31;  // below: how many have joined

    alignas(LINE) std::atomic<uint64_t> work_word{0};
    alignas(LINE) std::atomic<int> sleeping{0};
    std::mutex mutex;
    std::condition_variable waker;
    MemoryRange (*call)(const void *, int) = nullptr;
    const void *work = nullptr;
    std::atomic<int> wanted{1}, home{-1};  // home: the core of thread 0
    std::atomic<bool> resting{false};  // whether nothing is to be waited for
    std::atomic<bool> running{false};  // whether `run` is being executed
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

    [[noreturn]] void serve(int me, uint64_t seen) {
        for (MemoryRange next{};;) {
            seen = await(seen, next);
            next = {};
            if (me >= wanted) continue;
            if (const int core = this_core(); core == home) leave_core(core);
            if (!join(seen)) continue;
            next = call(work, me);
            work_word.fetch_sub(1, std::memory_order_release);
        }
    }

    // The round that has begun since `seen`.
    uint64_t await(uint64_t seen, MemoryRange next) {
        for (int i = 0; i < SPINS && !resting.load(std::memory_order_relaxed); i++) {
            const uint64_t now = work_word.load(std::memory_order_acquire) / ROUND;
            if (now != seen) return now;
            if (next.at >= next.end) pause();
            else for (int line = 0; line < LINES; line++, next.at += LINE) __builtin_prefetch(next.at);
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        waker.wait(lock, [&] { return work_word / ROUND != seen; });
        sleeping--;
        return work_word / ROUND;
    }

    // Whoever comes late, since it had no core, finds the work done, and nobody has waited for it.
    bool join(uint64_t round) {
        uint64_t now = work_word.load(std::memory_order_relaxed);
        while (now / ROUND == round && now & OPEN)
            if (work_word.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) return true;
        return false;
    }

   public:
    // See `Run`. Calls must come one after the other; a call during another one aborts the process.
    void run(int count, MemoryRange (*todo)(const void *, int), const void *what) {
        const OneAtATime only(running);
        resting = !count;
        if (resting) return;
        for (; size < count; size++) std::thread(&ThreadPool::serve, this, size, work_word / ROUND).detach();
        call = todo, work = what, wanted = count, home = this_core();
        work_word = (work_word / ROUND + 1) * ROUND | OPEN;
        if (sleeping) {
            std::lock_guard<std::mutex> lock(mutex);
            waker.notify_all();
        }
        call(work, 0);
        work_word -= OPEN;
        for (int i = 0; work_word.load(std::memory_order_acquire) % ROUND; i++) i < PATIENCE ? pause() : std::this_thread::yield();
    }
};

ThreadPool &team = *new ThreadPool;  // never destroyed: its threads wait until the process ends

void run_in_pool(int count, MemoryRange (*call)(const void *, int), const void *work) { team.run(count, call, work); }

}  // namespace

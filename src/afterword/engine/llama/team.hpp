// Threads for an operation: OpenMP's, or for a single token some of our own, which read ahead while they wait.
//
// Generating one token is bounded by reading all weights once, and memory would be idle while what lies between two products
// (norms, rotations, the choice of a token) is computed, which takes one thread. So the others read meanwhile what they will
// multiply with next. The library has threads of OpenMP too, and two teams that spin would be in each other's way: `leads`
// says that nothing of a single token is left to the library that takes more than one.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int LINE = 64;  // bytes of a cache's line

// Memory to be read into a thread's cache. It may have been freed since: asking for it does nothing then.
struct Span {
    const char *at, *end;
};

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team {
    static constexpr int SPINS = 50000;    // between two tokens; about half a millisecond
    static constexpr int PATIENCE = 5000;  // then whoever is waited for may have no core
    static constexpr int LINES = 2;        // that are asked for at a time

    static constexpr uint64_t ROUND = 1ull << 32, OPEN = 1ull << 31;  // below: how many have joined

    alignas(LINE) std::atomic<uint64_t> door{0};
    alignas(LINE) std::atomic<int> asleep{0};
    std::mutex mutex;
    std::condition_variable waker;
    Span (*call)(const void *, int) = nullptr;
    const void *work = nullptr;
    std::atomic<int> wanted{1};
    int size = 1;

    [[noreturn]] void serve(int me, uint64_t seen) {
        for (Span next{};;) {
            seen = await(seen, next);
            next = {};
            if (me >= wanted || !join(seen)) continue;
            next = call(work, me);
            door.fetch_sub(1, std::memory_order_release);
        }
    }

    // The round that has begun since `seen`.
    uint64_t await(uint64_t seen, Span next) {
        for (int i = 0; i < SPINS; i++) {
            const uint64_t now = door.load(std::memory_order_acquire) / ROUND;
            if (now != seen) return now;
            if (next.at >= next.end) pause();
            else for (int line = 0; line < LINES; line++, next.at += LINE) __builtin_prefetch(next.at);
        }
        std::unique_lock<std::mutex> lock(mutex);
        asleep++;
        waker.wait(lock, [&] { return door / ROUND != seen; });
        asleep--;
        return door / ROUND;
    }

    // Whoever comes late, since it had no core, finds the work done, and nobody has waited for it.
    bool join(uint64_t round) {
        uint64_t now = door.load(std::memory_order_relaxed);
        while (now / ROUND == round && now & OPEN)
            if (door.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) return true;
        return false;
    }

   public:
    bool leads = false;

    // Calls `work` with 0 and the numbers of as many other threads as come before that returns: it does what no other has begun.
    // What it returns is what that thread reads until the next call.
    template <class Work>
    void run(int count, const Work &todo) {
        for (; size < count; size++) std::thread(&Team::serve, this, size, door / ROUND).detach();
        work = &todo;
        call = [](const void *work, int thread) { return (*(const Work *)work)(thread); };
        wanted = count;
        door = (door / ROUND + 1) * ROUND | OPEN;
        if (asleep) {
            std::lock_guard<std::mutex> lock(mutex);
            waker.notify_all();
        }
        todo(0);
        door -= OPEN;
        for (int i = 0; door.load(std::memory_order_acquire) % ROUND; i++) i < PATIENCE ? pause() : std::this_thread::yield();
    }
};

Team &team = *new Team;  // never destroyed: its threads wait until the process ends

inline int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls `work` as `Team::run` does, in threads that suit the pass.
template <class Work>
void in_threads(int count, bool one_token, const Work &work) {
    if (one_token && team.leads && count > 1) return team.run(count, work);
#pragma omp parallel num_threads(count) if (count > 1)
    work(this_thread());
}

}  // namespace

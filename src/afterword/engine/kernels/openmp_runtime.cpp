// The functions of OpenMP's library that the prebuilt llama.cpp calls, for systems without libgomp.so.1.
//
// Small images have no libgomp, which comes with a compiler or with a package of its own. library.py loads this library only
// where the system's is missing. Its SONAME is libgomp.so.1 and openmp_runtime.map gives its functions the versions that
// GCC's library gives them, so the dynamic linker takes it for that library.
//
// A region has one team. Its threads are kept for the next regions; they spin for some microseconds and then sleep.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace {

constexpr int SPINS = 10000;  // before a thread sleeps; library.py gives libgomp the same number

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A value for whose change threads wait. Each new value has other low 32 bits, at which the system looks.
class Word {
    std::atomic<uint64_t> value{0};  // both processors store the low bits first
    std::atomic<int> sleepers{0};

    void call_system(int operation, uint32_t argument) { syscall(SYS_futex, &value, operation, argument, nullptr, nullptr, 0); }

   public:
    uint64_t get() const { return value.load(std::memory_order_acquire); }

    // Returns the value once it is not `seen`.
    uint64_t await(uint64_t seen) {
        for (int i = 0; i < SPINS; i++, pause())
            if (const uint64_t now = get(); now != seen) return now;
        sleepers++;
        while (value.load() == seen) call_system(FUTEX_WAIT_PRIVATE, (uint32_t)seen);
        sleepers--;
        return get();
    }

    void set(uint64_t next) {
        value.store(next);  // before `sleepers` is read: a thread that is not counted yet sees the new value
        if (sleepers.load()) call_system(FUTEX_WAKE_PRIVATE, INT32_MAX);
    }
};

// The threads that execute a region, and the construct that they share.
struct Team {
    unsigned size = 1;
    std::atomic<unsigned> arrived{0}, singles{0};  // threads at the barrier; `single` constructs that a thread has taken
    Word rounds;                                   // barriers that all threads have reached

    std::mutex mutex;  // of the loop's fields
    unsigned loops = 0;
    long next = 0, end = 0, step = 1, chunk = 1;

    void start(unsigned threads) { size = threads, singles = 0, loops = 0; }

    void wait_for_all() {
        const uint64_t round = rounds.get();
        if (arrived.fetch_add(1) + 1 < size) {
            rounds.await(round);
            return;
        }
        arrived = 0;
        rounds.set(round + 1);
    }

    // The first thread at the `number`-th loop sets its range; a loop begins only after all threads have left the previous one.
    void start_loop(unsigned number, long from, long to, long by, long size_of_chunk) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (loops == number) return;
        loops = number, next = from, end = to, step = by, chunk = size_of_chunk > 0 ? size_of_chunk : 1;
    }

    // Takes the next iterations. Returns whether some were left.
    bool take(long *first, long *past) {
        const std::lock_guard<std::mutex> lock(mutex);
        const long left = step > 0 ? (end - next + step - 1) / step : (end - next + step + 1) / step;
        if (left <= 0) return false;
        *first = next, *past = left > chunk ? next + chunk * step : end;
        next = *past;
        return true;
    }
};

// A thread's place in its team, and the constructs that it has met.
struct Place {
    Team *team;
    unsigned number, singles = 0, loops = 0;
};

thread_local Team alone;  // of code outside any region
thread_local Place here{&alone, 0};

using Body = void (*)(void *);

// Runs a region's body at a place in a team. At the end of a region all threads wait for each other.
void execute(Team &team, unsigned number, Body body, void *data) {
    const Place before = here;
    here = {&team, number};
    body(data);
    team.wait_for_all();
    here = before;
}

class Threads {
    std::mutex one_region;  // regions of two threads execute one after the other
    Team team;
    Body body = nullptr;
    void *data = nullptr;
    unsigned started = 1;
    Word region;  // the number of the region, and above it that of its threads: a late thread reads both at once

    [[noreturn]] void serve(unsigned number, uint64_t seen) {
        for (;;) {
            seen = region.await(seen);
            if (number < seen >> 32) execute(team, number, body, data);
        }
    }

   public:
    void run(unsigned count, Body next_body, void *next_data) {
        const std::lock_guard<std::mutex> lock(one_region);
        team.start(count), body = next_body, data = next_data;
        for (; started < count; started++) std::thread(&Threads::serve, this, started, region.get()).detach();
        region.set((uint64_t)count << 32 | (uint32_t)(region.get() + 1));
        execute(team, 0, body, data);
    }
};

Threads &threads = *new Threads;  // never destroyed: its threads wait until the process ends
std::mutex &atomics = *new std::mutex;

}  // namespace

extern "C" {

void GOMP_parallel(Body body, void *data, unsigned count, unsigned) {
    if (!count) count = std::thread::hardware_concurrency();
    if (count > 1 && here.team == &alone) return threads.run(count, body, data);
    Team inner;  // a region within a region has one thread
    execute(inner, 0, body, data);
}

void GOMP_barrier() { here.team->wait_for_all(); }

// Whether this thread executes the next `single` construct: the first one that comes to it does.
bool GOMP_single_start() {
    unsigned taken = here.singles++;
    return here.team->singles.compare_exchange_strong(taken, taken + 1);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *past) { return here.team->take(first, past); }

bool GOMP_loop_nonmonotonic_dynamic_start(long from, long to, long step, long chunk, long *first, long *past) {
    here.team->start_loop(++here.loops, from, to, step, chunk);
    return here.team->take(first, past);
}

void GOMP_loop_end() { here.team->wait_for_all(); }

void GOMP_atomic_start() { atomics.lock(); }
void GOMP_atomic_end() { atomics.unlock(); }

int omp_get_thread_num() { return (int)here.number; }
int omp_get_num_threads() { return (int)here.team->size; }

}  // extern "C"

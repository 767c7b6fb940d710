// The functions of OpenMP's library that the prebuilt llama.cpp calls, for systems without libgomp.so.1.
//
// Small images have no libgomp, which comes with a compiler or with a package of its own. library.py loads this library only
// where the system's is missing. Its SONAME is libgomp.so.1 and openmp_runtime.map gives its functions the versions that
// GCC's library gives them, so the dynamic linker takes it for that library.
//
// Every region is executed by the thread that meets it, and by no other: OpenMP lets a library give fewer threads than a
// program asks for, and llama.cpp asks how many it has. Afterword's kernels have threads of their own.

#include <mutex>

namespace {

// The iterations of this thread's current loop. A region may contain no other loop at the same time.
thread_local long from, to;

std::mutex &atomics = *new std::mutex;  // never destroyed: threads may use it until the process ends

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }

void GOMP_barrier() {}

bool GOMP_single_start() { return true; }

// Takes the next iterations, which are all that are left. Returns whether some were left.
bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *past) {
    if (from == to) return false;
    *first = from, *past = to;
    from = to;
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long, long *first, long *past) {
    from = start, to = step > 0 ? (end > start ? end : start) : (end < start ? end : start);
    return GOMP_loop_nonmonotonic_dynamic_next(first, past);
}

void GOMP_loop_end() {}

void GOMP_atomic_start() { atomics.lock(); }
void GOMP_atomic_end() { atomics.unlock(); }

int omp_get_thread_num() { return 0; }
int omp_get_num_threads() { return 1; }

}  // extern "C"

// Runs loops on the threads of the OpenMP library that llama.cpp uses.
//
// The kernels are not linked with OpenMP: llama.cpp may bring a copy of its own, and with two copies two groups of threads would
// spin. accelerator.py looks the functions up in llama.cpp's library.

#pragma once

#include "parallel.hpp"

namespace {

// Functions of OpenMP's library, as compilers call them. Null: llama.cpp has none.
struct OpenMp {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*this_thread)();                                                                  // omp_get_thread_num
};

OpenMp openmp{};

// See `Run`. OpenMP's threads sleep by themselves, so a count of 0 does nothing.
void run_in_openmp(int count, MemoryRange (*call)(const void *, int), const void *work) {
    struct Body {
        MemoryRange (*call)(const void *, int);
        const void *work;
    } body{call, work};
    const auto each = [](void *at) {
        const Body &body = *(const Body *)at;
        body.call(body.work, openmp.this_thread());
    };
    if (count) openmp.parallel(each, &body, (unsigned)count, 0);
}

}  // namespace

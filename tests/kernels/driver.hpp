// Inputs and hashes for the drivers, which run the kernels outside of Python: with sanitizers, other compilers and qemu.
//
// Inputs are made by integer arithmetic and exact conversions only, so they are the same for every compiler and processor.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// SplitMix64.
class Random {
    uint64_t state;

   public:
    explicit Random(uint64_t seed) : state(seed) {}

    uint64_t bits() {
        uint64_t x = state += 0x9e3779b97f4a7c15;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        return x ^ x >> 31;
    }

    // The sum of four numbers in [-1, 1) of 16 bits each, times `scale`, which must be a power of two.
    float number(float scale = 1) {
        const uint64_t x = bits();
        int32_t sum = 0;
        for (int i = 0; i < 4; i++) sum += (int16_t)(x >> 16 * i);
        return (float)sum * (scale / 32768);
    }

    std::vector<float> numbers(int64_t count, float scale = 1) {
        std::vector<float> made(count);
        for (float &x : made) x = number(scale);
        return made;
    }

    // The bits of a finite half with an exponent in a small range, with either sign.
    uint16_t half(uint16_t least) {
        const uint64_t x = bits();
        return (uint16_t)((x & 0x8000) | (least + (x >> 16 & 0x0fff)));
    }
};

// FNV-1a over bytes. All NaNs count as equal: their bits differ between processors.
class Hash {
    uint64_t value = 0xcbf29ce484222325;

    void add_bytes(const void *from, size_t size) {
        for (size_t i = 0; i < size; i++) value = (value ^ ((const unsigned char *)from)[i]) * 0x100000001b3;
    }

   public:
    template <class Number>
    void add(const Number *numbers, size_t count) {
        static const char nan[sizeof(Number)] = {};
        for (size_t i = 0; i < count; i++) add_bytes(numbers[i] == numbers[i] ? (const void *)&numbers[i] : nan, sizeof(Number));
    }

    template <class Number>
    void add(const std::vector<Number> &numbers) {
        add(numbers.data(), numbers.size());
    }

    uint64_t result() const { return value; }
};

struct Options {
    int threads;  // the largest number that is tried
    int rounds;   // how often each computation is repeated
};

// Runs a computation with 1 to `options.threads` threads and prints its hash. The process exits where two hashes differ.
template <class Compute>
void report(const std::string &name, const Options &options, const Compute &compute) {
    const uint64_t expected = compute(1);
    for (int round = 0; round < options.rounds; round++)
        for (int threads = 2; threads <= options.threads; threads++)
            if (compute(threads) != expected) {
                std::printf("%s: %d threads compute other bits than one\n", name.c_str(), threads);
                std::exit(1);
            }
    std::printf("%s %016llx\n", name.c_str(), (unsigned long long)expected);
}

// Which levels of instructions this processor has, so that compiled.py loads kernels that it can execute.
//
// hatch_build.py compiles this file for the oldest processors, and the kernels once for each level. The operating system must
// save the registers of a level too, which XCR0 states.

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

#if defined(__x86_64__)

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // zeros where the processor does not know the leaf
};

Registers ask(unsigned leaf, unsigned part = 0) {
    Registers found;
    __get_cpuid_count(leaf, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
    return found;
}

constexpr bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

// The registers that the operating system saves: XCR0.
unsigned saved_registers() {
    unsigned low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

unsigned levels() {
    constexpr unsigned SAVES = 1u << 27, YMM = 0x6, ZMM = 0xe6;
    // CMPXCHG16B, SSE 3 to 4.2, POPCNT; FMA, MOVBE, AVX, F16C
    constexpr unsigned IN_1 = 1u | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23 | 1u << 12 | 1u << 22 | 1u << 28 | 1u << 29;
    constexpr unsigned LZCNT = 1u << 5;
    constexpr unsigned V3_IN_7 = 1u << 3 | 1u << 5 | 1u << 8;                             // BMI1, AVX2, BMI2
    constexpr unsigned V4_IN_7 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // AVX-512 F, DQ, CD, BW, VL
    constexpr unsigned AVX512_VNNI = 1u << 11, AVX_VNNI = 1u << 4;
    const Registers first = ask(1), seventh = ask(7), further = ask(7, 1), extended = ask(0x80000001);
    if (!has(first.ecx, IN_1 | SAVES) || !has(extended.ecx, LZCNT) || !has(seventh.ebx, V3_IN_7)) return 0;
    const unsigned saved = saved_registers();
    if (!has(saved, YMM)) return 0;
    const bool v4 = has(seventh.ebx, V4_IN_7) && has(saved, ZMM);
    return 1u | has(further.eax, AVX_VNNI) << 1 | v4 << 2 | (v4 && has(seventh.ecx, AVX512_VNNI)) << 3;
}

#elif defined(__aarch64__) && defined(__linux__)

unsigned levels() {
    constexpr unsigned long ATOMICS = 1ul << 8, HALVES = 1ul << 9 | 1ul << 10, RDM = 1ul << 12, DOT_PRODUCTS = 1ul << 20;
    constexpr unsigned long ALL = ATOMICS | HALVES | RDM | DOT_PRODUCTS;
    return (getauxval(AT_HWCAP) & ALL) == ALL;
}

#else

unsigned levels() { return 0; }

#endif

}  // namespace

// Bit i: the processor has level i of `LEVELS` in compiled.py.
extern "C" unsigned processor_levels() { return levels(); }

// What this processor has, and what the operating system saves of it at a context switch.
#include "kernels.h"

#if PHX_X86
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512.h"

namespace phx {
namespace {

struct Features {
    bool avx2 = false, avx512_vnni = false, avx512_bf16 = false, amx = false;

    Features() {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(1, 0, &a, &b, &c, &d)) return;
        const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, popcnt = c >> 23 & 1;
        if (!osxsave || !avx || !fma || !popcnt) return;
        unsigned saved, high;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
        if (!ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const unsigned last = a, features = b, more = c, others = d;
        auto has = [](unsigned word, int bit) { return (word >> bit & 1) != 0; };
        avx2 = has(features, 5) && has(features, 3) && has(features, 8);  // and BMI 1 and 2
        avx512_vnni = avx2 && zmm && has(features, 16) && has(features, 17) && has(features, 30) &&
                      has(features, 31) &&                                  // F, DQ, BW, VL
                      has(more, 1) && has(more, 6) && has(more, 11);        // VBMI, VBMI2, VNNI
        if (avx512_vnni && last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = has(a, 5);
        amx = avx512_bf16 && has(others, 22) && has(others, 24) && has(saved, 17) && has(saved, 18) && full_tiles();
    }

    // Whether palette 1 has eight tiles of 16 rows of 64 bytes.
    static bool full_tiles() {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return false;
        if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
        return a >> 16 == 1024 && (b & 0xffff) == 64 && b >> 16 >= 8 && (c & 0xffff) >= 16;
    }
};

const Features& features() {
    static const Features found;
    return found;
}

#if PHX_AMX && !defined(PHOENIX_AMX_EMULATED)
// Linux gives tiles only to a process that asks (Documentation/arch/x86/xstate.rst): with leave once given, to all its
// threads. Without it the first such instruction would be fatal.
bool leave_for_tiles() {
    constexpr long GET_LEAVE = 0x1022, ASK_LEAVE = 0x1023, TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, ASK_LEAVE, TILE_DATA)) return false;
    unsigned long given = 0;
    return !syscall(SYS_arch_prctl, GET_LEAVE, &given) && (given >> TILE_DATA & 1);
}
#endif

}  // namespace

bool avx2_available() { return features().avx2; }
bool avx512_vnni_available() { return features().avx512_vnni; }
bool avx512_bf16_available() { return features().avx512_bf16; }

#if PHX_AMX
bool amx_available() {
#ifdef PHOENIX_AMX_EMULATED
    return features().avx512_vnni;
#else
    static const bool given = features().amx && leave_for_tiles();
    return given;
#endif
}
#endif

}  // namespace phx
#endif

// The eight tile registers of AMX, and what amx_bf16.cpp does with them. With PHOENIX_AMX_EMULATED they are plain
// memory, and the instructions plain C++: what the tests compile, for machines without AMX.
#pragma once

#include "avx512.h"

#if PHX_AMX
#define PHX_AMX_TARGET PHX_AVX512_VNNI ",amx-tile,amx-bf16"

namespace phx::tile {

constexpr int ROWS = 16;       // of a register
constexpr int ROW_BYTES = 64;  // of each of them
constexpr int BYTES = ROWS * ROW_BYTES;
constexpr int REGISTERS = 8;

// What LDTILECFG reads.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64, "as the instruction has it");

// All registers of full size: rows and columns that aren't there are zeros in memory.
constexpr Shapes full() {
    Shapes shapes;
    for (int i = 0; i < REGISTERS; ++i) {
        shapes.row_bytes[i] = ROW_BYTES;
        shapes.rows[i] = ROWS;
    }
    return shapes;
}

}  // namespace phx::tile

#ifdef PHOENIX_AMX_EMULATED
#include "amx_emulated.h"
#else
PHX_TARGET_BEGIN(PHX_AMX_TARGET)
namespace phx::tile {

// The compilers' own functions take a register's number from the source text, which a template's argument isn't, and
// gcc's load doesn't say that it reads memory, so that what was just stored there could be left out.
PHX_INLINE void configure(const Shapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
PHX_INLINE void release() { __asm__ volatile("tilerelease"); }

template <int T>
PHX_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int T>
PHX_INLINE void load(const void* from) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(static_cast<int64_t>(ROW_BYTES)), "i"(T)
                     : "memory");
}

template <int T>
PHX_INLINE void store(void* to) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(static_cast<int64_t>(ROW_BYTES)), "i"(T)
                     : "memory");
}

// C[m][n] += the sum over k of A[m][2k] B[k][2n] and of A[m][2k + 1] B[k][2n + 1]; A and B of bfloat16, C of float32.
template <int C, int A, int B>
PHX_INLINE void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace phx::tile
PHX_TARGET_END
#endif
#endif

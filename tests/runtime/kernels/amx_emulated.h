// AMX's tile registers and instructions in plain C++, as Intel's manual describes them (Software Developer's Manual,
// volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TILERELEASE). What would raise #UD there ends the
// process here.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace phx::tile {

struct Registers {
    Shapes shapes;
    bool configured = false;
    uint8_t data[REGISTERS][ROWS][ROW_BYTES];
};

inline thread_local Registers registers;

inline void insist(bool allowed, const char* what) {
    if (allowed) return;
    std::fprintf(stderr, "AMX emulation: %s\n", what);
    std::abort();
}

inline void configure(const Shapes& shapes) {
    insist(shapes.palette == 1 && shapes.start_row == 0, "another palette than 1");
    for (int i = 0; i < 16; ++i) {
        const bool used = i < REGISTERS && shapes.rows[i];
        insist(used == (shapes.row_bytes[i] != 0) && (used || !shapes.rows[i]), "a register that there isn't");
        insist(shapes.rows[i] <= ROWS && shapes.row_bytes[i] <= ROW_BYTES, "a register larger than there are");
    }
    registers.shapes = shapes;
    registers.configured = true;
    std::memset(registers.data, 0, sizeof registers.data);
}

inline void release() {
    registers.configured = false;
    std::memset(registers.data, 0xff, sizeof registers.data);  // NaN, which whatever relied on it will show
}

template <int T>
void check() {
    static_assert(T >= 0 && T < REGISTERS);
    insist(registers.configured && registers.shapes.rows[T], "a register that isn't configured");
}

template <int T>
void zero() {
    check<T>();
    std::memset(registers.data[T], 0, BYTES);
}

template <int T>
void load(const void* from) {
    check<T>();
    std::memset(registers.data[T], 0, BYTES);
    for (int row = 0; row < registers.shapes.rows[T]; ++row)
        std::memcpy(registers.data[T][row], static_cast<const uint8_t*>(from) + row * ROW_BYTES,
                    registers.shapes.row_bytes[T]);
}

template <int T>
void store(void* to) {
    check<T>();
    for (int row = 0; row < registers.shapes.rows[T]; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * ROW_BYTES, registers.data[T][row],
                    registers.shapes.row_bytes[T]);
}

// Denormal operands count as zeros.
inline float operand(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// An exact sum, rounded to the nearest float32, ties to even; a result that is denormal after rounding becomes zero. In
// double a float plus a product of two bfloat16 is rounded first, but to more than twice the digits, which is harmless.
inline float result(double sum) {
    constexpr double LEAST = 0x1p-126 * (1 - 0x1p-25);
    return std::fabs(sum) < LEAST ? static_cast<float>(std::copysign(0.0, sum)) : static_cast<float>(sum);
}

inline float word(const uint8_t* row, int at) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * at, 2);
    return operand(from_bf16(bits));
}

template <int C, int A, int B>
void dot() {
    check<A>();
    check<B>();
    check<C>();
    static_assert(A != B && B != C && A != C);
    const Shapes& shapes = registers.shapes;
    const int depth = shapes.row_bytes[A] / 4, columns = shapes.row_bytes[C] / 4;
    insist(shapes.rows[A] == shapes.rows[C] && shapes.rows[B] == depth && shapes.row_bytes[B] / 4 == columns,
           "shapes that don't fit together");
    static thread_local float second[ROWS][ROW_BYTES / 2];
    for (int k = 0; k < depth; ++k)
        for (int n = 0; n < 2 * columns; ++n) second[k][n] = word(registers.data[B][k], n);
    for (int m = 0; m < shapes.rows[C]; ++m) {
        float sums[ROW_BYTES / 2] = {};  // of even columns of A, and of odd ones, each for itself
        for (int k = 0; k < depth; ++k) {
            const float pair[2] = {word(registers.data[A][m], 2 * k), word(registers.data[A][m], 2 * k + 1)};
            for (int n = 0; n < 2 * columns; ++n)
                sums[n] = result(static_cast<double>(sums[n]) + static_cast<double>(pair[n % 2]) * second[k][n]);
        }
        float row[ROW_BYTES / 4];
        std::memcpy(row, registers.data[C][m], ROW_BYTES);
        for (int n = 0; n < columns; ++n) {
            const float both = result(static_cast<double>(sums[2 * n]) + sums[2 * n + 1]);
            row[n] = result(static_cast<double>(operand(row[n])) + both);
        }
        std::memcpy(registers.data[C][m], row, ROW_BYTES);
    }
}

}  // namespace phx::tile

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

inline void check(int at) {
    insist(registers.configured && registers.shapes.rows[at], "a register that isn't configured");
}

inline void zero(int at) {
    check(at);
    std::memset(registers.data[at], 0, BYTES);
}

inline void load(int at, const void* from) {
    zero(at);
    for (int row = 0; row < registers.shapes.rows[at]; ++row)
        std::memcpy(registers.data[at][row], static_cast<const uint8_t*>(from) + row * ROW_BYTES,
                    registers.shapes.row_bytes[at]);
}

inline void store(int at, void* to) {
    check(at);
    for (int row = 0; row < registers.shapes.rows[at]; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * ROW_BYTES, registers.data[at][row],
                    registers.shapes.row_bytes[at]);
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

inline void dot(int c, int a, int b) {
    check(a);
    check(b);
    check(c);
    insist(a != b && b != c && a != c, "one register as two operands");
    const Registers& all = registers;
    const Shapes& shapes = all.shapes;
    const int depth = shapes.row_bytes[a] / 4, columns = shapes.row_bytes[c] / 4;
    insist(shapes.rows[a] == shapes.rows[c] && shapes.rows[b] == depth && shapes.row_bytes[b] / 4 == columns,
           "shapes that don't fit together");
    float second[ROWS][ROW_BYTES / 2] = {};
    for (int k = 0; k < depth; ++k)
        for (int n = 0; n < 2 * columns; ++n) second[k][n] = word(all.data[b][k], n);
    for (int m = 0; m < shapes.rows[c]; ++m) {
        float sums[ROW_BYTES / 2] = {};  // of even columns of A, and of odd ones, each for itself
        for (int k = 0; k < depth; ++k) {
            const double pair[2] = {word(all.data[a][m], 2 * k), word(all.data[a][m], 2 * k + 1)};
            for (int n = 0; n < ROW_BYTES / 2; ++n) sums[n] = result(sums[n] + pair[n % 2] * second[k][n]);
        }
        float row[ROW_BYTES / 4];
        std::memcpy(row, all.data[c][m], ROW_BYTES);
        for (int n = 0; n < columns; ++n) {
            const float both = result(static_cast<double>(sums[2 * n]) + sums[2 * n + 1]);
            row[n] = result(static_cast<double>(operand(row[n])) + both);
        }
        std::memcpy(registers.data[c][m], row, ROW_BYTES);
    }
}

template <int T>
void zero() {
    zero(T);
}
template <int T>
void load(const void* from) {
    load(T, from);
}
template <int T>
void store(void* to) {
    store(T, to);
}
template <int C, int A, int B>
void dot() {
    dot(C, A, B);
}

}  // namespace phx::tile

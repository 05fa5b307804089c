// A layout for matrices with few values. Sixteen rows, a slice, are walked along side by side, each in its own lane; a
// step takes up to four values of each row, which lie within a window of 128 columns and are multiplied with what a
// look-up in registers finds in the window of x. Rows of like counts share a slice, and the window moves with the row
// that is furthest behind, so that few places of a step stay empty.
#pragma once

#include "kernels.h"

namespace phx {

constexpr int SLICE = 16;     // rows
constexpr int EACH = 4;       // values of a row in a step
constexpr int STEP = SLICE * EACH;
constexpr int WINDOW = 128;   // columns
constexpr int UNIT = 16;      // windows begin at its multiples
constexpr uint8_t EMPTY = 0x80;  // a position without a value, which look-ups take for position 0

// What comes first in a step are STEP positions within the window, a byte each; its values follow. An int8 is kept as its
// magnitude, at most 127, with its sign above it, which a look-up turns into bfloat16; -128 isn't among them.
struct Sliced {
    const uint8_t* steps;
    const uint16_t* windows;  // of each step, where its window begins, in UNITs
    const int64_t* starts;    // slices + 1: the first step of each slice, and at last their number
    const int32_t* order;     // the row that each lane of each slice holds
    int64_t rows, cols;
    Type type;  // of the values, bf16 or i8

    int64_t slices() const { return (rows + SLICE - 1) / SLICE; }
    int64_t step_bytes() const { return STEP * (1 + static_cast<int64_t>(bytes_of(type))); }
    int lanes(int64_t slice) const {
        return static_cast<int>(rows - slice * SLICE < SLICE ? rows - slice * SLICE : SLICE);
    }
};

inline uint8_t code_of(int8_t value) {
    return static_cast<uint8_t>(value < 0 ? 0x80 | -value : value);
}
inline int8_t value_of(uint8_t code) {
    const int magnitude = code & 0x7f;
    return static_cast<int8_t>(code & 0x80 ? -magnitude : magnitude);
}

// Where the position of a lane's k-th value lies in a step: bytes of a quarter register's lower half become the words
// that the first dot product takes, those of its upper half the second's (VPUNPCKLBW and VPUNPCKHBW).
inline int position_place(int lane, int k) { return lane / 4 * 16 + k / 2 * 8 + lane % 4 * 2 + k % 2; }

// Where the value itself lies among the step's: bfloat16 as dot products take them, an int8 as its position.
inline int value_place(Type type, int lane, int k) {
    return type == Type::i8 ? position_place(lane, k) : k / 2 * 2 * SLICE + lane * 2 + k % 2;
}

// Columns of x that look-ups may reach, which are all that a window touches.
inline int64_t reach(int64_t cols) { return (cols + UNIT - 1) / UNIT * UNIT + WINDOW; }

// Products with a sliced matrix. Activations are taken apart into planes of bfloat16, one of bfloat16 and three of
// float32, and each plane into the upper bytes of its `reach` columns and then the lower ones.
struct SlicedKernel {
    // The planes of one row of x. False: some of it isn't finite. A place without a value would make a NaN of it, and
    // a weight that the matrix doesn't hold would not.
    bool (*prepare)(const void* x, Type type, int64_t cols, uint8_t* planes);
    // sums[lane * stride + p] = the slice's row in that lane times plane p, for `count` planes, 1 to MOST_DECODED.
    void (*rows)(const Sliced& w, int64_t slice, const uint8_t* planes, int count, float* sums, int64_t stride);
};

inline int planes_of(Type x) { return x == Type::f32 ? 3 : 1; }

#if PHX_X86
extern const SlicedKernel avx512_sliced;
#endif

}  // namespace phx

// What the instruction sets have in common: the matrix, and the table of functions that each of them fills.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PHX_X86 1
#else
#define PHX_X86 0
#endif

// Where the compiler knows AMX, and the system is one whose leave to use it is known how to ask for.
#if PHX_X86 && defined(PHOENIX_AMX_EMULATED)
#define PHX_AMX 1
#elif PHX_X86 && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define PHX_AMX 1
#else
#define PHX_AMX 0
#endif

// Functions between PHX_TARGET_BEGIN and PHX_TARGET_END may use the named instructions; no file needs flags of its own.
// Nothing of the standard library is instantiated there: the linker could keep that copy for callers on older machines.
#define PHX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PHX_TARGET_BEGIN(features) \
    PHX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PHX_TARGET_END PHX_PRAGMA(clang attribute pop)
#else
#define PHX_TARGET_BEGIN(features) PHX_PRAGMA(GCC push_options) PHX_PRAGMA(GCC target(features))
#define PHX_TARGET_END PHX_PRAGMA(GCC pop_options)
#endif

#define PHX_INLINE inline __attribute__((always_inline))

namespace phx {

enum class Type : int32_t { f32 = 0, bf16 = 1, i8 = 2 };

inline size_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// A packed matrix. Offsets and popcounts agree (`phx_check` saw to it), so that a row's values lie where they should.
struct Matrix {
    const uint8_t* bitmask;  // rows x ceil(cols / 8), bit j of byte b = column 8b + j
    const void* values;      // row by row, columns ascending
    const int64_t* offsets;  // rows + 1
    int64_t rows, cols;
    Type type;  // of the values

    int64_t row_bytes() const { return (cols + 7) / 8; }
    int64_t count() const { return offsets[rows]; }
};

// Activations: batch rows of cols elements, one after the other.
struct Input {
    const void* data;
    int64_t batch, cols;
    Type type;  // f32 or bf16
};

// Columns are padded to a multiple of this where activations or rows are copied: one AVX-512 register of bytes.
constexpr int64_t PAD = 64;

inline int64_t padded(int64_t cols) { return (cols + PAD - 1) / PAD * PAD; }

constexpr int MOST_DECODED = 8;

// A kernel for small batches (at most MOST_DECODED), which multiplies weights as they come out of the stream.
struct Decode {
    // Bytes of scratch that `prepare` needs.
    size_t (*space)(const Input& x);
    // Bring the activations into the kernel's order: in `space`, or just where they are. Null: this x can't be had in
    // it (infinities in fixed point), and the tile takes it.
    const void* (*prepare)(const Input& x, void* space);
    // sums[(row - first) * batch + b] = values of the row times x[b], for first <= row < last.
    void (*rows)(const Matrix& w, const void* x, int batch, int64_t first, int64_t last, float* sums);
};

struct SlicedKernel;
struct Call;
enum Result : int;

// One instruction set. A tile is some rows of the matrix, expanded; its type is what products are taken in.
struct Path {
    const char* name;
    const char* note;
    bool (*available)();
    // The tile's type for these activations and values.
    Type (*tile_type)(Type x, Type values);
    // For a batch of at most MOST_DECODED; null where the tile is faster.
    const Decode* (*decode)(Type x, Type values, int64_t batch);
    // Write one row's cols elements, zeros included; `to` is f32, or bf16 for values of bf16 and i8.
    void (*expand)(const Matrix& w, int64_t row, Type to, void* out);
    // sums[r * batch + b] += tile[r] . x[b] over `cols` elements, a multiple of PAD; strides in elements.
    void (*product)(Type type, const void* tile, int64_t tile_stride, int rows, const void* x, int64_t x_stride,
                    int batch, int64_t cols, float* sums, int64_t sums_stride);
    // The dense kernel to compare with: bf16 weights (rows, cols); x from `decode(bf16, bf16, batch)->prepare`. May be null.
    void (*dense)(const uint16_t* w, int64_t cols, const void* x, int batch, int64_t first, int64_t last, float* sums);
    // Read memory and do nothing with it, as fast as this instruction set can.
    uint64_t (*read)(const uint8_t* data, int64_t bytes);
    // Products with the layout of sliced.h; may be null.
    const SlicedKernel* sliced;
    // The whole of a product with many rows of x, asked before all others. NOT_HERE: not these operands. May be null.
    Result (*many)(const Call& call) = nullptr;
};

extern const Path portable_path;
#if PHX_X86
extern const Path avx2_path;
extern const Path avx512_vnni_path;
extern const Path avx512_path;
#endif
#if PHX_AMX
extern const Path amx_path;
bool amx_available();
#endif

inline float from_bf16(uint16_t bits) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
}

// To the nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40);
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

}  // namespace phx

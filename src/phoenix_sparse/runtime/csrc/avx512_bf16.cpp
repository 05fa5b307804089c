// AVX-512 with bfloat16 dot products as well (Intel from Sapphire Rapids on and Cooper Lake, AMD from Zen 4 on).
#include "avx512.h"
#include "sliced.h"

#if PHX_X86
#include <immintrin.h>

PHX_TARGET_BEGIN(PHX_AVX512_BF16)
#include "avx512_row.h"

namespace phx {
namespace {

PHX_INLINE __m512 dot(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

size_t space(const Input& x) { return static_cast<size_t>(x.batch * padded(x.cols)) * 2; }

// Rows of x, padded with zeros; x itself where there is nothing to pad.
const void* prepare(const Input& x, void* room) {
    if (x.cols % PAD == 0) return x.data;
    int64_t stride = padded(x.cols);
    for (int64_t b = 0; b < x.batch; ++b) {
        const uint16_t* from = static_cast<const uint16_t*>(x.data) + b * x.cols;
        uint16_t* to = static_cast<uint16_t*>(room) + b * stride;
        for (int64_t i = 0; i < stride; i += 32)
            _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(first_bits(x.cols - i), from + i));
    }
    return room;
}

struct WordLanes {
    using Element = uint16_t;
    static constexpr int step = 32;
    static PHX_INLINE __m512 multiply(__m512 acc, __m512i row, __m512i column) { return dot(acc, row, column); }
};

struct WordsAsTheyAre {
    using Values = Words;
    static constexpr int PARTS = 1;
    static PHX_INLINE void split(__m512i words, __m512i* parts) { parts[0] = words; }
};

struct WordsFromBytes {
    using Values = Bytes;
    static constexpr int PARTS = 2;
    static PHX_INLINE void split(__m512i bytes, __m512i* parts) {
        for (int half = 0; half < 2; ++half) parts[half] = byte_words(bytes, half);
    }
};

// One contiguous stream, and several loads ahead of it.
PHX_INLINE float dense_row(const uint16_t* weights, const uint16_t* column, int64_t cols) {
    __m512 acc[4];
    for (int s = 0; s < 4; ++s) acc[s] = _mm512_setzero_ps();
    const int64_t whole = cols / 128 * 128;
    for (int64_t i = 0; i < whole; i += 128) {
        for (int s = 0; s < 4; ++s) {
            _mm_prefetch(reinterpret_cast<const char*>(weights + i + 32 * s) + 4096, _MM_HINT_T1);
            acc[s] = dot(acc[s], _mm512_loadu_si512(weights + i + 32 * s), _mm512_loadu_si512(column + i + 32 * s));
        }
    }
    for (int64_t i = whole; i < cols; i += 32)
        acc[0] = dot(acc[0], _mm512_maskz_loadu_epi16(first_bits(cols - i), weights + i),
                     _mm512_loadu_si512(column + i));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
}

void dense(const uint16_t* w, int64_t cols, const void* prepared, int batch, int64_t first, int64_t last,
           float* sums) {
    const auto* x = static_cast<const uint16_t*>(prepared);
    const int rows = static_cast<int>(last - first);
    if (batch > 1 && cols % PAD == 0) {
        for (int i = 0; i < rows * batch; ++i) sums[i] = 0.0f;
        return product_of<WordLanes>(w + first * cols, cols, rows, x, cols, batch, cols, sums, batch);
    }
    for (int64_t row = first; row < last; ++row)
        for (int b = 0; b < batch; ++b)
            sums[(row - first) * batch + b] = dense_row(w + row * cols, x + b * padded(cols), cols);
}

const Decode* decode(Type x, Type values, int64_t batch) {
    static const Decode words{space, prepare, decode_rows<WordsAsTheyAre, WordLanes>};
    static const Decode bytes{space, prepare, decode_rows<WordsFromBytes, WordLanes>};
    if (x == Type::bf16 && values == Type::bf16) return &words;
    if (x == Type::bf16 && values == Type::i8 && batch > 2) return &bytes;
    return avx512::decode(x, values, batch);
}

Type tile_type(Type x, Type values) {
    return x == Type::bf16 && values != Type::f32 ? Type::bf16 : Type::f32;
}

void product(Type type, const void* tile, int64_t tile_stride, int rows, const void* x, int64_t x_stride, int batch,
             int64_t cols, float* sums, int64_t sums_stride) {
    if (type != Type::bf16)
        return avx512_vnni_path.product(type, tile, tile_stride, rows, x, x_stride, batch, cols, sums, sums_stride);
    product_of<WordLanes>(tile, tile_stride, rows, x, x_stride, batch, cols, sums, sums_stride);
}

bool available() { return avx512_bf16_available(); }

}  // namespace

const Path avx512_path = {
    "avx512",     "AVX-512 with VBMI2, VNNI and bfloat16 dot products", available, tile_type, decode, avx512::expand,
    product, dense, avx512::read, &avx512_sliced};

}  // namespace phx
PHX_TARGET_END
#endif

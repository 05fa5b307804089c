// AVX-512 with VBMI2 and VNNI (Intel from Ice Lake on, AMD from Zen 4 on): everything but bfloat16 dot products.
#include "avx512.h"

#if PHX_X86
#include <immintrin.h>

PHX_TARGET_BEGIN(PHX_AVX512_VNNI)
#include "avx512_row.h"

namespace phx {
namespace {

// Float activations, float or bfloat16 values ----------------------------------------------------------------------

// Rows of x as float32, padded with zeros. With DEALT, 32 columns lie as 16 even ones, then 16 odd ones, as `evens` and
// `odds` take bfloat16 apart.
template <bool DEALT>
const void* prepare_floats(const Input& x, void* space) {
    int64_t stride = padded(x.cols);
    for (int64_t b = 0; b < x.batch; ++b) {
        float* out = static_cast<float*>(space) + b * stride;
        for (int64_t i = 0; i < stride; i += 32) {
            __m512 first, second;
            if (x.type == Type::f32) {
                const float* from = static_cast<const float*>(x.data) + b * x.cols + i;
                first = _mm512_maskz_loadu_ps(first_bits(x.cols - i), from);
                second = _mm512_maskz_loadu_ps(first_bits(x.cols - i - 16), from + 16);
            } else {
                const uint16_t* from = static_cast<const uint16_t*>(x.data) + b * x.cols + i;
                __m256i low = _mm256_maskz_loadu_epi16(first_bits(x.cols - i), from);
                __m256i high = _mm256_maskz_loadu_epi16(first_bits(x.cols - i - 16), from + 16);
                first = as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
                second = as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            }
            if (DEALT) {
                const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
                __m512 evens = _mm512_permutex2var_ps(first, even, second);
                second = _mm512_permutex2var_ps(first, odd, second);
                first = evens;
            }
            _mm512_storeu_ps(out + i, first);
            _mm512_storeu_ps(out + i + 16, second);
        }
    }
    return space;
}

size_t float_space(const Input& x) { return static_cast<size_t>(x.batch * padded(x.cols)) * 4; }

struct FloatLanes {
    using Element = float;
    static constexpr int step = 16;
    static PHX_INLINE __m512 multiply(__m512 acc, __m512i row, __m512i column) {
        return _mm512_fmadd_ps(as_float(row), as_float(column), acc);
    }
};

// bfloat16 values as float32: the even columns of 32, and the odd ones.
struct FloatsFromWords {
    using Values = Words;
    static constexpr int PARTS = 2;
    static PHX_INLINE void split(__m512i words, __m512i* parts) {
        parts[0] = _mm512_slli_epi32(words, 16);
        parts[1] = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    }
};

struct FloatsAsTheyAre {
    using Values = Floats;
    static constexpr int PARTS = 1;
    static PHX_INLINE void split(__m512i floats, __m512i* parts) { parts[0] = floats; }
};

struct FloatsFromBytes {
    using Values = Bytes;
    static constexpr int PARTS = 4;
    static PHX_INLINE void split(__m512i bytes, __m512i* parts) {
        for (int part = 0; part < 4; ++part) parts[part] = _mm512_castps_si512(byte_floats(bytes, part));
    }
};

}  // namespace
}  // namespace phx

#include "avx512_fixed.h"

namespace phx {
namespace {

// Tiles --------------------------------------------------------------------------------------------------------------

void expand_words(const Matrix& w, int64_t row, uint16_t* out) {
    walk_row<Words>(w, row, [&](int64_t at, const __m512i(&expanded)[1]) PHX_LAMBDA {
        const __m512i words = expanded[0];
        _mm512_mask_storeu_epi16(out + at * 32, first_bits(w.cols - at * 32), words);
    });
}

void expand_words_to_floats(const Matrix& w, int64_t row, float* out) {
    walk_row<Words>(w, row, [&](int64_t at, const __m512i(&expanded)[1]) PHX_LAMBDA {
        const __m512i words = expanded[0];
        __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
        float* to = out + at * 32;
        _mm512_mask_storeu_epi32(to, first_bits(w.cols - at * 32), _mm512_slli_epi32(low, 16));
        _mm512_mask_storeu_epi32(to + 16, first_bits(w.cols - at * 32 - 16), _mm512_slli_epi32(high, 16));
    });
}

void expand_floats(const Matrix& w, int64_t row, float* out) {
    walk_row<Floats>(w, row, [&](int64_t at, const __m512i(&expanded)[1]) PHX_LAMBDA {
        const __m512i floats = expanded[0];
        _mm512_mask_storeu_epi32(out + at * 16, first_bits(w.cols - at * 16), floats);
    });
}

void expand_bytes_to_floats(const Matrix& w, int64_t row, float* out) {
    walk_row<Bytes>(w, row, [&](int64_t at, const __m512i(&expanded)[1]) PHX_LAMBDA {
        const __m512i bytes = expanded[0];
        for (int part = 0; part < 4; ++part) {
            int64_t place = at * 64 + part * 16;
            _mm512_mask_storeu_ps(out + place, first_bits(w.cols - place), byte_floats(bytes, part));
        }
    });
}

void expand_bytes_to_words(const Matrix& w, int64_t row, uint16_t* out) {
    walk_row<Bytes>(w, row, [&](int64_t at, const __m512i(&expanded)[1]) PHX_LAMBDA {
        for (int half = 0; half < 2; ++half) {
            int64_t place = at * 64 + half * 32;
            _mm512_mask_storeu_epi16(out + place, first_bits(w.cols - place), byte_words(expanded[0], half));
        }
    });
}

Type tile_type(Type, Type) { return Type::f32; }

void product(Type, const void* tile, int64_t tile_stride, int rows, const void* x, int64_t x_stride, int batch,
             int64_t cols, float* sums, int64_t sums_stride) {
    product_of<FloatLanes>(tile, tile_stride, rows, x, x_stride, batch, cols, sums, sums_stride);
}

bool available() { return avx512_vnni_available(); }

}  // namespace

namespace avx512 {

const Decode* decode(Type x, Type values, int64_t batch) {
    static const Decode words{float_space, prepare_floats<true>, decode_rows<FloatsFromWords, FloatLanes>};
    static const Decode floats{float_space, prepare_floats<false>, decode_rows<FloatsAsTheyAre, FloatLanes>};
    static const Decode bytes{float_space, prepare_floats<false>, decode_rows<FloatsFromBytes, FloatLanes>};
    static const Decode fixed3{fixed_space<3>, prepare_fixed<3>, decode_fixed<3>};
    static const Decode fixed4{fixed_space<4>, prepare_fixed<4>, decode_fixed<4>};
    if (values == Type::i8) return batch > 2 ? &bytes : x == Type::bf16 ? &fixed3 : &fixed4;
    return values == Type::bf16 ? &words : &floats;
}

void expand(const Matrix& w, int64_t row, Type to, void* out) {
    if (to == Type::bf16) {
        auto* words = static_cast<uint16_t*>(out);
        return w.type == Type::i8 ? expand_bytes_to_words(w, row, words) : expand_words(w, row, words);
    }
    auto* floats = static_cast<float*>(out);
    if (w.type == Type::i8) return expand_bytes_to_floats(w, row, floats);
    return w.type == Type::bf16 ? expand_words_to_floats(w, row, floats) : expand_floats(w, row, floats);
}

uint64_t read(const uint8_t* data, int64_t bytes) {
    __m512i acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = _mm512_setzero_si512();
    int64_t at = 0;
    for (; at + 256 <= bytes; at += 256) {
        for (int i = 0; i < 4; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(data + at + 64 * i) + 4096, _MM_HINT_T1);
            acc[i] = _mm512_add_epi64(acc[i], _mm512_loadu_si512(data + at + 64 * i));
        }
    }
    __m512i all = _mm512_add_epi64(_mm512_add_epi64(acc[0], acc[1]), _mm512_add_epi64(acc[2], acc[3]));
    uint64_t lanes[8], sum = 0;
    _mm512_storeu_si512(lanes, all);
    for (int i = 0; i < 8; ++i) sum += lanes[i];
    for (; at < bytes; ++at) sum += data[at];
    return sum;
}

}  // namespace avx512

const Path avx512_vnni_path = {
    "avx512-vnni", "AVX-512 with VBMI2 and VNNI, products in float32", available, tile_type, avx512::decode,
    avx512::expand, product, nullptr, avx512::read, nullptr};

}  // namespace phx
PHX_TARGET_END
#endif

// Products with sliced matrices: look-ups with VBMI's byte permutations, bfloat16 dot products.
#include "avx512.h"
#include "sliced.h"

#if PHX_X86
#include <immintrin.h>

PHX_TARGET_BEGIN(PHX_AVX512_BF16)
namespace phx {
namespace {

// Fetch a step some time before its use: into the L1, if it is long and one plane leaves room there, or from further
// ahead into the L2.
template <int P, int64_t BYTES>
PHX_INLINE void fetch(const uint8_t* step) {
    for (int64_t line = 0; line < BYTES; line += 64) {
        const char* at = reinterpret_cast<const char*>(step) + line;
        if (P == 1 && BYTES > 2 * STEP) {
            _mm_prefetch(at + 4 * 1024, _MM_HINT_T0);
        } else {
            _mm_prefetch(at + (P == 1 ? 8 : 16) * 1024, _MM_HINT_T1);
        }
    }
}

PHX_INLINE __m512 dot(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

PHX_INLINE void store_byte(uint8_t* to, __m512i floats, int shift) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(floats, shift)));
}

bool prepare(const void* x, Type type, int64_t cols, uint8_t* planes) {
    const int64_t width = reach(cols);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    __mmask16 infinite = 0;
    for (int64_t at = 0; at < width; at += 16) {
        const __mmask16 some = static_cast<__mmask16>(first_bits(cols - at));
        __m512i floats;
        if (type == Type::f32) {
            floats = _mm512_maskz_loadu_epi32(some, static_cast<const float*>(x) + at);
        } else {
            __m256i words = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(x) + at);
            floats = _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
        }
        infinite |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(floats, exponent), exponent);
        for (int plane = 0; plane < planes_of(type); ++plane) {
            // Cut off, not rounded: what is left is exact, and 8 bits are left for the last plane.
            const __m512i cut = _mm512_and_si512(floats, upper);
            store_byte(planes + plane * 2 * width + at, cut, 24);
            store_byte(planes + (plane * 2 + 1) * width + at, cut, 16);
            floats = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(floats), _mm512_castsi512_ps(cut)));
        }
    }
    return infinite == 0;
}

struct Words {
    static constexpr int64_t bytes = STEP * 3;
    PHX_INLINE void load(const uint8_t* values, __m512i (&weights)[2]) const {
        weights[0] = _mm512_loadu_si512(values);
        weights[1] = _mm512_loadu_si512(values + 64);
    }
};

// Both bytes of 0..127 as bfloat16.
struct Codes {
    uint8_t upper[128], lower[128];

    constexpr Codes() : upper{}, lower{} {
        for (int value = 1; value < 128; ++value) {
            int exponent = 0;
            while (value >> (exponent + 1)) ++exponent;
            const int word = (127 + exponent) << 7 | (value << (7 - exponent) & 0x7f);
            upper[value] = static_cast<uint8_t>(word >> 8);
            lower[value] = static_cast<uint8_t>(word & 0xff);
        }
    }
};

alignas(64) constexpr Codes codes;

struct Bytes {
    static constexpr int64_t bytes = STEP * 2;
    __m512i upper[2], lower[2];

    PHX_INLINE Bytes() {
        for (int half = 0; half < 2; ++half) {
            upper[half] = _mm512_load_si512(codes.upper + 64 * half);
            lower[half] = _mm512_load_si512(codes.lower + 64 * half);
        }
    }
    PHX_INLINE void load(const uint8_t* values, __m512i (&weights)[2]) const {
        const __m512i code = _mm512_loadu_si512(values), sign = _mm512_set1_epi8(static_cast<char>(0x80));
        const __m512i low = _mm512_permutex2var_epi8(lower[0], code, lower[1]);
        __m512i high = _mm512_permutex2var_epi8(upper[0], code, upper[1]);
        high = _mm512_ternarylogic_epi64(high, code, sign, 0xf8);  // high | (code & sign)
        weights[0] = _mm512_unpacklo_epi8(low, high);
        weights[1] = _mm512_unpackhi_epi8(low, high);
    }
};

template <class V, int P>
void rows_of(const Sliced& w, int64_t slice, const uint8_t* planes, float* sums, int64_t stride) {
    const int64_t width = reach(w.cols), first = w.starts[slice], last = w.starts[slice + 1];
    const uint8_t* at = w.steps + first * V::bytes;
    const V values;
    __m512 acc[P][2];
    for (int p = 0; p < P; ++p) acc[p][0] = acc[p][1] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int64_t step = first; step < last; ++step, at += V::bytes) {
        fetch<P, V::bytes>(at);
        const uint8_t* window = planes + w.windows[step] * static_cast<int64_t>(UNIT);
        const __m512i positions = _mm512_loadu_si512(at);
        __m512i weights[2];
        values.load(at + STEP, weights);
        for (int p = 0; p < P; ++p) {
            const uint8_t* upper = window + p * 2 * width;
            const uint8_t* lower = upper + width;
            const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(upper), positions,
                                                          _mm512_loadu_si512(upper + 64));
            const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(lower), positions,
                                                         _mm512_loadu_si512(lower + 64));
            acc[p][0] = dot(acc[p][0], weights[0], _mm512_unpacklo_epi8(low, high));
            acc[p][1] = dot(acc[p][1], weights[1], _mm512_unpackhi_epi8(low, high));
        }
    }
    for (int p = 0; p < P; ++p) {
        alignas(64) float lanes[SLICE];
        _mm512_store_ps(lanes, _mm512_add_ps(acc[p][0], acc[p][1]));
        for (int lane = 0; lane < SLICE; ++lane) sums[lane * stride + p] = lanes[lane];
    }
}

template <class V>
void rows_by(const Sliced& w, int64_t slice, const uint8_t* planes, int count, float* sums, int64_t stride) {
    switch (count) {
        case 1: return rows_of<V, 1>(w, slice, planes, sums, stride);
        case 2: return rows_of<V, 2>(w, slice, planes, sums, stride);
        case 3: return rows_of<V, 3>(w, slice, planes, sums, stride);
        case 4: return rows_of<V, 4>(w, slice, planes, sums, stride);
        case 5: return rows_of<V, 5>(w, slice, planes, sums, stride);
        case 6: return rows_of<V, 6>(w, slice, planes, sums, stride);
        case 7: return rows_of<V, 7>(w, slice, planes, sums, stride);
        default: return rows_of<V, 8>(w, slice, planes, sums, stride);
    }
}

void rows(const Sliced& w, int64_t slice, const uint8_t* planes, int count, float* sums, int64_t stride) {
    if (w.type == Type::i8) return rows_by<Bytes>(w, slice, planes, count, sums, stride);
    return rows_by<Words>(w, slice, planes, count, sums, stride);
}

}  // namespace

const SlicedKernel avx512_sliced = {prepare, rows};

}  // namespace phx
PHX_TARGET_END
#endif

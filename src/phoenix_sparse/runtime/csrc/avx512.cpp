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

// int8 values --------------------------------------------------------------------------------------------------------
//
// Activations become whole numbers, each block of 4096 columns with a scale of its own: of
// 22 bits and sign for bfloat16 x (DIGITS = 3), of 30 for float32 (DIGITS = 4), written as digits of base 256, each
// -128..127. A weight times a digit is what VPDPBUSD multiplies and adds, exactly. Its weights are unsigned, so
// 128 is added to each (a zero that the bitmask left out becomes 128, too), and 128 times the digits' sum is taken off
// by starting the sum there. The result differs from the exact one by at most |w| 2^-22 max|x| a term for
// bfloat16 and 2^-30 for float32, max over the block.

constexpr int64_t BLOCK = 4096;

template <int DIGITS>
struct FixedBlock {
    int8_t digits[BLOCK / 64][DIGITS][64];
    int32_t start[DIGITS][16];  // of each lane: -128 times the digits that it will have met
    float scale[16];            // of each digit, the rest unused
};

template <int DIGITS>
size_t fixed_space(const Input& x) {
    return static_cast<size_t>(x.batch * ((x.cols + BLOCK - 1) / BLOCK)) * sizeof(FixedBlock<DIGITS>);
}

// 2^exponent, for exponents of normal numbers.
PHX_INLINE float power_of_two(int exponent) {
    uint32_t word = static_cast<uint32_t>(exponent + 127) << 23;
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
}

// One block of `cols` columns, a multiple of 64. False: some are infinite.
template <int DIGITS>
bool fix_block(const float* x, int64_t cols, FixedBlock<DIGITS>* out) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();  // floats of one sign are ordered as integers are, NaN above them all
    for (int64_t i = 0; i < cols; i += 16) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + i)));
    }
    uint32_t top = _mm512_reduce_max_epu32(largest);
    if (top >= 0x7f800000u) return false;
    int exponent = static_cast<int>(top >> 23) - 127;
    if (exponent < -90) exponent = -90;  // below it powers of two would leave float32; so small a block may lose bits
    // |x| < 2^(exponent + 1), so whole numbers stay below 2^(8 DIGITS - 2), and the highest digit within a byte.
    const int shift = 8 * DIGITS - 3 - exponent;
    const __m512 factor = _mm512_set1_ps(power_of_two(shift));
    for (int d = 0; d < 16; ++d) out->scale[d] = d < DIGITS ? power_of_two(8 * d - shift) : 0.0f;
    __m512i start[DIGITS];
    for (int d = 0; d < DIGITS; ++d) start[d] = _mm512_setzero_si512();
    for (int64_t chunk = 0; chunk < cols / 64; ++chunk) {
        for (int part = 0; part < 4; ++part) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(factor, _mm512_loadu_ps(x + chunk * 64 + part * 16)));
            for (int d = 0; d < DIGITS; ++d) {
                __m128i digit = _mm512_cvtepi32_epi8(whole);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(&out->digits[chunk][d][part * 16]), digit);
                whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, _mm512_cvtepi8_epi32(digit)), 8);
            }
        }
        for (int d = 0; d < DIGITS; ++d) {
            __m512i digits = _mm512_loadu_si512(&out->digits[chunk][d][0]);
            start[d] = _mm512_dpbusd_epi32(start[d], _mm512_set1_epi8(static_cast<char>(128)), digits);
        }
    }
    for (int d = 0; d < DIGITS; ++d)
        _mm512_storeu_si512(&out->start[d][0], _mm512_sub_epi32(_mm512_setzero_si512(), start[d]));
    return true;
}

template <int DIGITS>
const void* prepare_fixed(const Input& x, void* space) {
    auto* out = static_cast<FixedBlock<DIGITS>*>(space);
    for (int64_t b = 0; b < x.batch; ++b) {
        for (int64_t i = 0; i < x.cols; i += BLOCK, ++out) {
            int64_t left = x.cols - i < BLOCK ? x.cols - i : BLOCK;
            alignas(64) float floats[BLOCK];
            const Input part{static_cast<const char*>(x.data) + (b * x.cols + i) * bytes_of(x.type), 1, left, x.type};
            prepare_floats<false>(part, floats);
            if (!fix_block<DIGITS>(floats, padded(left), out)) return nullptr;
        }
    }
    return space;
}

template <int DIGITS, int B>
struct FixedRows {
    template <int R, bool GUARDED>
    struct Kernel {
        static PHX_INLINE void run(const Matrix& w, int64_t row, float* sums, const FixedBlock<DIGITS>* x) {
            const int64_t blocks = (w.cols + BLOCK - 1) / BLOCK;
            const __m512i middle = _mm512_set1_epi8(static_cast<char>(0x80));
            __m512 acc[R][B];
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_ps();
            Walk<Bytes, R, GUARDED> walk(w, row);
            for (int64_t block = 0; block < blocks; ++block) {
                const FixedBlock<DIGITS>* here = x + block;
                __m512i inner[R][B][DIGITS];
                for (int b = 0; b < B; ++b) {
                    for (int d = 0; d < DIGITS; ++d) {
                        const __m512i start = _mm512_loadu_si512(&here[b * blocks].start[d][0]);
                        for (int r = 0; r < R; ++r) inner[r][b][d] = start;
                    }
                }
                const int64_t first = block * BLOCK, last = first + BLOCK < w.cols ? first + BLOCK : w.cols;
                walk.run(first, last, [&](int64_t at, __m512i(&expanded)[R]) PHX_LAMBDA {
                    for (int r = 0; r < R; ++r) expanded[r] = _mm512_xor_si512(expanded[r], middle);
                    for (int b = 0; b < B; ++b) {
                        for (int d = 0; d < DIGITS; ++d) {
                            const auto& chunk = here[b * blocks].digits[at - block * (BLOCK / 64)];
                            const __m512i digits = _mm512_loadu_si512(&chunk[d][0]);
                            for (int r = 0; r < R; ++r)
                                inner[r][b][d] = _mm512_dpbusd_epi32(inner[r][b][d], expanded[r], digits);
                        }
                    }
                });
                for (int b = 0; b < B; ++b) {
                    for (int d = 0; d < DIGITS; ++d) {
                        const __m512 scale = _mm512_set1_ps(here[b * blocks].scale[d]);
                        for (int r = 0; r < R; ++r)
                            acc[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(inner[r][b][d]), scale, acc[r][b]);
                    }
                }
            }
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) sums[r * B + b] = _mm512_reduce_add_ps(acc[r][b]);
        }
    };
};

template <int DIGITS, int R, int B>
void fixed_rows(const Matrix& w, const FixedBlock<DIGITS>* x, int64_t first, int64_t last, float* sums) {
    rows_by<FixedRows<DIGITS, B>::template Kernel, Bytes, R, B>(w, first, last, sums, x);
}

template <int DIGITS>
void decode_fixed(const Matrix& w, const void* prepared, int batch, int64_t first, int64_t last, float* sums) {
    const auto* x = static_cast<const FixedBlock<DIGITS>*>(prepared);
    if (batch == 1) return fixed_rows<DIGITS, 4, 1>(w, x, first, last, sums);
    return fixed_rows<DIGITS, 2, 2>(w, x, first, last, sums);
}

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

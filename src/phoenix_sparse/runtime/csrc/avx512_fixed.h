// int8 values times activations in fixed point. Included by avx512.cpp only, behind prepare_floats.
#pragma once

namespace phx {
namespace {

// Activations become whole numbers, written as digits of base 256, each -128..127: three for bfloat16 x, four for
// float32. In each block of 4096 columns every lane, to which four of each 64 columns go, has a scale of its own. A
// weight times a digit is what VPDPBUSD multiplies and adds, exactly. Its weights are unsigned, so 128 is added to each
// (a zero that the bitmask left out becomes 128, too), and 128 times the digits' sum is taken off by starting the sum
// there. The result differs from the exact one by at most |w| 2^-23 max|x| a term for bfloat16 and 2^-31 for float32,
// max over the lane's columns of the block.
//
// What bounds the loop on Zen 4 is the two pipes that VPDPBUSD runs on, of which masks and expansions take a part, too.
// A bfloat16 has 8 bits, so only x below 2^-7 of a lane's largest have a lowest digit other than 0: few, if x is about
// normally distributed. Where no two of four successive chunks of 64 columns have one in the same place, the lowest
// digits of all four are multiplied at once, with weights that are picked from the four chunks place by place.

constexpr int64_t BLOCK = 4096;
constexpr int64_t GROUP = 256;  // columns of four chunks

template <int DIGITS>
struct FixedBlock {
    int8_t digits[BLOCK / 64][DIGITS][64];  // the lowest first
    int8_t merged[BLOCK / GROUP][64];       // the lowest digits of four chunks, where these don't collide
    bool merges[BLOCK / GROUP];             // whether so; then the chunks' own say by 0 or -1 whose weight it takes
    bool some_merge;                        // whether enough of them do; else none are treated so
    int32_t start[DIGITS][16];              // of each lane: -128 times the digits that it will have met
    float scale[DIGITS][16];                // of each lane
};

template <int DIGITS>
size_t fixed_space(const Input& x) {
    return static_cast<size_t>(x.batch * ((x.cols + BLOCK - 1) / BLOCK)) * sizeof(FixedBlock<DIGITS>);
}

// One block of `cols` columns, a multiple of 64. False: some are infinite.
template <int DIGITS>
bool fix_block(const float* x, int64_t cols, FixedBlock<DIGITS>* out) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), exponents = _mm512_set1_epi32(0x7f800000);
    __m512 factor[4];
    for (int part = 0; part < 4; ++part) {
        __m512i largest = _mm512_setzero_si512();  // floats of one sign are ordered as integers are, NaN above them all
        for (int64_t i = 16 * part; i < cols; i += 64)
            largest = _mm512_max_epu32(largest, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + i)));
        // Of four columns, which make up a lane.
        largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_CDAB));
        largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_BADC));
        if (_mm512_cmpge_epu32_mask(largest, exponents)) return false;
        // 2^exponent, so that |x| < 2^(exponent + 1), and by so much that no carry makes 128 of the highest digit.
        __m512i top = _mm512_and_si512(_mm512_add_epi32(largest, _mm512_set1_epi32(1 << 16)), exponents);
        // Below 2^-90 powers of two would leave float32; so small a lane may lose bits.
        top = _mm512_max_epu32(top, _mm512_set1_epi32((127 - 90) << 23));
        // Whole numbers stay below 2^(8 DIGITS - 1). Powers of two are divided by taking off exponents.
        constexpr uint32_t UP = 8 * DIGITS - 2;
        factor[part] = as_float(_mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>((2 * 127 + UP) << 23)), top));
        for (int d = 0; d < DIGITS; ++d) {
            const __m512i scale = _mm512_sub_epi32(top, _mm512_set1_epi32(static_cast<int>((UP - 8 * d) << 23)));
            _mm_storeu_ps(&out->scale[d][4 * part],
                          _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, as_float(scale))));
        }
    }
    __m512i start[DIGITS];
    for (int d = 0; d < DIGITS; ++d) start[d] = _mm512_setzero_si512();
    for (int64_t chunk = 0; chunk < cols / 64; ++chunk) {
        for (int part = 0; part < 4; ++part) {
            __m512i whole =
                _mm512_cvtps_epi32(_mm512_mul_ps(factor[part], _mm512_loadu_ps(x + chunk * 64 + part * 16)));
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

// Merge the lowest digits of each four whole chunks, where there is but one in each place.
template <int DIGITS>
void merge(int64_t cols, FixedBlock<DIGITS>* block) {
    const int64_t groups = (cols + GROUP - 1) / GROUP, whole = cols / GROUP;
    int64_t count = 0;
    for (int64_t group = 0; group < groups; ++group) {
        __mmask64 taken = 0, collide = 0;
        __m512i all = _mm512_setzero_si512();
        for (int64_t chunk = group * 4; chunk < group * 4 + 4 && group < whole; ++chunk) {
            const __m512i lowest = _mm512_loadu_si512(&block->digits[chunk][0][0]);
            const __mmask64 some = _mm512_test_epi8_mask(lowest, lowest);
            collide |= taken & some;
            taken |= some;
            all = _mm512_or_si512(all, lowest);
        }
        block->merges[group] = group < whole && !collide;
        count += block->merges[group];
        _mm512_storeu_si512(&block->merged[group][0], all);
    }
    // A few alone cost more by leaving the plain loop than they save.
    block->some_merge = count * 2 > groups;
    if (!block->some_merge) return;
    for (int64_t chunk = 0; chunk < whole * 4; ++chunk) {
        if (!block->merges[chunk / 4]) continue;
        int8_t* lowest = &block->digits[chunk][0][0];
        const __m512i digits = _mm512_loadu_si512(lowest);
        _mm512_storeu_si512(lowest, _mm512_movm_epi8(_mm512_test_epi8_mask(digits, digits)));
    }
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
            if (x.batch == 1) merge<DIGITS>(left, out);
        }
    }
    return space;
}

// sums += weights times digits. With the intrinsic gcc copies all of a loop's sums before a step and after it.
PHX_INLINE void multiply(__m512i& sums, __m512i weights, __m512i digits) {
    __asm__("vpdpbusd %[digits], %[weights], %[sums]"
            : [sums] "+v"(sums)
            : [weights] "v"(weights), [digits] "v"(digits));
}

// Bit by bit: mine ? theirs : others.
PHX_INLINE __m512i pick(__m512i others, __m512i mine, __m512i theirs) {
    return _mm512_ternarylogic_epi64(others, mine, theirs, 0xb8);
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
                // Multiply with the chunk's digits, from the `lowest` on.
                const auto step = [&](int64_t at, __m512i(&expanded)[R], int lowest) PHX_LAMBDA {
                    for (int r = 0; r < R; ++r) expanded[r] = _mm512_xor_si512(expanded[r], middle);
                    for (int b = 0; b < B; ++b) {
                        for (int d = lowest; d < DIGITS; ++d) {
                            const auto& chunk = here[b * blocks].digits[at - block * (BLOCK / 64)];
                            const __m512i digits = _mm512_loadu_si512(&chunk[d][0]);
                            for (int r = 0; r < R; ++r) multiply(inner[r][b][d], expanded[r], digits);
                        }
                    }
                };
                const auto all_digits = [&](int64_t at, __m512i(&expanded)[R]) PHX_LAMBDA { step(at, expanded, 0); };
                if (B > 1 || !here->some_merge) {
                    walk.run(first, last, all_digits);
                } else {
#pragma GCC unroll 1
                    for (int64_t from = first; from < last; from += GROUP) {
                        const int64_t group = (from - first) / GROUP;
                        if (!here->merges[group]) {
                            walk.run(from, from + GROUP < last ? from + GROUP : last, all_digits);
                            continue;
                        }
                        __m512i picked[R];
                        walk.four(from, [&](int64_t at, __m512i(&expanded)[R]) PHX_LAMBDA {
                            step(at, expanded, 1);
                            const __m512i mine = _mm512_loadu_si512(&here->digits[at - block * (BLOCK / 64)][0][0]);
                            for (int r = 0; r < R; ++r)
                                picked[r] = at % 4 ? pick(picked[r], mine, expanded[r]) : expanded[r];
                        });
                        const __m512i digits = _mm512_loadu_si512(&here->merged[group][0]);
                        for (int r = 0; r < R; ++r) multiply(inner[r][0][0], picked[r], digits);
                    }
                }
                for (int b = 0; b < B; ++b) {
                    for (int d = 0; d < DIGITS; ++d) {
                        const __m512 scale = _mm512_loadu_ps(here[b * blocks].scale[d]);
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

}  // namespace
}  // namespace phx

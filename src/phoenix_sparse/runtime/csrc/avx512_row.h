// Walking along one packed row with AVX-512 and VBMI2. Included between PHX_TARGET_BEGIN and PHX_TARGET_END only.
#pragma once

namespace phx {
namespace {

// An expansion waits for what its destination held before, on Zen 4, though it overwrites all of it: 4.8 cycles one after
// the other, instead of 1.3 side by side. A destination that was just set to zero waits for nothing. The compiler would
// drop such a zero, and it gives all expansions of a loop the same register.
#define PHX_EXPAND(instruction, bits, packed)                               \
    __m512i out = _mm512_setzero_si512();                                   \
    __asm__(instruction " %[in], %[out]%{%[mask]%}%{z%}"                    \
            : [out] "+v"(out)                                               \
            : [in] "v"(packed), [mask] "Yk"(bits));                         \
    return out

// Values of 2 bytes, 32 columns a step.
struct Words {
    using Bits = uint32_t;
    using Element = uint16_t;
    static constexpr int step = 32;
    static PHX_INLINE int count(Bits bits) { return _mm_popcnt_u32(bits); }
    static PHX_INLINE __m512i expand(__mmask32 bits, __m512i packed) { PHX_EXPAND("vpexpandw", bits, packed); }
    static PHX_INLINE __m512i load_some(const Element* from, int count) {
        return _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), from);
    }
};

// Values of 1 byte, 64 columns a step.
struct Bytes {
    using Bits = uint64_t;
    using Element = uint8_t;
    static constexpr int step = 64;
    static PHX_INLINE int count(Bits bits) { return static_cast<int>(_mm_popcnt_u64(bits)); }
    static PHX_INLINE __m512i expand(__mmask64 bits, __m512i packed) { PHX_EXPAND("vpexpandb", bits, packed); }
    static PHX_INLINE __m512i load_some(const Element* from, int count) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, count), from);
    }
};

// Values of 4 bytes, 16 columns a step.
struct Floats {
    using Bits = uint16_t;
    using Element = uint32_t;
    static constexpr int step = 16;
    static PHX_INLINE int count(Bits bits) { return _mm_popcnt_u32(bits); }
    static PHX_INLINE __m512i expand(__mmask16 bits, __m512i packed) { PHX_EXPAND("vpexpandd", bits, packed); }
    static PHX_INLINE __m512i load_some(const Element* from, int count) {
        return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(_bzhi_u32(~0u, count)), from);
    }
};

// R rows, walked along side by side.
//
// A load takes a whole register, though the step may have few values. GUARDED loads take no more than the step has,
// for the rows at the end of the values, behind which no memory need be readable.
template <class V, int R, bool GUARDED>
struct Walk {
    using Bits = typename V::Bits;

    const uint8_t* bitmask;  // of the first row
    int64_t row_bytes;
    const typename V::Element* values[R];
    // What comes so many bytes later is fetched meanwhile, into the L2 (the L1 keeps too few misses in flight): the
    // hardware's own prefetching stops at each page of 4 KiB, which is about a row.
    static constexpr int64_t VALUES_AHEAD = 32 * 1024, BITMASK_AHEAD = 4 * 1024;
    const char* next_values;
    const char* next_bitmask;
    int lines;  // of values, for four steps here

    PHX_INLINE Walk(const Matrix& w, int64_t row) {
        const auto* all = static_cast<const typename V::Element*>(w.values);
        const int64_t* offsets = w.offsets + row;
        row_bytes = w.row_bytes();
        bitmask = w.bitmask + row * row_bytes;
        for (int r = 0; r < R; ++r) values[r] = all + offsets[r];
        next_values = reinterpret_cast<const char*>(values[0]) + VALUES_AHEAD;
        next_bitmask = reinterpret_cast<const char*>(bitmask) + BITMASK_AHEAD;
        const int64_t bytes = (offsets[R] - offsets[0]) * static_cast<int64_t>(sizeof *all);
        lines = static_cast<int>((bytes * 4 * V::step / w.cols + 63) / 64);
    }

    // Call use(step, expanded) for each step of the columns first..last-1, expanded[r] being the step's columns of row r.
    // `first` is where the walk has come to, a multiple of four steps; so is `last`, or the rows' end.
    template <class Use>
    PHX_INLINE void run(int64_t first, int64_t last, Use use) {
        int64_t at = first / V::step;
        const int64_t whole = last / V::step;
#pragma GCC unroll 1
        for (; at < whole; ++at) {
            if (at % 4 == 0) fetch();
            step(at, use);
        }
        if (last % V::step) {
            // The bitmask's last bytes, and not one beyond them.
            Bits bits[R];
            const int64_t left = (last % V::step + 7) / 8;
            for (int r = 0; r < R; ++r) {
                const uint8_t* from = bitmask + r * row_bytes + at * sizeof(Bits);
                bits[r] = 0;
                for (int64_t i = 0; i < left; ++i)
                    bits[r] = static_cast<Bits>(bits[r] | static_cast<Bits>(from[i]) << (8 * i));
            }
            step_with(at, bits, use);
        }
    }

    // The same for four whole steps of columns.
    template <class Use>
    PHX_INLINE void four(int64_t first, Use use) {
        fetch();
        const int64_t at = first / V::step;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) step(at + i, use);
    }

    PHX_INLINE void fetch() {
        for (int line = 0; line < lines; ++line, next_values += 64) _mm_prefetch(next_values, _MM_HINT_T1);
        constexpr int BITS = R * 4 * static_cast<int>(sizeof(Bits));
        for (int byte = 0; byte < BITS; byte += 64) _mm_prefetch(next_bitmask + byte, _MM_HINT_T1);
        next_bitmask += BITS;
    }

    template <class Use>
    PHX_INLINE void step(int64_t at, Use& use) {
        Bits bits[R];
        for (int r = 0; r < R; ++r)
            __builtin_memcpy(&bits[r], bitmask + r * row_bytes + at * sizeof(Bits), sizeof(Bits));
        step_with(at, bits, use);
    }

    template <class Use>
    PHX_INLINE void step_with(int64_t at, const Bits (&bits)[R], Use& use) {
        __m512i expanded[R];
        for (int r = 0; r < R; ++r) {
            const int count = V::count(bits[r]);
            const __m512i packed = GUARDED ? V::load_some(values[r], count) : _mm512_loadu_si512(values[r]);
            expanded[r] = V::expand(bits[r], packed);
            values[r] += count;
        }
        use(at, expanded);
    }
};

// Whether whole registers can be loaded from the values of these rows.
template <class V>
PHX_INLINE bool unguarded(const Matrix& w, int64_t row, int rows) {
    return w.offsets[row + rows] + V::step <= w.count();
}

// Call use(step, expanded) for each step of one row.
template <class V, class Use>
PHX_INLINE void walk_row(const Matrix& w, int64_t row, Use use) {
    if (unguarded<V>(w, row, 1)) {
        Walk<V, 1, false>(w, row).run(0, w.cols, use);
    } else {
        Walk<V, 1, true>(w, row).run(0, w.cols, use);
    }
}

// Decode some rows with Kernel<R>: R at a time as long as that is safe without guards, then one by one, guarded.
template <template <int, bool> class Kernel, class V, int R, int B, class... More>
PHX_INLINE void rows_by(const Matrix& w, int64_t first, int64_t last, float* sums, More... more) {
    int64_t row = first;
    for (; row + R <= last && unguarded<V>(w, row, R); row += R)
        Kernel<R, false>::run(w, row, sums + (row - first) * B, more...);
    for (; row < last; ++row) Kernel<1, true>::run(w, row, sums + (row - first) * B, more...);
}

PHX_INLINE __m512 as_float(__m512i words) { return _mm512_castsi512_ps(words); }

// A quarter of 64 int8 as float32.
PHX_INLINE __m512 byte_floats(__m512i bytes, int part) {
    __m128i some = part == 0   ? _mm512_castsi512_si128(bytes)
                   : part == 1 ? _mm512_extracti32x4_epi32(bytes, 1)
                   : part == 2 ? _mm512_extracti32x4_epi32(bytes, 2)
                               : _mm512_extracti32x4_epi32(bytes, 3);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some));
}

// A half of 64 int8 as bfloat16. An int8 has no more digits than bfloat16 holds: the upper half of its float32 is all.
PHX_INLINE __m512i byte_words(__m512i bytes, int half) {
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(byte_floats(bytes, 2 * half)), upper,
                                     _mm512_castps_si512(byte_floats(bytes, 2 * half + 1)));
}

// {sum of a, of b, of c, of d}
PHX_INLINE __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 all = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Decode: R rows side by side and all of a small batch, so that a register of x serves R products. From says how
// expanded values become operands, and L how operands are multiplied.
template <class From, class L, int B>
struct Rows {
    template <int R, bool GUARDED>
    struct Kernel {
        static PHX_INLINE void run(const Matrix& w, int64_t row, float* sums, const typename L::Element* x) {
            const int64_t stride = padded(w.cols);
            __m512 acc[R][B];
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_ps();
            Walk<typename From::Values, R, GUARDED> walk(w, row);
            walk.run(0, w.cols, [&](int64_t at, const __m512i(&expanded)[R]) PHX_LAMBDA {
                __m512i weights[R][From::PARTS];
                for (int r = 0; r < R; ++r) From::split(expanded[r], weights[r]);
                for (int b = 0; b < B; ++b) {
                    for (int part = 0; part < From::PARTS; ++part) {
                        __m512i column = _mm512_loadu_si512(x + b * stride + (at * From::PARTS + part) * L::step);
                        for (int r = 0; r < R; ++r) acc[r][b] = L::multiply(acc[r][b], weights[r][part], column);
                    }
                }
            });
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) sums[r * B + b] = _mm512_reduce_add_ps(acc[r][b]);
        }
    };
};

template <class From, class L, int R, int B>
void rows_of(const Matrix& w, const typename L::Element* x, int64_t first, int64_t last, float* sums) {
    rows_by<Rows<From, L, B>::template Kernel, typename From::Values, R, B>(w, first, last, sums, x);
}

template <class From, class L>
void decode_rows(const Matrix& w, const void* prepared, int batch, int64_t first, int64_t last, float* sums) {
    const auto* x = static_cast<const typename L::Element*>(prepared);
    switch (batch) {
        case 1: return rows_of<From, L, 4, 1>(w, x, first, last, sums);
        case 2: return rows_of<From, L, 4, 2>(w, x, first, last, sums);
        case 3: return rows_of<From, L, 4, 3>(w, x, first, last, sums);
        case 4: return rows_of<From, L, 4, 4>(w, x, first, last, sums);
        case 5: return rows_of<From, L, 2, 5>(w, x, first, last, sums);
        case 6: return rows_of<From, L, 2, 6>(w, x, first, last, sums);
        case 7: return rows_of<From, L, 2, 7>(w, x, first, last, sums);
        default: return rows_of<From, L, 2, 8>(w, x, first, last, sums);
    }
}

// The product of a tile's rows (dense, in cache) with activations. L says how a register of each is multiplied.
template <class L, int R, int N>
PHX_INLINE void block(const typename L::Element* tile, int64_t tile_stride, const typename L::Element* x,
                      int64_t x_stride, int64_t cols, float* sums, int64_t sums_stride) {
    __m512 acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < cols; i += L::step) {
        __m512i columns[N];
        for (int n = 0; n < N; ++n) columns[n] = _mm512_loadu_si512(x + n * x_stride + i);
        for (int r = 0; r < R; ++r) {
            __m512i row = _mm512_loadu_si512(tile + r * tile_stride + i);
            for (int n = 0; n < N; ++n) acc[r][n] = L::multiply(acc[r][n], row, columns[n]);
        }
    }
    const __m512 none = _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) {
        __m128 four = sum4(acc[r][0], N > 1 ? acc[r][N > 1 ? 1 : 0] : none, N > 2 ? acc[r][N > 2 ? 2 : 0] : none,
                           N > 3 ? acc[r][N > 3 ? 3 : 0] : none);
        __mmask8 kept = (1 << N) - 1;
        float* at = sums + r * sums_stride;
        _mm_mask_storeu_ps(at, kept, _mm_add_ps(_mm_maskz_loadu_ps(kept, at), four));
    }
}

template <class L, int R>
PHX_INLINE void block_of_rows(const typename L::Element* tile, int64_t tile_stride, const typename L::Element* x,
                              int64_t x_stride, int batch, int64_t cols, float* sums, int64_t sums_stride) {
    switch (batch) {
        case 1: return block<L, R, 1>(tile, tile_stride, x, x_stride, cols, sums, sums_stride);
        case 2: return block<L, R, 2>(tile, tile_stride, x, x_stride, cols, sums, sums_stride);
        case 3: return block<L, R, 3>(tile, tile_stride, x, x_stride, cols, sums, sums_stride);
        default: return block<L, R, 4>(tile, tile_stride, x, x_stride, cols, sums, sums_stride);
    }
}

template <class L>
PHX_INLINE void product_of(const void* tile_data, int64_t tile_stride, int rows, const void* x_data, int64_t x_stride,
                           int batch, int64_t cols, float* sums, int64_t sums_stride) {
    const auto* tile = static_cast<const typename L::Element*>(tile_data);
    const auto* x = static_cast<const typename L::Element*>(x_data);
    constexpr int64_t DEPTH = 4096 / sizeof(typename L::Element);  // 4 rows of x of this many columns stay in the L1
    for (int64_t k = 0; k < cols; k += DEPTH) {
        int64_t depth = cols - k < DEPTH ? cols - k : DEPTH;
        for (int b = 0; b < batch; b += 4) {
            int some = batch - b < 4 ? batch - b : 4;
            int r = 0;
            for (; r + 4 <= rows; r += 4)
                block_of_rows<L, 4>(tile + r * tile_stride + k, tile_stride, x + b * x_stride + k, x_stride, some,
                                    depth, sums + r * sums_stride + b, sums_stride);
            for (; r < rows; ++r)
                block_of_rows<L, 1>(tile + r * tile_stride + k, tile_stride, x + b * x_stride + k, x_stride, some,
                                    depth, sums + r * sums_stride + b, sums_stride);
        }
    }
}

}  // namespace
}  // namespace phx

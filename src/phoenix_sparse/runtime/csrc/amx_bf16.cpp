// Products of FEWEST and more rows of x with AMX's tiles (Intel from Sapphire Rapids on). All else is AVX-512's.
//
// W is the first operand: 16 of its rows and 32 columns, expanded as they are. x is the second, whose registers hold
// pairs of columns, one pair a row, of 16 rows of x; it is brought into that order once a call. A sum's register then
// holds 16 rows of W times 16 rows of x.
#include <immintrin.h>

#include "amx_tiles.h"
#include "call.h"
#include "threads.h"

#if PHX_AMX
PHX_TARGET_BEGIN(PHX_AMX_TARGET)
#include "avx512_row.h"

namespace phx {
namespace {

constexpr int WIDE = tile::ROW_BYTES / 2;   // columns of a tile of W
constexpr int TOGETHER = 4;                 // tiles of W that are expanded before they are multiplied
constexpr int64_t CHUNK = TOGETHER * WIDE;  // their columns
constexpr int64_t CHUNK_BITS = CHUNK / 8;   // and the bytes of a row's bitmask
constexpr int64_t MOST_BLOCKS = 4;          // of 16 rows of x, that one expansion serves

PHX_INLINE int64_t chunks_of(int64_t cols) { return (cols + CHUNK - 1) / CHUNK; }

// A matrix of 16 x 16 words of 32 bits, rows to columns.
PHX_INLINE void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // fours[i + c] holds in quarter q column 4q + c of rows i..i+3.
    __m512i fours[16];
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
        const __m512i later_even = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512i later_odd = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, later_even, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even, later_even, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, later_odd, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(odd, later_odd, 0xdd);
    }
}

// One chunk of columns of 16 rows of x, from `first` on, as TOGETHER tiles that lie `apart` bytes from each other. Rows
// and columns that aren't there are zeros.
void arrange(const Input& x, int64_t first, int64_t chunk, uint8_t* to, int64_t apart) {
    const auto* words = static_cast<const uint16_t*>(x.data) + first * x.cols;
    const int64_t count = x.batch - first < 16 ? x.batch - first : 16;
    for (int s = 0; s < TOGETHER; ++s) {
        const int64_t column = chunk * CHUNK + s * WIDE;
        const auto here = static_cast<__mmask32>(first_bits(x.cols - column));
        __m512i rows[16];
        for (int b = 0; b < 16; ++b)
            rows[b] = b < count && here ? _mm512_maskz_loadu_epi16(here, words + b * x.cols + column)
                                        : _mm512_setzero_si512();
        transpose(rows);
        for (int k = 0; k < 16; ++k) _mm512_store_si512(to + s * apart + k * tile::ROW_BYTES, rows[k]);
    }
}

struct FromWords {
    using Values = Words;
    static PHX_INLINE void store(__m512i words, uint8_t* to) { _mm512_store_si512(to, words); }
};

// A step of 64 columns, which are two tiles'. Scales come to the sums.
struct FromBytes {
    using Values = Bytes;
    static PHX_INLINE void store(__m512i bytes, uint8_t* to) {
        for (int half = 0; half < 2; ++half) _mm512_store_si512(to + half * tile::BYTES, byte_words(bytes, half));
    }
};

// Brings the next 16 rows into the L2, a part as each row of a chunk is expanded: there they are consecutive memory, while
// here each is a stream of its own, which the hardware's prefetching doesn't follow across pages. A whole chunk's at
// once would fill all places for lines on their way, and the expansion would stand until they had come.
struct Ahead {
    const char *values, *bitmask, *values_due, *bitmask_due;
    int64_t some_values, some_bitmask;  // bytes of a part

    PHX_INLINE Ahead(const Matrix& w, int64_t next, int64_t chunks) {
        const int64_t first = next < w.rows ? next : w.rows;
        const int64_t last = first + tile::ROWS < w.rows ? first + tile::ROWS : w.rows;
        const auto size = static_cast<int64_t>(bytes_of(w.type));
        values = values_due = static_cast<const char*>(w.values) + w.offsets[first] * size;
        bitmask = bitmask_due = reinterpret_cast<const char*>(w.bitmask) + first * w.row_bytes();
        const int64_t parts = chunks * tile::ROWS;
        some_values = ((w.offsets[last] - w.offsets[first]) * size + parts - 1) / parts;
        some_bitmask = ((last - first) * w.row_bytes() + parts - 1) / parts;
    }
    PHX_INLINE void fetch() {
        values_due += some_values;
        bitmask_due += some_bitmask;
        for (; values < values_due; values += 64) _mm_prefetch(values, _MM_HINT_T1);
        for (; bitmask < bitmask_due; bitmask += 64) _mm_prefetch(bitmask, _MM_HINT_T1);
    }
};

// Expand the next chunk of ROWS rows, whose bitmasks lie `apart` bytes from each other, into TOGETHER tiles.
template <class From, int ROWS, bool GUARDED>
PHX_INLINE void expand(const uint8_t* bitmask, int64_t apart, const typename From::Values::Element** values,
                       Ahead& ahead, uint8_t* to) {
    using V = typename From::Values;
    constexpr int STEPS = CHUNK / V::step;
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
        ahead.fetch();
        const typename V::Element* from = values[r];
        uint8_t* row = to + r * tile::ROW_BYTES;
        for (int s = 0; s < STEPS; ++s) {
            typename V::Bits bits;
            __builtin_memcpy(&bits, bitmask + r * apart + s * static_cast<int64_t>(sizeof bits), sizeof bits);
            const int count = V::count(bits);
            const __m512i packed = GUARDED ? V::load_some(from, count) : _mm512_loadu_si512(from);
            From::store(V::expand(bits, packed), row + s * (TOGETHER / STEPS) * tile::BYTES);
            from += count;
        }
        values[r] = from;
    }
}

// A product waits for the one before it that adds to the same register, three times as long as the processor needs to
// begin another; with one block of x two registers hold parts of one sum.
template <int N>
constexpr int PARTS = N == 1 ? 2 : 1;

template <int N>
constexpr int SUMS = N * PARTS<N>;

template <int N, int I = 0>
PHX_INLINE void clear() {
    if constexpr (I < SUMS<N>) {
        tile::zero<I>();
        clear<N, I + 1>();
    }
}

template <int N, int I = 0>
PHX_INLINE void keep(uint8_t* sums) {
    if constexpr (I < SUMS<N>) {
        tile::store<I>(sums + I * tile::BYTES);
        keep<N, I + 1>(sums);
    }
}

// One tile of W, the STEP-th of its chunk, times the same columns of N blocks of x: registers 0 to 3 are sums, 4 and 5
// W, 6 and 7 x.
template <int N, int STEP, int BLOCK = 0>
PHX_INLINE void multiply(const uint8_t* weights, const uint8_t* x) {
    if constexpr (BLOCK < N) {
        constexpr int ours = 4 + STEP % 2, theirs = 6 + (STEP * N + BLOCK) % 2;
        if constexpr (BLOCK == 0) tile::load<ours>(weights + STEP * tile::BYTES);
        tile::load<theirs>(x + (STEP * N + BLOCK) * tile::BYTES);
        tile::dot<BLOCK * PARTS<N> + STEP % PARTS<N>, ours, theirs>();
        multiply<N, STEP, BLOCK + 1>(weights, x);
    }
}

// Multiply a chunk, and expand the next one meanwhile unless there is none (`bitmask` is null), a few rows for each
// tile: what expands and what multiplies are different parts of a processor, which looks only some hundred instructions
// ahead to keep both at work. And what was expanded is long in the cache when a tile's load asks for it.
template <class From, int N, bool GUARDED, int STEP = 0>
PHX_INLINE void multiply_and_expand(const uint8_t* weights, const uint8_t* x, const uint8_t* bitmask, int64_t apart,
                                    const typename From::Values::Element** values, Ahead& ahead, uint8_t* next) {
    if constexpr (STEP < TOGETHER) {
        constexpr int SOME = tile::ROWS / TOGETHER;
        if (bitmask) {
            expand<From, SOME, GUARDED>(bitmask + STEP * SOME * apart, apart, values + STEP * SOME, ahead,
                                        next + STEP * SOME * tile::ROW_BYTES);
        }
        multiply<N, STEP>(weights, x);
        multiply_and_expand<From, N, GUARDED, STEP + 1>(weights, x, bitmask, apart, values, ahead, next);
    }
}

// Sums of the 16 rows from `first` on with N blocks of x. GUARDED: behind their values no memory need be readable, or
// some of them aren't there.
template <class From, int N, bool GUARDED>
PHX_INLINE void sum(const Matrix& w, int64_t first, const uint8_t* x, uint8_t* sums) {
    const auto* all = static_cast<const typename From::Values::Element*>(w.values);
    const int64_t bytes = w.row_bytes(), chunks = chunks_of(w.cols);
    const int count = static_cast<int>(w.rows - first < tile::ROWS ? w.rows - first : tile::ROWS);
    const typename From::Values::Element* values[tile::ROWS];
    for (int r = 0; r < tile::ROWS; ++r) values[r] = all + w.offsets[r < count ? first + r : w.rows];
    Ahead ahead(w, first + tile::ROWS, chunks);
    alignas(64) uint8_t weights[2][TOGETHER * tile::BYTES];
    // The bitmask of a chunk: where it is, or where there is less than a whole one, a copy with zeros behind.
    uint8_t last[tile::ROWS][CHUNK_BITS];
    int64_t apart = bytes;
    auto bits_of = [&](int64_t chunk) PHX_LAMBDA {
        const uint8_t* bits = w.bitmask + first * bytes + chunk * CHUNK_BITS;
        const int64_t left = bytes - chunk * CHUNK_BITS;
        if (count == tile::ROWS && left >= CHUNK_BITS) return bits;
        const auto some = static_cast<size_t>(left < CHUNK_BITS ? left : CHUNK_BITS);
        __builtin_memset(last, 0, sizeof last);
        for (int r = 0; r < count; ++r) __builtin_memcpy(last[r], bits + r * bytes, some);
        apart = CHUNK_BITS;
        return static_cast<const uint8_t*>(last[0]);
    };
    clear<N>();
    const uint8_t* bits = bits_of(0);
    expand<From, tile::ROWS, GUARDED>(bits, apart, values, ahead, weights[0]);
#pragma GCC unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        bits = chunk + 1 < chunks ? bits_of(chunk + 1) : nullptr;
        multiply_and_expand<From, N, GUARDED>(weights[chunk % 2], x + chunk * (TOGETHER * N * tile::BYTES), bits, apart,
                                              values, ahead, weights[(chunk + 1) % 2]);
    }
    keep<N>(sums);
}

PHX_INLINE __m512i rounded(__m512 values) {
    const __m512i words = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(words, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(words, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_or_epi32(up, nan, words, _mm512_set1_epi32(0x400000)), 16);
}

// What `finish` of call.h does, for the 16 rows of W from `first` on and the N blocks of x from `row` on.
template <int N>
void finish_block(const Call& call, int64_t first, int64_t row, const uint8_t* sums) {
    const int count = static_cast<int>(call.w.rows - first < tile::ROWS ? call.w.rows - first : tile::ROWS);
    alignas(64) float scales[tile::ROWS], bias[tile::ROWS];
    for (int r = 0; r < tile::ROWS; ++r) {
        scales[r] = call.scales && r < count ? element(call.scales, call.scales_type, first + r) : 1.0f;
        bias[r] = call.bias && r < count ? element(call.bias, call.bias_type, first + r) : 0.0f;
    }
    for (int n = 0; n < N; ++n) {
        __m512i lines[tile::ROWS];
        for (int r = 0; r < tile::ROWS; ++r) {
            const uint8_t* from = sums + n * PARTS<N> * tile::BYTES + r * tile::ROW_BYTES;
            __m512 line = _mm512_load_ps(from);
            for (int part = 1; part < PARTS<N>; ++part)
                line = _mm512_add_ps(line, _mm512_load_ps(from + part * tile::BYTES));
            lines[r] = _mm512_castps_si512(line);
        }
        transpose(lines);
        for (int b = 0; b < 16 && row + n * 16 + b < call.x.batch; ++b) {
            __m512 line = as_float(lines[b]);
            if (call.scales) line = _mm512_mul_ps(line, _mm512_load_ps(scales));
            if (call.bias) line = _mm512_add_ps(line, _mm512_load_ps(bias));
            uint16_t* to = static_cast<uint16_t*>(call.y) + (row + n * 16 + b) * call.w.rows + first;
            _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first_bits(count)),
                                     _mm512_cvtepi32_epi16(rounded(line)));
        }
    }
}

// Write the products of all rows from `first` to `last` with the N blocks of x from `row` on.
template <class From, int N>
void rows_by(const Call& call, int64_t first, int64_t last, int64_t row, const uint8_t* x) {
    const Matrix& w = call.w;
    alignas(64) uint8_t sums[SUMS<N> * tile::BYTES];
    for (; first < last; first += tile::ROWS) {
        if (first + tile::ROWS <= w.rows && unguarded<typename From::Values>(w, first, tile::ROWS)) {
            sum<From, N, false>(w, first, x, sums);
        } else {
            sum<From, N, true>(w, first, x, sums);
        }
        finish_block<N>(call, first, row, sums);
    }
}

// Those of rows first..last-1 with all of x. `first` is a multiple of 16, and so is `last`, or the rows' end.
template <class From>
void rows(const Call& call, int64_t first, int64_t last, const uint8_t* x) {
    const int64_t all = (call.x.batch + 15) / 16;
    tile::configure(tile::full());
    for (int64_t done = 0; done < all; done += MOST_BLOCKS) {
        const uint8_t* part = x + done * chunks_of(call.w.cols) * TOGETHER * tile::BYTES;
        switch (all - done) {
            case 1: rows_by<From, 1>(call, first, last, done * 16, part); break;
            case 2: rows_by<From, 2>(call, first, last, done * 16, part); break;
            case 3: rows_by<From, 3>(call, first, last, done * 16, part); break;
            default: rows_by<From, 4>(call, first, last, done * 16, part);
        }
    }
    tile::release();
}

}  // namespace
}  // namespace phx
PHX_TARGET_END

// Here nothing needs instructions that an older processor lacks: `amx_path` is made when the library is opened.
namespace phx {
namespace {

Result many(const Call& call) {
    // With 14336x4096 at 50% on a Xeon with AMX eight rows take 3.8 ms as sixteen do, and with AVX-512 8.1.
    constexpr int64_t FEWEST = 5;
    const Matrix& w = call.w;
    if (call.x.batch < FEWEST || call.x.type != Type::bf16 || w.type == Type::f32) return NOT_HERE;
    const int64_t chunks = (w.cols + CHUNK - 1) / CHUNK, all = (call.x.batch + 15) / 16;
    auto* x = static_cast<uint8_t*>(x_scratch.get(static_cast<size_t>(all * chunks * TOGETHER * tile::BYTES)));
    if (!x) return NO_MEMORY;
    // MOST_BLOCKS blocks lie together, for each step of columns one block's tile after the other's.
    share_out(threads_for(call, call.x.batch, w.cols), all * chunks, [&](int64_t item) {
        const int64_t block = item / chunks, chunk = item % chunks, first = block / MOST_BLOCKS * MOST_BLOCKS;
        const int64_t some = all - first < MOST_BLOCKS ? all - first : MOST_BLOCKS;
        const int64_t tiles = (first * chunks + chunk * some) * TOGETHER + block - first;
        arrange(call.x, block * 16, chunk, x + tiles * tile::BYTES, some * tile::BYTES);
    });
    // With more rows of x than stay in the L2, what comes from beyond it serves more rows of W.
    const int64_t some = all > MOST_BLOCKS ? 64 : 32;
    share_out(threads_for(call, w.rows, w.cols), (w.rows + some - 1) / some, [&](int64_t item) {
        const int64_t first = item * some, last = first + some < w.rows ? first + some : w.rows;
        if (w.type == Type::i8) return rows<FromBytes>(call, first, last, x);
        rows<FromWords>(call, first, last, x);
    });
    return OK;
}

Path with_tiles(const Path& others, const char* note) {
    Path path = others;
    path.name = "amx";
    path.note = note;
    path.available = amx_available;
    path.many = many;
    return path;
}

}  // namespace

#ifdef PHOENIX_AMX_EMULATED
const Path amx_path = with_tiles(portable_path, "AMX's tiles from 5 rows on, emulated");
#else
const Path amx_path = with_tiles(avx512_path, "AMX's tiles from 5 rows on, AVX-512 with bfloat16 dot products below");
#endif

}  // namespace phx
#endif

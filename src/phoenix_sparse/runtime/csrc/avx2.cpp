// AVX2 with FMA: eight columns, a byte of the bitmap, at a time; its values are moved into place by a table.
#include "kernels.h"

#if PHX_X86
#include <immintrin.h>

namespace phx {
bool avx2_available();

namespace {

// For each byte of a bitmap: which of the values before it a column takes, 0x80 (nothing, to PSHUFB) where it has none.
struct Places {
    uint8_t bytes[256][8];
    uint8_t words[256][16];
    uint8_t counts[256];

    constexpr Places() : bytes{}, words{}, counts{} {
        for (int bits = 0; bits < 256; ++bits) {
            uint8_t count = 0;
            for (int column = 0; column < 8; ++column) {
                bool kept = (bits >> column) & 1;
                bytes[bits][column] = kept ? count : 0x80;
                words[bits][2 * column] = kept ? static_cast<uint8_t>(2 * count) : 0x80;
                words[bits][2 * column + 1] = kept ? static_cast<uint8_t>(2 * count + 1) : 0x80;
                count = static_cast<uint8_t>(count + kept);
            }
            counts[bits] = count;
        }
    }
};

alignas(64) constexpr Places places;

}  // namespace
}  // namespace phx

PHX_TARGET_BEGIN("avx2,fma,bmi,bmi2,popcnt")
namespace phx {
namespace {

struct Words {
    using Element = uint16_t;
    static PHX_INLINE __m256 expand(const Element* values, uint8_t bits) {
        __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(places.words[bits]));
        __m256i wide = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(packed, table));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};

struct Bytes {
    using Element = uint8_t;
    static PHX_INLINE __m256 expand(const Element* values, uint8_t bits) {
        __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        __m128i table = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.bytes[bits]));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(packed, table)));
    }
};

struct Floats {
    using Element = uint32_t;
    static PHX_INLINE __m256 expand(const Element* values, uint8_t bits) {
        __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        __m128i table = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.bytes[bits]));
        __m256i from = _mm256_cvtepi8_epi32(table);  // 0x80 becomes negative
        __m256i moved = _mm256_permutevar8x32_epi32(packed, from);
        return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(from, 31), moved));
    }
};

// Call use(byte, weights) for each byte of a row's bitmap.
template <class V, bool GUARDED, class Use>
PHX_INLINE void walk_as(const uint8_t* bitmask, const typename V::Element* values, int64_t bytes, Use& use) {
    for (int64_t at = 0; at < bytes; ++at) {
        uint8_t bits = bitmask[at];
        int count = places.counts[bits];
        if (GUARDED) {
            // No more than what is there: behind the last values no memory need be readable.
            typename V::Element some[8] = {};
            for (int i = 0; i < count; ++i) some[i] = values[i];
            use(at, V::expand(some, bits));
        } else {
            use(at, V::expand(values, bits));
        }
        values += count;
    }
}

template <class V, class Use>
PHX_INLINE void walk(const Matrix& w, int64_t row, Use use) {
    const uint8_t* bitmask = w.bitmask + row * w.row_bytes();
    const auto* values = static_cast<const typename V::Element*>(w.values) + w.offsets[row];
    if (w.offsets[row + 1] + 8 <= w.count()) {
        walk_as<V, false>(bitmask, values, w.row_bytes(), use);
    } else {
        walk_as<V, true>(bitmask, values, w.row_bytes(), use);
    }
}

PHX_INLINE float sum(__m256 a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

size_t space(const Input& x) { return static_cast<size_t>(x.batch * padded(x.cols)) * 4; }

// Rows of x as float32, padded with zeros.
const void* prepare(const Input& x, void* room) {
    const int64_t stride = padded(x.cols);
    for (int64_t b = 0; b < x.batch; ++b) {
        float* to = static_cast<float*>(room) + b * stride;
        if (x.type == Type::f32) {
            const float* from = static_cast<const float*>(x.data) + b * x.cols;
            for (int64_t i = 0; i < x.cols; ++i) to[i] = from[i];
        } else {
            const uint16_t* from = static_cast<const uint16_t*>(x.data) + b * x.cols;
            for (int64_t i = 0; i < x.cols; ++i) to[i] = from_bf16(from[i]);
        }
        for (int64_t i = x.cols; i < stride; ++i) to[i] = 0.0f;
    }
    return room;
}

template <class V, int B>
void rows_of(const Matrix& w, const float* x, int64_t first, int64_t last, float* sums) {
    const int64_t stride = padded(w.cols);
    for (int64_t row = first; row < last; ++row, sums += B) {
        __m256 acc[B];
        for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_ps();
        walk<V>(w, row, [&](int64_t at, __m256 weights) __attribute__((always_inline)) {
            for (int b = 0; b < B; ++b)
                acc[b] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + b * stride + at * 8), acc[b]);
        });
        for (int b = 0; b < B; ++b) sums[b] = sum(acc[b]);
    }
}

template <class V>
void decode_rows(const Matrix& w, const void* prepared, int batch, int64_t first, int64_t last, float* sums) {
    const auto* x = static_cast<const float*>(prepared);
    switch (batch) {
        case 1: return rows_of<V, 1>(w, x, first, last, sums);
        case 2: return rows_of<V, 2>(w, x, first, last, sums);
        case 3: return rows_of<V, 3>(w, x, first, last, sums);
        default: return rows_of<V, 4>(w, x, first, last, sums);
    }
}

const Decode* decode(Type, Type values, int64_t batch) {
    if (batch > 4) return nullptr;
    static const Decode words{space, prepare, decode_rows<Words>};
    static const Decode bytes{space, prepare, decode_rows<Bytes>};
    static const Decode floats{space, prepare, decode_rows<Floats>};
    return values == Type::bf16 ? &words : values == Type::i8 ? &bytes : &floats;
}

// Both bfloat16 and int8 lie in the upper half of their float32.
PHX_INLINE void store_words(uint16_t* out, __m256 weights) {
    __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(weights), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

template <class V>
void expand_as(const Matrix& w, int64_t row, Type to, void* out) {
    const int64_t whole = w.cols / 8;
    const int rest = static_cast<int>(w.cols % 8);
    walk<V>(w, row, [&](int64_t at, __m256 weights) __attribute__((always_inline)) {
        if (to == Type::f32) {
            float* place = static_cast<float*>(out) + at * 8;
            if (at < whole) return _mm256_storeu_ps(place, weights);
            alignas(32) float some[8];
            _mm256_store_ps(some, weights);
            for (int i = 0; i < rest; ++i) place[i] = some[i];
        } else {
            uint16_t* place = static_cast<uint16_t*>(out) + at * 8;
            if (at < whole) return store_words(place, weights);
            uint16_t some[8];
            store_words(some, weights);
            for (int i = 0; i < rest; ++i) place[i] = some[i];
        }
    });
}

void expand(const Matrix& w, int64_t row, Type to, void* out) {
    if (w.type == Type::bf16) return expand_as<Words>(w, row, to, out);
    return w.type == Type::i8 ? expand_as<Bytes>(w, row, to, out) : expand_as<Floats>(w, row, to, out);
}

Type tile_type(Type, Type) { return Type::f32; }

template <int R, int N>
PHX_INLINE void block(const float* tile, int64_t tile_stride, const float* x, int64_t x_stride, int64_t cols,
                      float* sums, int64_t sums_stride) {
    __m256 acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = _mm256_setzero_ps();
    for (int64_t i = 0; i < cols; i += 8) {
        __m256 columns[N];
        for (int n = 0; n < N; ++n) columns[n] = _mm256_loadu_ps(x + n * x_stride + i);
        for (int r = 0; r < R; ++r) {
            __m256 row = _mm256_loadu_ps(tile + r * tile_stride + i);
            for (int n = 0; n < N; ++n) acc[r][n] = _mm256_fmadd_ps(row, columns[n], acc[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r * sums_stride + n] += sum(acc[r][n]);
}

void product(Type, const void* tile_data, int64_t tile_stride, int rows, const void* x_data, int64_t x_stride,
             int batch, int64_t cols, float* sums, int64_t sums_stride) {
    const auto* tile = static_cast<const float*>(tile_data);
    const auto* x = static_cast<const float*>(x_data);
    constexpr int64_t DEPTH = 1024;
    for (int64_t k = 0; k < cols; k += DEPTH) {
        const int64_t depth = cols - k < DEPTH ? cols - k : DEPTH;
        for (int b = 0; b < batch; b += 3) {
            const int some = batch - b < 3 ? batch - b : 3;
            for (int r = 0; r < rows; r += 4) {
                for (int i = r; i < rows && i < r + 4; i += rows - r >= 4 ? 4 : 1) {
                    const float* from = tile + i * tile_stride + k;
                    const float* columns = x + b * x_stride + k;
                    float* to = sums + i * sums_stride + b;
                    if (rows - r >= 4 && some == 3) {
                        block<4, 3>(from, tile_stride, columns, x_stride, depth, to, sums_stride);
                    } else if (rows - r >= 4) {
                        for (int n = 0; n < some; ++n)
                            block<4, 1>(from, tile_stride, columns + n * x_stride, x_stride, depth, to + n,
                                        sums_stride);
                    } else {
                        for (int n = 0; n < some; ++n)
                            block<1, 1>(from, tile_stride, columns + n * x_stride, x_stride, depth, to + n,
                                        sums_stride);
                    }
                }
            }
        }
    }
}

uint64_t read(const uint8_t* data, int64_t bytes) {
    __m256i acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = _mm256_setzero_si256();
    int64_t at = 0;
    for (; at + 128 <= bytes; at += 128)
        for (int i = 0; i < 4; ++i)
            acc[i] = _mm256_add_epi64(
                acc[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i)));
    alignas(32) uint64_t lanes[4];
    __m256i all = _mm256_add_epi64(_mm256_add_epi64(acc[0], acc[1]), _mm256_add_epi64(acc[2], acc[3]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
    uint64_t rest = 0;
    for (; at < bytes; ++at) rest += data[at];
    return rest + lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

bool available() { return avx2_available(); }

}  // namespace

const Path avx2_path = {"avx2", "AVX2 with FMA, products in float32", available, tile_type, decode,
                        expand, product, nullptr, read, nullptr};

}  // namespace phx
PHX_TARGET_END
#endif

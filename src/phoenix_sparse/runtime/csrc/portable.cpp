// Plain C++ for any processor.
#include "kernels.h"

namespace phx {
namespace {

template <class From, class To, class Convert>
void expand_as(const Matrix& w, int64_t row, To* out, Convert convert) {
    const uint8_t* bitmask = w.bitmask + row * w.row_bytes();
    const From* next = static_cast<const From*>(w.values) + w.offsets[row];
    for (int64_t i = 0; i < w.cols; ++i) {
        bool kept = (bitmask[i / 8] >> (i % 8)) & 1;
        out[i] = kept ? convert(*next) : To{0};
        next += kept;
    }
}

void expand(const Matrix& w, int64_t row, Type to, void* out) {
    if (to == Type::bf16) {
        auto* words = static_cast<uint16_t*>(out);
        if (w.type == Type::bf16) return expand_as<uint16_t>(w, row, words, [](uint16_t value) { return value; });
        return expand_as<int8_t>(w, row, words, [](int8_t value) { return to_bf16(value); });
    }
    auto* floats = static_cast<float*>(out);
    if (w.type == Type::bf16) return expand_as<uint16_t>(w, row, floats, from_bf16);
    if (w.type == Type::f32) return expand_as<float>(w, row, floats, [](float value) { return value; });
    return expand_as<int8_t>(w, row, floats, [](int8_t value) { return static_cast<float>(value); });
}

Type tile_type(Type, Type) { return Type::f32; }

const Decode* decode(Type, Type, int64_t) { return nullptr; }

// Sixteen sums side by side, which a compiler makes registers of.
void product(Type, const void* tile_data, int64_t tile_stride, int rows, const void* x_data, int64_t x_stride,
             int batch, int64_t cols, float* sums, int64_t sums_stride) {
    constexpr int LANES = 16;
    const auto* tile = static_cast<const float*>(tile_data);
    const auto* x = static_cast<const float*>(x_data);
    for (int b = 0; b < batch; ++b) {
        for (int r = 0; r < rows; ++r) {
            const float* row = tile + r * tile_stride;
            const float* column = x + b * x_stride;
            float acc[LANES] = {};
            for (int64_t i = 0; i < cols; i += LANES)
                for (int lane = 0; lane < LANES; ++lane) acc[lane] += row[i + lane] * column[i + lane];
            float all = 0.0f;
            for (int lane = 0; lane < LANES; ++lane) all += acc[lane];
            sums[r * sums_stride + b] += all;
        }
    }
}

uint64_t read(const uint8_t* data, int64_t bytes) {
    uint64_t all = 0;
    int64_t at = 0;
    for (; at + 8 <= bytes; at += 8) {
        uint64_t word;
        __builtin_memcpy(&word, data + at, 8);
        all += word;
    }
    for (; at < bytes; ++at) all += data[at];
    return all;
}

bool available() { return true; }

}  // namespace

const Path portable_path = {"portable", "plain C++, products in float32", available, tile_type, decode,
                            expand,     product, nullptr, read, nullptr};

}  // namespace phx

// One product: what it is given, the scratch memory it works in, and what becomes of its sums.
#pragma once

#include <cstdlib>

#include "kernels.h"

namespace phx {

// All instruction sets, the one that is taken unless another is asked for last.
extern const Path* const paths[];

// Memory that a thread keeps from call to call: what is asked for anew is faulted in anew.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;

    ~Scratch() { std::free(memory); }

    void* get(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(4096, size);
            if (!memory) size = 0;
        }
        return memory;
    }
};

inline thread_local Scratch x_scratch, tile_scratch, sums_scratch;

enum Result : int { OK = 0, NO_MEMORY = 1, NOT_HERE = 2, OTHER_COUNT = 3, NOT_FINITE = 4 };

struct Call {
    const Path& path;
    Matrix w;
    Input x;
    const void* scales;
    const void* bias;
    Type scales_type, bias_type;
    void* y;
    int threads;
};

inline float element(const void* data, Type type, int64_t i) {
    return type == Type::f32 ? static_cast<const float*>(data)[i] : from_bf16(static_cast<const uint16_t*>(data)[i]);
}

// y[b, row] = scale * sum + bias, rounded to y's type once.
inline void finish(const Call& call, int64_t row, const float* sums) {
    const float scale = call.scales ? element(call.scales, call.scales_type, row) : 1.0f;
    const float bias = call.bias ? element(call.bias, call.bias_type, row) : 0.0f;
    for (int64_t b = 0; b < call.x.batch; ++b) {
        float value = sums[b];
        if (call.scales) value *= scale;
        if (call.bias) value += bias;
        const int64_t at = b * call.w.rows + row;
        if (call.x.type == Type::f32) {
            static_cast<float*>(call.y)[at] = value;
        } else {
            static_cast<uint16_t*>(call.y)[at] = to_bf16(value);
        }
    }
}

// Threads that a call is worth: each brings some microseconds of waking and waiting.
inline int threads_for(const Call& call, int64_t rows, int64_t cols) {
    const int64_t worth = rows * cols * (call.x.batch < 8 ? 1 : call.x.batch / 8) / (64 * 1024) + 1;
    return worth < call.threads ? static_cast<int>(worth) : call.threads;
}

}  // namespace phx

// y = x W' with a sliced W: planes of x, threads, rounding.
#include "sliced.h"

#include "call.h"
#include "threads.h"

namespace phx {
namespace {

// Rows of x beyond so many come in turns, as their planes have to lie somewhere.
constexpr int64_t MOST_AT_ONCE = 512;

Result multiply(const Call& call, const Sliced& w) {
    const SlicedKernel& kernel = *call.path.sliced;
    const int64_t batch = call.x.batch, each = planes_of(call.x.type), planes = batch * each;
    const int64_t plane_size = 2 * reach(w.cols);
    auto* x = static_cast<uint8_t*>(x_scratch.get(static_cast<size_t>(planes * plane_size)));
    if (!x) return NO_MEMORY;
    std::atomic<bool> finite{true}, starved{false};
    share_out(threads_for(call, batch, w.cols), batch, [&](int64_t b) {
        const int64_t row_size = w.cols * static_cast<int64_t>(bytes_of(call.x.type));
        const char* row = static_cast<const char*>(call.x.data) + b * row_size;
        if (!kernel.prepare(row, call.x.type, w.cols, x + b * each * plane_size)) finite = false;
    });
    if (!finite) return NOT_FINITE;

    // Some slices are an item of work, and stay in the cache while one group of planes after the other goes through.
    constexpr int64_t ITEM = 128 * 1024;
    const int64_t slices = w.slices(), bytes = w.starts[slices] * w.step_bytes() / slices + 1;
    const int64_t some = bytes >= ITEM ? 1 : ITEM / bytes < 16 ? ITEM / bytes : 16;
    share_out(threads_for(call, w.rows, w.cols / 4), (slices + some - 1) / some, [&](int64_t item) {
        const int64_t first = item * some, last = first + some < slices ? first + some : slices;
        auto* sums = static_cast<float*>(sums_scratch.get(static_cast<size_t>(some * SLICE * planes) * sizeof(float)));
        if (!sums) {
            starved = true;
            return;
        }
        for (int64_t p = 0; p < planes; p += MOST_DECODED) {
            const int count = static_cast<int>(planes - p < MOST_DECODED ? planes - p : MOST_DECODED);
            for (int64_t slice = first; slice < last; ++slice)
                kernel.rows(w, slice, x + p * plane_size, count, sums + (slice - first) * SLICE * planes + p, planes);
        }
        for (int64_t slice = first; slice < last; ++slice) {
            for (int lane = 0; lane < w.lanes(slice); ++lane) {
                float* mine = sums + ((slice - first) * SLICE + lane) * planes;
                if (each == 3)
                    for (int64_t b = 0; b < batch; ++b) mine[b] = mine[3 * b] + (mine[3 * b + 1] + mine[3 * b + 2]);
                finish(call, w.order[slice * SLICE + lane], mine);
            }
        }
    });
    return starved ? NO_MEMORY : OK;
}

}  // namespace
}  // namespace phx

#pragma GCC visibility push(default)
extern "C" {

int phx_path_sliced(int path) { return phx::paths[path]->sliced != nullptr; }

// As phx_linear, with what phx_slice made. NOT_FINITE: x isn't finite, and y undefined.
int phx_sliced(int path, int threads, const uint8_t* steps, const uint16_t* windows, const int64_t* starts,
               const int32_t* order, int64_t rows, int64_t cols, int values_type, const void* scales, const void* bias,
               const void* x, void* y, int64_t batch, int x_type, int scales_type, int bias_type) {
    using phx::Type;
    const auto type = static_cast<Type>(values_type), activations = static_cast<Type>(x_type);
    if (!phx::paths[path]->sliced) return phx::NOT_HERE;
    const phx::Sliced w{steps, windows, starts, order, rows, cols, type};
    for (int64_t b = 0; b < batch && rows; b += phx::MOST_AT_ONCE) {
        const int64_t some = batch - b < phx::MOST_AT_ONCE ? batch - b : phx::MOST_AT_ONCE;
        const int64_t size = static_cast<int64_t>(phx::bytes_of(activations));
        const phx::Call call{*phx::paths[path],
                             {nullptr, nullptr, nullptr, rows, cols, type},
                             {static_cast<const char*>(x) + b * cols * size, some, cols, activations},
                             scales,
                             bias,
                             static_cast<Type>(scales_type),
                             static_cast<Type>(bias_type),
                             static_cast<char*>(y) + b * rows * size,
                             threads};
        if (const phx::Result result = phx::multiply(call, w)) return result;
    }
    return phx::OK;
}

}  // extern "C"
#pragma GCC visibility pop

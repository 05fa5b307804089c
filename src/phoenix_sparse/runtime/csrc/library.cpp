// The C interface, and what all instruction sets have in common: tiles, threads, checks.
#include <cstring>

#include "call.h"
#include "threads.h"

namespace phx {

const Path* const paths[] = {
    &portable_path,
#if PHX_X86 && !defined(PHOENIX_AMX_EMULATED)
    &avx2_path,
    &avx512_vnni_path,
    &avx512_path,
#endif
#if PHX_AMX
    &amx_path,
#endif
};
constexpr int PATHS = sizeof paths / sizeof *paths;

namespace {

constexpr int64_t MOST_ROWS = 64;

// Rows that make up about so many bytes: an item of work. Kernels take four at a time.
int64_t rows_of(const Matrix& w, int64_t bytes) {
    const int64_t all = w.rows * w.row_bytes() + w.count() * static_cast<int64_t>(bytes_of(w.type));
    const int64_t each = all / (w.rows ? w.rows : 1) + 1;
    const int64_t rows = bytes / each / 4 * 4;
    return rows < 4 ? 4 : rows > MOST_ROWS ? MOST_ROWS : rows;
}

Result decode(const Call& call, const Decode& kernel, const void* x) {
    constexpr int64_t ITEM = 128 * 1024;
    const Matrix& w = call.w;
    const int64_t rows = rows_of(w, ITEM);
    const int batch = static_cast<int>(call.x.batch);
    share_out(threads_for(call, w.rows, w.cols), (w.rows + rows - 1) / rows, [&](int64_t item) {
        float sums[MOST_ROWS * MOST_DECODED];
        const int64_t first = item * rows, last = first + rows < w.rows ? first + rows : w.rows;
        kernel.rows(w, x, batch, first, last, sums);
        for (int64_t row = first; row < last; ++row) finish(call, row, sums + (row - first) * batch);
    });
    return OK;
}

// x in the tile's type, its rows padded with zeros. Null: no memory.
const void* widen(const Call& call, Type type) {
    const int64_t stride = padded(call.x.cols), cols = call.x.cols;
    if (type == call.x.type && stride == cols) return call.x.data;
    const size_t size = bytes_of(type);
    auto* room = static_cast<char*>(x_scratch.get(static_cast<size_t>(call.x.batch * stride) * size));
    if (!room) return nullptr;
    share_out(threads_for(call, call.x.batch, cols), call.x.batch, [&](int64_t b) {
        char* to = room + static_cast<size_t>(b * stride) * size;
        const char* from = static_cast<const char*>(call.x.data) +
                           static_cast<size_t>(b * cols) * bytes_of(call.x.type);
        if (type == call.x.type) {
            std::memcpy(to, from, static_cast<size_t>(cols) * size);
        } else {
            auto* floats = reinterpret_cast<float*>(to);
            const auto* words = reinterpret_cast<const uint16_t*>(from);
            for (int64_t i = 0; i < cols; ++i) floats[i] = from_bf16(words[i]);
        }
        std::memset(to + static_cast<size_t>(cols) * size, 0, static_cast<size_t>(stride - cols) * size);
    });
    return room;
}

// Expand some rows into a tile that stays in the cache, and multiply it with all of x.
Result tiles(const Call& call) {
    constexpr int64_t TILE_BYTES = 256 * 1024, TILE_ROWS = 32;
    const Matrix& w = call.w;
    const Type type = call.path.tile_type(call.x.type, w.type);
    const int64_t stride = padded(w.cols), row_size = stride * static_cast<int64_t>(bytes_of(type));
    int64_t rows = TILE_BYTES / row_size / 4 * 4;
    rows = rows < 4 ? 4 : rows > TILE_ROWS ? TILE_ROWS : rows;
    const void* x = widen(call, type);
    if (!x) return NO_MEMORY;
    std::atomic<bool> starved{false};
    share_out(threads_for(call, w.rows, w.cols), (w.rows + rows - 1) / rows, [&](int64_t item) {
        auto* tile = static_cast<char*>(tile_scratch.get(static_cast<size_t>(rows * row_size)));
        auto* sums = static_cast<float*>(sums_scratch.get(static_cast<size_t>(rows * call.x.batch) * sizeof(float)));
        if (!tile || !sums) {
            starved = true;
            return;
        }
        const int64_t first = item * rows, count = first + rows < w.rows ? rows : w.rows - first;
        for (int64_t r = 0; r < count; ++r) {
            char* row = tile + r * row_size;
            call.path.expand(w, first + r, type, row);
            std::memset(row + static_cast<size_t>(w.cols) * bytes_of(type), 0,
                        static_cast<size_t>(stride - w.cols) * bytes_of(type));
        }
        std::memset(sums, 0, static_cast<size_t>(count * call.x.batch) * sizeof(float));
        call.path.product(type, tile, stride, static_cast<int>(count), x, stride, static_cast<int>(call.x.batch),
                          stride, sums, call.x.batch);
        for (int64_t r = 0; r < count; ++r) finish(call, first + r, sums + r * call.x.batch);
    });
    return starved ? NO_MEMORY : OK;
}

// Rows of x beyond so many come in turns: a tile is expanded anew for each, which takes a hundredth of the time.
constexpr int64_t MOST_TILED = 512;

Result linear(const Call& call) {
    if (call.x.batch == 0 || call.w.rows == 0) return OK;
    if (call.x.batch > MOST_TILED) {
        for (int64_t b = 0; b < call.x.batch; b += MOST_TILED) {
            Call some = call;
            const int64_t left = call.x.batch - b;
            const size_t size = bytes_of(call.x.type);
            some.x.batch = left < MOST_TILED ? left : MOST_TILED;
            some.x.data = static_cast<const char*>(call.x.data) + static_cast<size_t>(b * call.x.cols) * size;
            some.y = static_cast<char*>(call.y) + static_cast<size_t>(b * call.w.rows) * size;
            if (Result result = linear(some)) return result;
        }
        return OK;
    }
    if (call.path.many) {
        if (const Result result = call.path.many(call); result != NOT_HERE) return result;
    }
    const Decode* kernel = nullptr;
    if (call.x.batch <= MOST_DECODED) kernel = call.path.decode(call.x.type, call.w.type, call.x.batch);
    if (kernel) {
        void* room = x_scratch.get(kernel->space(call.x) + 1);
        if (!room) return NO_MEMORY;
        if (const void* x = kernel->prepare(call.x, room)) return decode(call, *kernel, x);
    }
    return tiles(call);
}

}  // namespace
}  // namespace phx

#pragma GCC visibility push(default)
extern "C" {

// Changes whenever a function below changes what it takes or does.
int phx_interface() { return 3; }

int phx_paths() { return phx::PATHS; }
const char* phx_path_name(int path) { return phx::paths[path]->name; }
const char* phx_path_note(int path) { return phx::paths[path]->note; }
int phx_path_available(int path) { return phx::paths[path]->available(); }
int phx_path_dense(int path) { return phx::paths[path]->dense != nullptr; }
int phx_have_threads() { return phx::have_threads(); }

// y (batch, rows) = x (batch, cols) W' * scales + bias, in x's type. Types as in phx::Type; scales and bias may be null.
// `count` is how many values there are.
int phx_linear(int path, int threads, const uint8_t* bitmask, const void* values, const int64_t* offsets,
               const void* scales, const void* bias, const void* x, void* y, int64_t rows, int64_t cols,
               int64_t count, int64_t batch, int values_type, int x_type, int scales_type, int bias_type) {
    using phx::Type;
    if (offsets[rows] != count) return phx::OTHER_COUNT;
    const phx::Call call{*phx::paths[path],
                         {bitmask, values, offsets, rows, cols, static_cast<Type>(values_type)},
                         {x, batch, cols, static_cast<Type>(x_type)},
                         scales,
                         bias,
                         static_cast<Type>(scales_type),
                         static_cast<Type>(bias_type),
                         y,
                         threads};
    return phx::linear(call);
}

// Expand rows first..last-1 into `out` (last - first, cols) of type f32, or bf16 for values of bf16 and i8. Scales are
// left to the caller.
int phx_expand(int path, int threads, const uint8_t* bitmask, const void* values, const int64_t* offsets, void* out,
               int64_t rows, int64_t cols, int64_t count, int64_t first, int64_t last, int values_type, int out_type) {
    using phx::Type;
    if (offsets[rows] != count) return phx::OTHER_COUNT;
    const phx::Matrix w{bitmask, values, offsets, rows, cols, static_cast<Type>(values_type)};
    const auto type = static_cast<Type>(out_type);
    const size_t size = static_cast<size_t>(cols) * phx::bytes_of(type);
    constexpr int64_t SOME = 16;
    phx::share_out(threads, (last - first + SOME - 1) / SOME, [&](int64_t item) {
        for (int64_t row = first + item * SOME; row < last && row < first + (item + 1) * SOME; ++row)
            phx::paths[path]->expand(w, row, type, static_cast<char*>(out) + static_cast<size_t>(row - first) * size);
    });
    return phx::OK;
}

// y (batch, rows) = x (batch, cols) W' of bfloat16, with dense W: a packed model's head, and what sparse
// kernels are compared with. Batch up to 8.
int phx_dense(int path, int threads, const uint16_t* w, const uint16_t* x, uint16_t* y, int64_t rows, int64_t cols,
              int64_t batch) {
    using namespace phx;
    const Path& chosen = *paths[path];
    if (!chosen.dense || batch > MOST_DECODED) return NOT_HERE;
    const Input input{x, batch, cols, Type::bf16};
    const Decode* kernel = chosen.decode(Type::bf16, Type::bf16, batch);
    void* room = x_scratch.get(kernel->space(input) + 1);
    if (!room) return NO_MEMORY;
    const void* prepared = kernel->prepare(input, room);
    constexpr int64_t SOME = 16;
    share_out(threads, (rows + SOME - 1) / SOME, [&](int64_t item) {
        float sums[SOME * MOST_DECODED];
        const int64_t first = item * SOME, last = first + SOME < rows ? first + SOME : rows;
        chosen.dense(w, cols, prepared, static_cast<int>(batch), first, last, sums);
        for (int64_t row = first; row < last; ++row)
            for (int64_t b = 0; b < batch; ++b) y[b * rows + row] = to_bf16(sums[(row - first) * batch + b]);
    });
    return OK;
}

// Read memory with all threads; the sum is of no use but to have needed the bytes.
uint64_t phx_read(int path, int threads, const uint8_t* data, int64_t bytes) {
    constexpr int64_t SOME = 128 * 1024;
    std::atomic<uint64_t> all{0};
    phx::share_out(threads, (bytes + SOME - 1) / SOME, [&](int64_t item) {
        const int64_t from = item * SOME, left = bytes - from;
        all += phx::paths[path]->read(data + from, left < SOME ? left : SOME);
    });
    return all;
}

// Whether offsets and bitmask describe `count` values: what every kernel here relies on. 0: they do. Else what is
// wrong: 1 the first offset isn't 0, 2 offsets fall, 3 a row's popcount isn't its offsets' difference, 4 bits beyond
// the last column, 5 the last offset isn't `count`; for 2 to 4, *where is the first such row.
int phx_check(int threads, const uint8_t* bitmask, const int64_t* offsets, int64_t rows, int64_t cols, int64_t count,
              int64_t* where) {
    *where = 0;
    if (offsets[0] != 0) return 1;
    if (offsets[rows] != count) return 5;
    const int64_t bytes = (cols + 7) / 8;
    // Of each row 0, or the wrong that it does; the first one is told, however many threads there are.
    constexpr int64_t SOME = 64;
    std::atomic<int64_t> worst{rows * 8};
    phx::share_out(threads, (rows + SOME - 1) / SOME, [&](int64_t item) {
        for (int64_t row = item * SOME; row < rows && row < (item + 1) * SOME; ++row) {
            const uint8_t* bits = bitmask + row * bytes;
            uint64_t found = 0;
            int64_t i = 0;
            for (; i + 8 <= bytes; i += 8) {
                uint64_t word;
                std::memcpy(&word, bits + i, 8);
                found += static_cast<uint64_t>(__builtin_popcountll(word));
            }
            for (; i < bytes; ++i) found += static_cast<uint64_t>(__builtin_popcountll(bits[i]));
            int wrong = 0;
            if (offsets[row + 1] < offsets[row]) {
                wrong = 2;
            } else if (cols % 8 && bits[bytes - 1] >> (cols % 8)) {
                wrong = 4;
            } else if (static_cast<uint64_t>(offsets[row + 1]) - static_cast<uint64_t>(offsets[row]) != found) {
                wrong = 3;
            }
            if (!wrong) continue;
            int64_t mine = row * 8 + wrong, seen = worst.load();
            while (mine < seen && !worst.compare_exchange_weak(seen, mine)) {
            }
            break;
        }
    });
    if (worst == rows * 8) return 0;
    *where = worst / 8;
    return static_cast<int>(worst % 8);
}

}  // extern "C"
#pragma GCC visibility pop

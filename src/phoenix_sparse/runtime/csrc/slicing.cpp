// Making slices of a packed matrix, and a packed matrix of slices again, to the last bit.
#include <cstring>

#include "call.h"
#include "sliced.h"
#include "threads.h"

namespace phx {
namespace {

// Columns of the kept weights of a row, and where its values begin.
struct Row {
    const int32_t* columns;
    int64_t count, next;
    const uint8_t* values;
};

int64_t columns_of(const uint8_t* bitmask, int64_t bytes, int32_t* columns) {
    int64_t count = 0;
    for (int64_t byte = 0; byte < bytes; ++byte)
        for (unsigned bits = bitmask[byte]; bits; bits &= bits - 1)
            columns[count++] = static_cast<int32_t>(byte * 8 + __builtin_ctz(bits));
    return count;
}

// Walk along the rows of a slice: each step's window begins where the row that is furthest behind has its next value,
// and takes what lies in it of every row. Call use(lane, k, row) for each value, and step(window) before a step's.
template <class Step, class Use>
void walk(Row* rows, int lanes, Step step, Use use) {
    for (;;) {
        int32_t least = INT32_MAX;
        for (int lane = 0; lane < lanes; ++lane) {
            const Row& row = rows[lane];
            if (row.next < row.count && row.columns[row.next] < least) least = row.columns[row.next];
        }
        if (least == INT32_MAX) return;
        const int32_t first = least / UNIT * UNIT;
        step(first);
        for (int lane = 0; lane < lanes; ++lane) {
            Row& row = rows[lane];
            for (int k = 0; k < EACH && row.next < row.count && row.columns[row.next] < first + WINDOW; ++k, ++row.next)
                use(lane, k, row, row.columns[row.next] - first);
        }
    }
}

// Call use(step, position, value) for each value of a lane, columns ascending.
template <class Use>
void each_value(const Sliced& w, int64_t slice, int lane, Use use) {
    const int64_t size = static_cast<int64_t>(bytes_of(w.type));
    for (int64_t step = w.starts[slice]; step < w.starts[slice + 1]; ++step) {
        const uint8_t* here = w.steps + step * w.step_bytes();
        for (int k = 0; k < EACH; ++k) {
            const uint8_t position = here[position_place(lane, k)];
            if (position & EMPTY) continue;
            use(w.windows[step] * static_cast<int64_t>(UNIT) + position,
                here + STEP + value_place(w.type, lane, k) * size);
        }
    }
}

uint16_t word_of(const uint8_t* value, Type type) {
    if (type == Type::i8) return to_bf16(value_of(*value));
    uint16_t word;
    std::memcpy(&word, value, sizeof word);
    return word;
}

}  // namespace
}  // namespace phx

#pragma GCC visibility push(default)
extern "C" {

// Steps of each slice into starts[slice + 1] where `steps` is null; else fill `steps` and `windows`, `starts` being
// the sums of those. The packed matrix is one that `phx_check` passed; `order` holds each of its rows once.
int phx_slice(int threads, const uint8_t* bitmask, const uint8_t* values, const int64_t* offsets, const int32_t* order,
              int64_t rows, int64_t cols, int values_type, int64_t* starts, uint8_t* steps, uint16_t* windows) {
    using namespace phx;
    const Sliced shape{steps, windows, starts, order, rows, cols, static_cast<Type>(values_type)};
    const int64_t size = static_cast<int64_t>(bytes_of(shape.type)), bytes = (cols + 7) / 8;
    std::atomic<bool> starved{false};
    share_out(threads, shape.slices(), [&](int64_t slice) {
        auto* columns = static_cast<int32_t*>(tile_scratch.get(static_cast<size_t>(SLICE * cols) * sizeof(int32_t)));
        if (!columns) {
            starved = true;
            return;
        }
        Row all[SLICE];
        const int lanes = shape.lanes(slice);
        for (int lane = 0; lane < lanes; ++lane) {
            const int64_t row = order[slice * SLICE + lane];
            int32_t* mine = columns + lane * cols;
            all[lane] = {mine, columns_of(bitmask + row * bytes, bytes, mine), 0, values + offsets[row] * size};
        }
        if (!steps) {
            int64_t count = 0;
            walk(all, lanes, [&](int32_t) { ++count; }, [](int, int, const Row&, int32_t) {});
            starts[slice + 1] = count;
            return;
        }
        uint16_t* window = windows + starts[slice];
        uint8_t* here = steps + starts[slice] * shape.step_bytes() - shape.step_bytes();
        walk(
            all, lanes,
            [&](int32_t first) {
                *window++ = static_cast<uint16_t>(first / UNIT);
                here += shape.step_bytes();
                std::memset(here, EMPTY, STEP);
                std::memset(here + STEP, 0, static_cast<size_t>(STEP * size));
            },
            [&](int lane, int k, const Row& row, int32_t position) {
                here[position_place(lane, k)] = static_cast<uint8_t>(position);
                uint8_t* place = here + STEP + value_place(shape.type, lane, k) * size;
                const uint8_t* value = row.values + row.next * size;
                if (shape.type == Type::i8) {
                    *place = code_of(static_cast<int8_t>(*value));
                } else {
                    std::memcpy(place, value, static_cast<size_t>(size));
                }
            });
    });
    return starved ? NO_MEMORY : OK;
}

// How many values each row has into offsets[row + 1] where `bitmask` is null; else fill `bitmask` (zeros before) and
// `values`, `offsets` being the sums of those.
int phx_unslice(int threads, const uint8_t* steps, const uint16_t* windows, const int64_t* starts,
                const int32_t* order, int64_t rows, int64_t cols, int values_type, int64_t* offsets, uint8_t* bitmask,
                uint8_t* values) {
    using namespace phx;
    const Sliced w{steps, windows, starts, order, rows, cols, static_cast<Type>(values_type)};
    const int64_t size = static_cast<int64_t>(bytes_of(w.type)), bytes = (cols + 7) / 8;
    share_out(threads, w.slices(), [&](int64_t slice) {
        for (int lane = 0; lane < w.lanes(slice); ++lane) {
            const int64_t row = order[slice * SLICE + lane];
            int64_t count = 0;
            each_value(w, slice, lane, [&](int64_t column, const uint8_t* value) {
                if (bitmask) {
                    bitmask[row * bytes + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
                    uint8_t* place = values + (offsets[row] + count) * size;
                    if (w.type == Type::i8) {
                        *place = static_cast<uint8_t>(value_of(*value));
                    } else {
                        std::memcpy(place, value, static_cast<size_t>(size));
                    }
                }
                ++count;
            });
            if (!bitmask) offsets[row + 1] = count;
        }
    });
    return OK;
}

// Expand slices first..last-1, row by row in their order, into `out` (rows, cols) of type f32 or bf16. Scales are left
// to the caller.
int phx_expand_slices(int threads, const uint8_t* steps, const uint16_t* windows, const int64_t* starts,
                      const int32_t* order, int64_t rows, int64_t cols, int values_type, int64_t first, int64_t last,
                      void* out, int out_type) {
    using namespace phx;
    const Sliced w{steps, windows, starts, order, rows, cols, static_cast<Type>(values_type)};
    const auto to = static_cast<Type>(out_type);
    const size_t size = static_cast<size_t>(cols) * bytes_of(to);
    share_out(threads, last - first, [&](int64_t item) {
        for (int lane = 0; lane < w.lanes(first + item); ++lane) {
            char* row = static_cast<char*>(out) + static_cast<size_t>(item * SLICE + lane) * size;
            std::memset(row, 0, size);
            each_value(w, first + item, lane, [&](int64_t column, const uint8_t* value) {
                const uint16_t word = word_of(value, w.type);
                if (to == Type::bf16) {
                    reinterpret_cast<uint16_t*>(row)[column] = word;
                } else {
                    reinterpret_cast<float*>(row)[column] = from_bf16(word);
                }
            });
        }
    });
    return OK;
}

}  // extern "C"
#pragma GCC visibility pop

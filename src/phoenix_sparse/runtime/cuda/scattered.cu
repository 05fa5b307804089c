// y = x Wᵀ with W very sparse, value after value, and W's expansion into a dense matrix. scattered.py explains the
// arrays.
//
// No header is included, so that NVRTC compiles this wherever torch runs. Macros given by compiling.py:
//   HALF   0: bfloat16, 1: float16
//   NB     rows of x handled: 1, 2, 4, 8 or 16
//   NW     warps of a block of threads
//   WIDTH  columns of a slab
//
// x lies in shared memory column by column, so that one read fetches a column for up to eight rows of x; sixteen rows
// are two planes of eight. For each value a lane adds a byte times the size of a column to one of eight running
// addresses (one instruction), and reads there. With eight rows of x a read takes the warp in quarters of eight lanes,
// which hit eight different banks where layout and chance agree.

#define AHEAD 3                       // chunks that loads run ahead, in registers
#define WAYS 8                        // running addresses of a lane, and values in a lane's chunk
#define PLANE (NB < 8 ? NB : 8)       // rows of x that one read fetches
#define PLANES (NB / PLANE)
#define BLOCKS (NB < 4 ? 2 : 1)       // of threads that registers suffice for: one may begin while one ends
#define STRIDE (NB == 1 ? 4 : 2 * PLANE)  // bytes of a column; a single row of x is kept in float32

struct Shape {
    int rows, columns, batch;         // of W; of x
    int pitch;                        // values from one row of x, or of the dense matrix, to the next
    int slabs, pieces;                // parts of the columns; lanes for one row of one slab
};

// -- instructions (the tests put others here, to run this file on a CPU)
// Not through ld.global.nc, which the assembler moves behind griddepcontrol.wait.
__device__ __forceinline__ uint4 fetch128(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ uint2 fetch64(const uint2* from) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

// What other kernels or blocks wrote: never read before it is asked for, nor from a cache that doesn't know of it.
__device__ __forceinline__ u32 latest(const u32* from) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ float latest(const float* from) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ float exchange(float v, int bit) { return __shfl_xor_sync(0xffffffffu, v, bit); }

__device__ __forceinline__ u32 broadcast(u32 v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

#if HALF
__device__ __forceinline__ float widen(u32 bits) {
    float v;
    asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(v) : "h"((u16)bits));
    return v;
}
__device__ __forceinline__ float low(u32 pair) { return widen(pair); }
__device__ __forceinline__ float high(u32 pair) { return widen(pair >> 16); }
#else
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif

// -- end of instructions

// A warp's values and deltas: the next AHEAD chunks are on their way, across the ends of tasks. Each warp's first AHEAD
// lie at the front, where they are found without looking anything up; behind the last chunk of all, AHEAD more may be
// read. Chunks keep their registers: to move one up would be to wait for it.
struct Stream {
    const uint4* values;
    const uint2* deltas;
    uint4 v[AHEAD];
    uint2 d[AHEAD];

    __device__ __forceinline__ void start(const uint4* all_values, const uint2* all_deltas, int warp) {
        const u64 first = (u64)(u32)warp * AHEAD * 32 + (threadIdx.x & 31);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            v[i] = fetch128(all_values + first + i * 32);
            d[i] = fetch64(all_deltas + first + i * 32);
        }
    }

    __device__ __forceinline__ void go_on(const uint4* all_values, const uint2* all_deltas, int chunk) {
        values = all_values + (u64)(u32)chunk * 32 + (threadIdx.x & 31);
        deltas = all_deltas + (u64)(u32)chunk * 32 + (threadIdx.x & 31);
    }

    // The one that comes after those on their way, in the place of one that was used.
    __device__ __forceinline__ void refill(int place) {
        v[place] = fetch128(values);
        d[place] = fetch64(deltas);
        values += 32;
        deltas += 32;
    }
};

// What a lane knows of a task: its row (-1: none), and where its ways begin.
struct Task {
    int row, length;                  // length: in chunks
    uint4 starts;

    __device__ __forceinline__ void load(int task, const int* rows, const int* lengths, const uint4* all_starts) {
        const u64 at = (u64)task * 32 + (threadIdx.x & 31);
        row = __ldg(rows + at);
        length = __ldg(lengths + task);
        starts = __ldg(all_starts + at);
    }

    __device__ __forceinline__ void begin(u32* at, u32 base, u32 stride) const {
        const u32 pairs[4] = {starts.x, starts.y, starts.z, starts.w};
#pragma unroll
        for (int k = 0; k < WAYS; ++k) at[k] = base + (k % 2 ? pairs[k / 2] >> 16 : pairs[k / 2] & 0xffff) * stride;
    }
};

__device__ __forceinline__ u32 advance(u32 at, const uint2& deltas, int way, u32 stride) {
    return dot(way < 4 ? deltas.x : deltas.y, stride << way % 4 * 8, at);
}

// One slab of x's columns into shared memory; beyond the last row of x that one again, for sums that nobody keeps.
__device__ __forceinline__ void fill(unsigned char* to, const u16* x, int slab, const Shape& shape) {
    const int from = slab * WIDTH, pairs = min(WIDTH, shape.pitch - from) / 2;
    const u32* columns = (const u32*)(x + from);
    constexpr int at_once = NB < 16 ? 4 : 2;  // loads that hide each other's latency
#pragma unroll at_once
    for (int first = 0; first < WIDTH / 2; first += NW * 32) {
        const int i = first + threadIdx.x;
        u32 two[NB];
#pragma unroll
        for (int n = 0; n < NB; ++n)
            two[n] = latest(columns + (u64)min(n, shape.batch - 1) * (shape.pitch / 2) + min(i, pairs - 1));
        if (i >= pairs) continue;
#pragma unroll
        for (int p = 0; p < PLANES; ++p) {
            unsigned char* here = to + p * (WIDTH * STRIDE) + i * (2 * STRIDE);
#if NB == 1
            *(float2*)here = make_float2(low(two[0]), high(two[0]));
#else
            u32 words[PLANE];
#pragma unroll
            for (int h = 0; h < PLANE / 2; ++h) {
                words[h] = permute(two[p * 8 + 2 * h], two[p * 8 + 2 * h + 1], 0x5410);
                words[h + PLANE / 2] = permute(two[p * 8 + 2 * h], two[p * 8 + 2 * h + 1], 0x7632);
            }
#if NB == 2
            *(uint2*)here = make_uint2(words[0], words[1]);
#else
#pragma unroll
            for (int h = 0; h < PLANE / 4; ++h)
                ((uint4*)here)[h] = make_uint4(words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]);
#endif
#endif
        }
    }
}

__device__ __forceinline__ void add_two(float* sums, float w, u32 two) {
    sums[0] += w * low(two);
    sums[1] += w * high(two);
}

// The products of one chunk, eight values of each lane.
__device__ __forceinline__ void add(float* sums, u32* at, const uint4& values, const uint2& deltas) {
    const u32 pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int k = 0; k < WAYS; ++k) {
        at[k] = advance(at[k], deltas, k, STRIDE);
        const float w = k % 2 ? high(pairs[k / 2]) : low(pairs[k / 2]);
#if NB == 1
        sums[0] += w * __uint_as_float(read32(at[k]));
#elif NB == 2
        add_two(sums, w, read32(at[k]));
#elif NB == 4
        const uint2 four = read64(at[k]);
        add_two(sums, w, four.x);
        add_two(sums + 2, w, four.y);
#else
#pragma unroll
        for (int p = 0; p < PLANES; ++p) {
            const uint4 eight = read128(at[k] + p * (WIDTH * STRIDE));
            add_two(sums + p * 8, w, eight.x);
            add_two(sums + p * 8 + 2, w, eight.y);
            add_two(sums + p * 8 + 4, w, eight.z);
            add_two(sums + p * 8 + 6, w, eight.w);
        }
#endif
    }
}

// Adds up over the lanes of a row. While there is more than one sum a lane, half of them go to the other lane: the lane
// ends with max(1, NB / pieces) sums, for the rows of x that begin at the one given back.
template <int HAVE>
__device__ __forceinline__ int reduce(float* sums, int bit, int pieces) {
    if (bit >= pieces) return 0;
    if constexpr (HAVE == 1) {
#pragma unroll 1
        for (; bit < pieces; bit *= 2) sums[0] += exchange(sums[0], bit);
        return 0;
    } else {
        constexpr int half = HAVE / 2;
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float other = exchange(upper ? sums[i] : sums[i + half], bit);
            sums[i] = (upper ? sums[i + half] : sums[i]) + other;
        }
        return (upper ? half : 0) + reduce<half>(sums, bit * 2, pieces);
    }
}

__device__ __forceinline__ void finish(float* sums, int row, float scale, float bias, int slab, float* parts,
                                       u32* counters, u16* y, const Shape& shape) {
    const int lane = threadIdx.x & 31, piece = lane & (shape.pieces - 1);
    const int first = reduce<NB>(sums, 1, shape.pieces), have = max(1, NB / shape.pieces);
    bool mine = row >= 0 && piece < NB;
    if (shape.slabs > 1) {
        if (mine)
#pragma unroll
            for (int i = 0; i < NB; ++i) {
                if (i >= min(have, shape.batch - first)) break;
                __stcg(&parts[((u64)slab * shape.batch + first + i) * shape.rows + row], sums[i]);
            }
        // Whoever is last of the slabs of this row adds up, always in the same order.
        __threadfence();
        __syncwarp();
        u32 arrived = 0;
        if (piece == 0 && row >= 0) arrived = atomicAdd(&counters[row], 1u);
        mine = broadcast(arrived, lane - piece) == (u32)shape.slabs - 1 && mine;
        if (!mine) return;
        __threadfence();
#pragma unroll
        for (int i = 0; i < NB; ++i) {
            if (i >= min(have, shape.batch - first)) break;
            sums[i] = 0.0f;
#pragma unroll 1
            for (int s = 0; s < shape.slabs; ++s)
                sums[i] += latest(&parts[((u64)s * shape.batch + first + i) * shape.rows + row]);
        }
        if (piece == 0) counters[row] = 0;
    }
    if (mine)
#pragma unroll
        for (int i = 0; i < NB; ++i) {
            if (i >= min(have, shape.batch - first)) break;
            y[(u64)(first + i) * shape.rows + row] = narrow(sums[i] * scale + bias);
        }
}

extern "C" __global__ void __launch_bounds__(NW * 32, BLOCKS)
phx_scattered(const uint4* values, const uint2* deltas, const uint4* starts, const int* rows, const int* lengths,
              const int4* warps, const u16* x, const float* scales, const float* biases, u16* y, float* parts,
              u32* counters, Shape shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int warp = blockIdx.x * NW + (threadIdx.x >> 5);
    const int4 info = __ldg(warps + warp);  // first chunk and task but for those at the front, tasks, slab
    Stream stream;
    stream.start(values, deltas, warp);
    Task next;
    next.load(warp, rows, lengths, starts);
    await_previous();
    fill(memory, x, shape.slabs > 1 ? info.w : 0, shape);
    stream.go_on(values, deltas, info.x);
    __syncthreads();
    const u32 base = shared_address(memory);
    float sums[NB], scale, bias;
    u32 at[WAYS];
    int t = 0, row, left;
    const auto begin = [&] {
        row = next.row;
        left = next.length;
        next.begin(at, base, STRIDE);
        scale = scales && row >= 0 ? __ldg(scales + row) : 1.0f;
        bias = biases && row >= 0 ? __ldg(biases + row) : 0.0f;
        if (t + 1 < info.z) next.load(info.y + t, rows, lengths, starts);
#pragma unroll
        for (int n = 0; n < NB; ++n) sums[n] = 0.0f;
    };
    if (info.z == 0) return;
    begin();
    for (;;)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
#pragma unroll 1
            while (left == 0) {
                finish(sums, row, scale, bias, info.w, parts, counters, y, shape);
                if (++t == info.z) return;
                begin();
            }
            add(sums, at, stream.v[i], stream.d[i]);
            stream.refill(i);
            --left;
        }
}

// W itself, row by row `pitch` values apart (a multiple of 8). A warp sets its rows to zero just before their values
// come, so that both meet in the cache.
extern "C" __global__ void __launch_bounds__(NW * 32, 1)
phx_scattered_expand(const uint4* values, const uint2* deltas, const uint4* starts, const int* rows,
                     const int* lengths, const int4* warps, u16* dense, Shape shape) {
    const int warp = blockIdx.x * NW + (threadIdx.x >> 5);
    const int4 info = __ldg(warps + warp);
    Stream stream;
    stream.start(values, deltas, warp);
    await_previous();
    stream.go_on(values, deltas, info.x);
    u16* to;
    u32 at[WAYS];
    int t = 0, left;
    const auto begin = [&] {
        Task task;
        task.load(t == 0 ? warp : info.y + t - 1, rows, lengths, starts);
        u16* slab = dense + (u64)info.w * WIDTH;
        for (int r = 0; r < 32; r += shape.pieces) {
            const int row = (int)broadcast((u32)task.row, r);
            if (row < 0) continue;
            uint4* zeros = (uint4*)(slab + (u64)row * shape.pitch);
            for (int i = threadIdx.x & 31; i < min(WIDTH, shape.pitch - info.w * WIDTH) / 8; i += 32)
                zeros[i] = make_uint4(0, 0, 0, 0);
        }
        __syncwarp();
        to = slab + (u64)max(task.row, 0) * shape.pitch;
        task.begin(at, 0, 1);
        left = task.length;
    };
    if (info.z == 0) return;
    begin();
    for (;;)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
#pragma unroll 1
            while (left == 0) {
                if (++t == info.z) return;
                begin();
            }
            const u32 pairs[4] = {stream.v[i].x, stream.v[i].y, stream.v[i].z, stream.v[i].w};
#pragma unroll
            for (int k = 0; k < WAYS; ++k) {
                at[k] = advance(at[k], stream.d[i], k, 1);
                const u16 bits = (u16)(k % 2 ? pairs[k / 2] >> 16 : pairs[k / 2]);
                if (bits) to[at[k]] = bits;  // fillers lie where another lane may write
            }
            stream.refill(i);
            --left;
        }
}

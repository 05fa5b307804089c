// y = x Wᵀ with W sparse, on tensor cores, and W's expansion into a dense matrix, by what tiles.cu reads.

// Four results one below the other, as far as there are that many.
__device__ __forceinline__ void finish(u16* y, const float4& sums, const float* scales, const float* bias, int out,
                                       int end, int n, const Shape& shape) {
    const float four[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (out + i >= end) return;
        float sum = four[i];
#if INT8
        sum *= UNIT;
#endif
        if (scales) sum *= scales[out + i];
        if (bias) sum += bias[out + i];
        y[(u64)n * shape.rows + out + i] = narrow(sum);
    }
}

__device__ __forceinline__ void add(float4& sums, const float4& more) {
    sums.x += more.x;
    sums.y += more.y;
    sums.z += more.z;
    sums.w += more.w;
}

// A warp's part of x, 128 columns at a time, in shared memory. Odd rows have their 16 bytes exchanged two by two, so
// that reads hit all banks. Rows beyond the batch are whatever was there: they only reach sums that nobody keeps.
struct Columns {
    const u16* x;
    int width, batch;
    u32 to, from;  // this lane's part of a copy; its row of fragments

    __device__ __forceinline__ Columns(const u16* all, const Shape& shape, u32 memory) {
        const int lane = threadIdx.x & 31, odd = lane >> 4;
        x = all;
        width = shape.blocks * COLUMNS;
        batch = shape.batch;
        to = memory + odd * 2 * ROW + ((lane & 15) ^ odd) * 16;
        from = memory + (lane >> 2) * 2 * ROW + (lane & 3) * 32;
    }
    __device__ __forceinline__ void copy(int block) const {
        const int lane = threadIdx.x & 31, odd = lane >> 4;
        const u16* first = x + odd * width + block * COLUMNS + (lane & 15) * 8;
#pragma unroll
        for (int i = 0; i < NT * 8; i += 2)
            if (i + odd < batch) copy16(to + i * 2 * ROW, first + (u64)i * width);
    }
    // The fragments from global memory: the first ones, which copies would bring behind those of tiles.
    __device__ __forceinline__ void load(uint4 (*b)[4], int block) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int row = min(n * 8 + (lane >> 2), batch - 1);
            const uint4* first = (const uint4*)(x + (u64)row * width + block * COLUMNS + (lane & 3) * 16);
#pragma unroll
            for (int q = 0; q < 4; ++q) b[n][q] = __ldg(first + q / 2 * 8 + q % 2);
        }
    }
    __device__ __forceinline__ void fetch(uint4 (*b)[4]) const {
        const u32 odd = threadIdx.x >> 2 & 1;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int q = 0; q < 4; ++q) b[n][q] = read128(from + n * 16 * ROW + (q >> 1) * ROW + ((q & 1) ^ odd) * 16);
    }
};

extern "C" __global__ void __launch_bounds__(NW * 32, 1)
phx_linear(const unsigned char* values, const uint2* bitmaps, const u32* headers, const int4* warps,
           const unsigned char* offsets, const u16* x, const float* scales, const float* bias, u16* y, float* sums,
           u32* counters, Shape shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u32 arrived;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int group = blockIdx.x % shape.groups, slab = blockIdx.x / shape.groups;
    const u32 number = blockIdx.x * NW + warp;
    const int4 info = warps[number];
    Reader reader;
    reader.start(info, offsets, values, bitmaps, headers, number, shared_address(memory + warp * WARP_BYTES));
    await_previous();

    const int first_tile = (int)((u64)shape.tiles * group / shape.groups);
    const int last_tile = (int)((u64)shape.tiles * (group + 1) / shape.groups);
    const int end = min(shape.rows, last_tile * 16);
    const Share share(slab, shape);
    const u32 areas = NW * WARP_BYTES;
    const Columns columns(x, shape, shared_address(memory + areas + warp * X_BYTES));
    float* partial = (float*)(memory + areas + (SHARED_PLACE ? 0 : NW * X_BYTES));  // [NW][NT * 8][PITCH]
    uint4 b[NT][4];
    int asked = share.first(warp, first_tile);  // the columns whose x is there or on its way
    columns.load(b, min(asked, shape.blocks - 1));
    bool loaded = true;  // to registers; else it is in shared memory
    reader.fill(info, EARLY, DEPTH);

    for (int tile = first_tile; tile < last_tile; tile += TOGETHER) {
        const int first = share.first(warp, tile), last = share.first(warp + 1, tile);
        const int together = min(TOGETHER, last_tile - tile);
        float c[TOGETHER][NT][4];
#pragma unroll
        for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
            for (int n = 0; n < NT; ++n) c[u][n][0] = c[u][n][1] = c[u][n][2] = c[u][n][3] = 0.0f;
        if (asked != first && first < last) {
            wait<0>();  // other columns may be on their way to the same place
            columns.load(b, first);
            loaded = true;
        }
        for (int block = first; block < last; ++block) {
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                if (u >= together) break;
                // x of these columns to registers, that of the next to shared memory.
                const auto take = [&] {
                    if (u > 0) return;
                    if (!loaded) {
                        allow<DEPTH - 1>(together - 1);
                        __syncwarp();
                        columns.fetch(b);
                        __syncwarp();
                    }
                    loaded = false;
                    asked = block + 1 < last ? block + 1 : SHARED_PLACE ? -1 : share.first(warp, tile + TOGETHER);
                    if (asked >= 0) columns.copy(min(asked, shape.blocks - 1));
                };
                const auto product = [&](int s, const u32* a) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const uint4 both = b[n][s / 2];
                        multiply(c[u][n], a, s % 2 ? both.z : both.x, s % 2 ? both.w : both.y);
                    }
                };
#if AT_ONCE
                take();
                reader.decode(product);
#else
                u32 whole[32];  // decoded while x is on its way
                reader.decode([&](int s, const u32* a) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) whole[4 * s + r] = a[r];
                });
                take();
#pragma unroll
                for (int s = 0; s < 8; ++s) product(s, whole + 4 * s);
#endif
                reader.advance();
            }
        }
        float* mine = partial + warp * (NT * 8 * PITCH);
        const int row = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
        for (int part = 0; part < TOGETHER; part += SUMMED) {
            if (part >= together) break;
#pragma unroll
            for (int u = 0; u < SUMMED; ++u)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    if (part + u >= TOGETHER) continue;
                    float* at = mine + (n * 8 + column) * PITCH + ((u * 16 + row) ^ column * 4);  // lanes hit all banks
                    float* below = mine + (n * 8 + column) * PITCH + ((u * 16 + 8 + row) ^ column * 4);
                    at[0] = c[part + u][n][0];
                    at[PITCH] = c[part + u][n][1];
                    below[0] = c[part + u][n][2];
                    below[PITCH] = c[part + u][n][3];
                }
            __syncthreads();
            for (int k = threadIdx.x; k < shape.batch * PITCH / 4; k += NW * 32) {
                const int in = k * 4 % PITCH, out = (tile + part) * 16 + in, n = k * 4 / PITCH;
                const float* from = partial + n * PITCH + (in ^ (n & 6) * 4);
                float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int w = 0; w < NW; ++w) add(sum, *(const float4*)(from + w * NT * 8 * PITCH));
                if (shape.slabs == 1)
                    finish(y, sum, scales, bias, out, end, n, shape);
                else if (out < last_tile * 16)
                    __stcg((float4*)&sums[((u64)slab * shape.batch + n) * shape.tiles * 16 + out], sum);
            }
            __syncthreads();
        }
    }
    wait<0>();
    if (shape.slabs == 1) return;
    // Whoever is last of the slabs of these rows adds up, always in the same order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(&counters[group], 1u);
    __syncthreads();
    if (arrived != (u32)shape.slabs - 1) return;
    __threadfence();
    const int fours = (last_tile - first_tile) * 4;
    for (int k = threadIdx.x; k < shape.batch * fours; k += NW * 32) {
        const int out = first_tile * 16 + k % fours * 4, n = k / fours;
        const u64 pitch = (u64)shape.batch * shape.tiles * 16;
        const float* from = sums + (u64)n * shape.tiles * 16 + out;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int some = 0; some < shape.slabs; some += 4) {
            float4 parts[4];  // asked for at once
#pragma unroll
            for (int s = 0; s < 4; ++s)
                if (some + s < shape.slabs) parts[s] = __ldcg((const float4*)(from + (some + s) * pitch));
#pragma unroll
            for (int s = 0; s < 4; ++s)
                if (some + s < shape.slabs) add(sum, parts[s]);
        }
        finish(y, sum, scales, bias, out, end, n, shape);
    }
    if (threadIdx.x == 0) counters[group] = 0;
}

// W itself, (rows, 128 · blocks), row by row.
extern "C" __global__ void __launch_bounds__(NW * 32, 1)
phx_expand(const unsigned char* values, const uint2* bitmaps, const u32* headers, const int4* warps,
           const unsigned char* offsets, u16* dense, Shape shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int group = blockIdx.x % shape.groups, slab = blockIdx.x / shape.groups;
    const u32 number = blockIdx.x * NW + warp;
    const int4 info = warps[number];
    Reader reader;
    reader.start(info, offsets, values, bitmaps, headers, number, shared_address(memory + warp * WARP_BYTES));
    await_previous();
    reader.fill(info, EARLY, DEPTH);
    const int first_tile = (int)((u64)shape.tiles * group / shape.groups);
    const int last_tile = (int)((u64)shape.tiles * (group + 1) / shape.groups);
    const Share share(slab, shape);
    for (int some = first_tile; some < last_tile; some += TOGETHER) {
        const int first = share.first(warp, some), last = share.first(warp + 1, some);
        const int together = min(TOGETHER, last_tile - some);
        for (int step = 0; step < (last - first) * together; ++step) {
            const int block = first + step / together, tile = some + step % together;
            u32 whole[32];
            reader.decode([&](int s, const u32* a) {
#pragma unroll
                for (int r = 0; r < 4; ++r) whole[4 * s + r] = INT8 ? fused(a[r], UNITS, 0u) : a[r];
            });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile * 16 + half * 8 + (lane >> 2);
                if (row < shape.rows) {
                    uint4* to = (uint4*)(dense + (u64)row * (shape.blocks * COLUMNS) + block * COLUMNS + (lane & 3) * 16);
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        const u32* from = whole + 8 * s + half;
                        to[s % 2 + s / 2 * 8] = make_uint4(from[0], from[2], from[4], from[6]);
                    }
                }
            }
            reader.advance();
        }
    }
    wait<0>();
}

// y = x Wᵀ with W sparse, on tensor cores, and W's expansion into a dense matrix. layout.py explains the arrays.
//
// No header is included, so that NVRTC compiles this wherever torch runs. Macros given by compiling.py:
//   HALF   0: bfloat16, 1: float16
//   INT8   0: values are such floats, 1: int8, made such floats in registers
//   NT     rows of x handled, in eights (1 to 4)
//   NW     warps of a block of threads
//   DEPTH  tiles that copies run ahead of the decoding
//   RING   rows of a warp's ring in shared memory, a multiple of 8
//
// A warp walks through its tiles of 16 x 128 weights. A lane decodes exactly the values of its own mma fragments: for
// every pair of positions (one register) it reads the next value of its low and of its high stream, and a byte
// permutation keeps what the bitmap says. Rows of the streams are 128 bytes, one word a lane, so that reads of shared
// memory have no bank conflicts wherever each lane stands. The first TAIL rows of the ring exist twice: a lane may run
// past the end within a tile without asking.
//
// Of int8 values a lane has one stream, four to a row. For eight positions it takes the next eight bytes, aligned by
// shifts; for each four of them permutations put the kept ones into the low bytes of a pair's halves, with zeros above.
// Such halves are floats too, multiples of the smallest one above zero, and one multiplication and addition, exact in
// either type, makes them the values divided by UNIT. Hence a byte is 127 - value, and 127 where nothing is kept.

#if INT8
#define TAIL 16                       // rows of one tile's values, at most
#else
#define TAIL 32
#endif
#define BITS 32                       // of a lane's word in a row
#define ROW 128                       // bytes
#define COPIED (8 * ROW)              // bytes of the rows that are copied at once
#define SLOTS 8                       // bitmaps and headers in flight; more than DEPTH
#define SLOT (2 * ROW)                // bytes of a bitmap; a header has 4
#define WARP_BYTES ((RING + TAIL + 1) * ROW + SLOTS * SLOT)
#define COLUMNS 128                   // of a tile
#define TOGETHER 8                    // rows of tiles that go through the columns together, for x to be read less often
#define SUMMED (NT > 2 ? 2 : 4)       // of them, whose sums of all warps are in shared memory at a time
#define PITCH (SUMMED * 16 + 4)       // from one row of x to the next in those, so that lanes hit all banks
#define AHEAD (NT == 1 || (NT == 2 && NW <= 8))  // whether registers have room for x of the next columns, too

// Of int8 values: the byte of a missing one, four times; and pairs of floats.
#define ABSENT 0x7f7f7f7fu
#if HALF
#define UNIT 512.0f
#define UNITS 0x60006000u             // UNIT
#define SMALL 0xf800f800u             // -2^15, for a smallest float of 2^-24
#define HALFWAY 0x33f033f0u           // 127 / UNIT
#else
#define UNIT 64.0f
#define UNITS 0x42804280u
#define SMALL 0xff00ff00u             // -2^127, for 2^-133
#define HALFWAY 0x3ffe3ffeu
#endif

struct Shape {
    int rows, columns, batch;         // of W; of x
    int tiles, blocks;                // 16 rows, 128 columns
    int groups, slabs;                // of tiles; of blocks
};

// One warp's way through its streams. What a tile needs is copied to shared memory DEPTH tiles ahead, its header too: a
// load to a register would be waited for, as such a load queues behind the copies.
struct Reader {
    const unsigned char* values;      // the next rows to copy, this lane's part
    const uint2* bitmaps;             // of the next tile to copy, this lane's words
    const u32* headers;               // likewise: step, 256 · copies to make for the tile that is DEPTH ahead
    u32 ring, slots, heads;           // addresses in shared memory: this lane's part of a copy, its words, headers
    u32 filled;                       // bytes into the ring where the next copy goes
    u32 base;                         // bytes into the ring where the window begins; for int8 bits of a lane's words
    u32 low, high;                    // from there to this lane's streams; for int8 low alone
    u32 header;                       // of the tile that was decoded last
    u32 taken, given;                 // slots: the next to decode, the next to fill

    __device__ __forceinline__ void rows(u32 copies) {
#pragma unroll 1
        for (; copies; --copies) {
            const u32 to = ring + filled;
#pragma unroll
            for (int at = 0; at < COPIED; at += 4 * ROW) copy16(to + at, values + at);
            if (filled < TAIL * ROW)
#pragma unroll
                for (int at = 0; at < COPIED; at += 4 * ROW) copy16(to + RING * ROW + at, values + at);
            values += COPIED;
            filled += COPIED;
            if (filled == RING * ROW) filled = 0;
        }
    }

    __device__ __forceinline__ void words() {
        copy8(slots + given, bitmaps);
        if ((threadIdx.x & 31) == 0) copy4(heads + given / (SLOT / 4), headers);
        bitmaps += 32;
        ++headers;
        given = (given + SLOT) & (SLOTS * SLOT - 1);
    }

    // The arrays of the matrix, a warp's number, and its shared memory.
    __device__ __forceinline__ void start(const int4* warps, const unsigned char* offsets, const unsigned char* streams,
                                          const uint2* maps, const u32* from, u32 number, u32 memory) {
        const int lane = threadIdx.x & 31;
        const int4 info = warps[number];
#if INT8
        low = offsets[number * 32 + lane] * 8;
#else
        low = offsets[(number * 32 + lane) * 2] * ROW;
        high = offsets[(number * 32 + lane) * 2 + 1] * ROW;
#endif
        values = streams + (u64)(u32)info.y * COPIED + lane * 16;
        bitmaps = maps + (u64)(u32)info.x * 32 + lane;
        headers = from + info.x;
        ring = memory + lane * 16;
        slots = memory + (RING + TAIL) * ROW + lane * 8;
        heads = memory + (RING + TAIL) * ROW + SLOTS * SLOT;
        filled = base = taken = given = 0;
#pragma unroll 1
        for (int i = 0; i < DEPTH; ++i) {
            words();
            rows((i < 4 ? info.z >> i * 8 : info.w >> (i - 4) * 8) & 0xff);
            commit();
        }
    }

    // The fragments of the next tile: a[4 s + r] is register r of the s-th product over 16 columns.
    __device__ __forceinline__ void decode(u32* a) {
        wait<DEPTH - 1>();
        __syncwarp();
        const uint2 both = read64(slots + taken);
        header = read32(heads + taken / (SLOT / 4));
        taken = (taken + SLOT) & (SLOTS * SLOT - 1);
#if INT8
        const int step = (header & 0xff) * BITS;
        low = max((int)low - step, 0);
        base += step;
        base = min(base, base - RING * BITS);  // unsigned: what is negative is large
        const u32 mine = ring - (threadIdx.x & 31) * 12;  // this lane's words
        u32 at = min(base + low, base + low - RING * BITS);
        const u32 from = at;
        u32 bytes, rest;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int q = j & 7, k = q % 3;  // the bits stand k too high, which the factors make good
            const u32 four = ((j < 8 ? both.x : both.y) >> (q - k)) & (0x01010101u << k);
            // Byte i: that position's next byte of the four, counted by the bits below, or one of ABSENT; above it
            // zeros, which are the sign of ABSENT.
            const u32 selectors = 0xc4c4c4c4u + four * (0x010100fcu >> k);
            if (j % 2 == 0) {
                const u32 address = madd(at & ~(BITS - 1u), ROW / BITS, mine);
                const u32 middle = read32(address + ROW);
                bytes = align(read32(address), middle, at);
                rest = align(middle, read32(address + 2 * ROW), at);
            }
            a[2 * j] = fused(permute(bytes, ABSENT, selectors), SMALL, HALFWAY);
            a[2 * j + 1] = fused(permute(bytes, ABSENT, selectors >> 16), SMALL, HALFWAY);
            if (j % 2 == 0) bytes = shift(bytes, rest, dot(four, 0x08080808u >> k, 0));
            at = dot(four, 0x08080808u >> k, at);
        }
        low += at - from;
#else
        const int step = (header & 0xff) * ROW;
        low = max((int)low - step, 0);
        high = max((int)high - step, 0);
        base += step;
        base = min(base, base - RING * ROW);  // unsigned: what is negative is large
        const u32 mine = ring - (threadIdx.x & 31) * 12;  // this lane's words
        u32 at_low = mine + min(base + low, base + low - RING * ROW);
        u32 at_high = mine + 2 + min(base + high, base + high - RING * ROW);
        const u32 from_low = at_low, from_high = at_high;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const u32 two = (j < 8 ? both.x : both.y) >> (j & 6);
            const int k = j & 1;  // the bits stand k too high, which the factors make good
            const u32 four = two & (0x01010101u << k);
            const u32 selectors = 0x76327632u - (0x22u >> k) * four;
            const u32 l0 = read16(at_low), h0 = read16(at_high);
            at_low = dot(four, 0x00000080u >> k, at_low);
            at_high = dot(four, 0x00008000u >> k, at_high);
            const u32 l1 = read16(at_low), h1 = read16(at_high);
            at_low = dot(four, 0x00800000u >> k, at_low);
            at_high = dot(four, 0x80000000u >> k, at_high);
            a[2 * j] = permute(l0, h0, selectors);
            a[2 * j + 1] = permute(l1, h1, selectors >> 16);
        }
        low += at_low - from_low;
        high += at_high - from_high;
#endif
    }

    // Copy for the tile that is DEPTH ahead, into what this one left behind. Beyond the warp's last tile that copies
    // a bitmap and a header which nobody reads.
    __device__ __forceinline__ void advance() {
        __syncwarp();
        words();
        rows(header >> 8);
        commit();
    }
};

// The part of a row of tiles that a warp takes: it alternates, where the columns can't be divided evenly.
struct Share {
    int from, count;  // columns of tiles that the block of threads takes

    __device__ __forceinline__ Share(int slab, const Shape& shape) {
        from = shape.blocks * slab / shape.slabs;
        count = shape.blocks * (slab + 1) / shape.slabs - from;
    }
    __device__ __forceinline__ int first(int warp, int tile) const {
        return from + (count * warp + tile * 5 % NW) / NW;
    }
};

__device__ __forceinline__ void finish(u16* y, float sum, const float* scales, const float* bias, int out, int n,
                                       const Shape& shape) {
#if INT8
    sum *= UNIT;
#endif
    if (scales) sum *= scales[out];
    if (bias) sum += bias[out];
    y[(u64)n * shape.rows + out] = narrow(sum);
}

struct Columns {
    const uint4* of[NT];  // this lane's parts of x; beyond the last row, that one again, for sums that nobody keeps

    __device__ __forceinline__ Columns(const u16* x, const Shape& shape) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < NT; ++n)
            of[n] = (const uint4*)(x + (u64)min(n * 8 + (lane >> 2), shape.batch - 1) * (shape.blocks * COLUMNS) +
                                   (lane & 3) * 16);
    }
    __device__ __forceinline__ void fetch(uint4 (*b)[4], int block) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4* from = of[n] + block * (COLUMNS / 8);
            b[n][0] = __ldg(from);
            b[n][1] = __ldg(from + 1);
            b[n][2] = __ldg(from + 8);
            b[n][3] = __ldg(from + 9);
        }
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
    Reader reader;
    reader.start(warps, offsets, values, bitmaps, headers, blockIdx.x * NW + warp,
                 shared_address(memory + warp * WARP_BYTES));
    await_previous();

    const int first_tile = (int)((u64)shape.tiles * group / shape.groups);
    const int last_tile = (int)((u64)shape.tiles * (group + 1) / shape.groups);
    const Share share(slab, shape);
    const Columns columns(x, shape);
    float* partial = (float*)(memory + NW * WARP_BYTES);  // [NW][NT * 8][PITCH]
    uint4 b[NT][4];
    if (AHEAD) columns.fetch(b, min(share.first(warp, first_tile), shape.blocks - 1));

    for (int tile = first_tile; tile < last_tile; tile += TOGETHER) {
        const int first = share.first(warp, tile), last = share.first(warp + 1, tile);
        const int together = min(TOGETHER, last_tile - tile);
        float c[TOGETHER][NT][4];
#pragma unroll
        for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
            for (int n = 0; n < NT; ++n) c[u][n][0] = c[u][n][1] = c[u][n][2] = c[u][n][3] = 0.0f;
        for (int block = first; block < last; ++block) {
            uint4 next[NT][4];
            if (AHEAD)
                columns.fetch(next, block + 1 < last ? block + 1 : min(share.first(warp, tile + TOGETHER), shape.blocks - 1));
            else
                columns.fetch(b, block);
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                if (u >= together) break;
                u32 a[32];
                reader.decode(a);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) multiply(c[u][n], a + 8 * s, b[n][s].x, b[n][s].y);
#pragma unroll
                    for (int n = 0; n < NT; ++n) multiply(c[u][n], a + 8 * s + 4, b[n][s].z, b[n][s].w);
                }
                reader.advance();
            }
            if (AHEAD)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int s = 0; s < 4; ++s) b[n][s] = next[n][s];
        }
        float* mine = partial + warp * (NT * 8 * PITCH);
        const int row = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
        for (int part = 0; part < TOGETHER; part += SUMMED) {
            if (part >= together) break;
            __syncthreads();  // the sums before have been read
#pragma unroll
            for (int u = 0; u < SUMMED; ++u)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    float* at = mine + (n * 8 + column) * PITCH + u * 16 + row;
                    at[0] = c[part + u][n][0];
                    at[PITCH] = c[part + u][n][1];
                    at[8] = c[part + u][n][2];
                    at[PITCH + 8] = c[part + u][n][3];
                }
            __syncthreads();
            for (int k = threadIdx.x; k < shape.batch * SUMMED * 16; k += NW * 32) {
                const int in = k % (SUMMED * 16), out = (tile + part) * 16 + in, n = k / (SUMMED * 16);
                if (out >= min(shape.rows, last_tile * 16)) continue;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < NW; ++w) sum += partial[(w * NT * 8 + n) * PITCH + in];
                if (shape.slabs == 1)
                    finish(y, sum, scales, bias, out, n, shape);
                else
                    __stcg(&sums[((u64)slab * shape.batch + n) * shape.rows + out], sum);
            }
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
    const int begin = first_tile * 16, height = min(shape.rows, last_tile * 16) - begin;
    for (int k = threadIdx.x; k < shape.batch * height; k += NW * 32) {
        const int out = begin + k % height, n = k / height;
        float sum = 0.0f;
        for (int s = 0; s < shape.slabs; ++s) sum += __ldcg(&sums[((u64)s * shape.batch + n) * shape.rows + out]);
        finish(y, sum, scales, bias, out, n, shape);
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
    Reader reader;
    reader.start(warps, offsets, values, bitmaps, headers, blockIdx.x * NW + warp,
                 shared_address(memory + warp * WARP_BYTES));
    await_previous();
    const int first_tile = (int)((u64)shape.tiles * group / shape.groups);
    const int last_tile = (int)((u64)shape.tiles * (group + 1) / shape.groups);
    const Share share(slab, shape);
    for (int some = first_tile; some < last_tile; some += TOGETHER) {
        const int first = share.first(warp, some), last = share.first(warp + 1, some);
        const int together = min(TOGETHER, last_tile - some);
        for (int step = 0; step < (last - first) * together; ++step) {
            const int block = first + step / together, tile = some + step % together;
            u32 a[32];
            reader.decode(a);
#if INT8
#pragma unroll
            for (int i = 0; i < 32; ++i) a[i] = fused(a[i], UNITS, 0u);
#endif
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile * 16 + half * 8 + (lane >> 2);
                if (row < shape.rows) {
                    uint4* to = (uint4*)(dense + (u64)row * (shape.blocks * COLUMNS) + block * COLUMNS + (lane & 3) * 16);
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        const u32* from = a + 8 * s + half;
                        to[s % 2 + s / 2 * 8] = make_uint4(from[0], from[2], from[4], from[6]);
                    }
                }
            }
            reader.advance();
        }
    }
    wait<0>();
}

// A warp's way through its tiles of W. layout.py explains the arrays; compiling.py puts this before kernels.cu.
//
// Macros given by it:
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
#define EARLY (NT == 1 && DEPTH > 1 ? 2 : 1)  // tiles whose copies begin before x can be read: more would delay x
#define TOGETHER 7                    // rows of tiles that go through the columns together, for x to be read less often
#define SUMMED (NT == 1 ? 8 : 4)      // of them, whose sums of all warps are in shared memory at a time
#define PITCH (SUMMED * 16)           // floats from one row of x to the next in those
#define SUMS_BYTES (NT * 8 * PITCH * 4)
#define X_BYTES (NT * 8 * 2 * ROW)    // a warp's x of 128 columns
#define SHARED_PLACE (NT > 2)         // whether its sums lie where its x was
#define AT_ONCE (NT > 2)              // whether a product begins as its 16 columns are decoded, as registers are short

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

    // What a warp is to read, the arrays of the matrix, the warp's number, and its shared memory.
    __device__ __forceinline__ void start(const int4& info, const unsigned char* offsets, const unsigned char* streams,
                                          const uint2* maps, const u32* from, u32 number, u32 memory) {
        const int lane = threadIdx.x & 31;
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
        fill(info, 0, EARLY);
    }

    // The copies for some of the first DEPTH tiles.
    __device__ __forceinline__ void fill(const int4& info, int first, int last) {
#pragma unroll 1
        for (int i = first; i < last; ++i) {
            words();
            rows((i < 4 ? info.z >> i * 8 : info.w >> (i - 4) * 8) & 0xff);
            commit();
        }
    }

    // The fragments of the next tile: use(s, a) is given the four registers of the s-th product over 16 columns.
    template <typename Use>
    __device__ __forceinline__ void decode(Use use) {
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
        u32 bytes, rest, a[4];
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
            a[j % 2 * 2] = fused(permute(bytes, ABSENT, selectors), SMALL, HALFWAY);
            a[j % 2 * 2 + 1] = fused(permute(bytes, ABSENT, selectors >> 16), SMALL, HALFWAY);
            if (j % 2 == 0) bytes = shift(bytes, rest, dot(four, 0x08080808u >> k, 0));
            at = dot(four, 0x08080808u >> k, at);
            if (j % 2) use(j / 2, a);
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
        u32 a[4];
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
            a[j % 2 * 2] = permute(l0, h0, selectors);
            a[j % 2 * 2 + 1] = permute(l1, h1, selectors >> 16);
            if (j % 2) use(j / 2, a);
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

// Waits until no more than so many of the last groups of copies are on their way, or N of them.
template <int N>
__device__ __forceinline__ void allow(int groups) {
    if (N == 0 || groups >= N)
        wait<N>();
    else
        allow<(N > 0 ? N - 1 : 0)>(groups);
}

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

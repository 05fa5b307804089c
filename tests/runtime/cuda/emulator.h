// CUDA on a CPU, as much of it as kernels.cu and scattered.cu use: threads are fibers that meet at barriers, warps run
// in an order drawn anew each time, and asynchronous copies happen either as they are issued or as late as their wait
// allows. Both extremes give right results only if nothing is overwritten too early or read too soon.

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct int4 {
    int x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct float2 {
    float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index {
    unsigned x, y, z;
};

alignas(128) unsigned char memory[232448];
static Index threadIdx, blockIdx;

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

enum Wait { NONE, WARP, BLOCK, DONE };
struct Copy {
    uint32_t to;
    unsigned char bytes[16];
    int size;
    const void* from;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait waits = NONE;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;
static bool lazy;
static std::function<void()> body;
static std::mt19937 random_order(0);
static long outside;  // accesses beyond shared memory

static void meet(Wait what) {
    fibers[current].waits = what;
    swapcontext(&fibers[current].context, &scheduler);
}
static void __syncwarp() { meet(WARP); }
static void __syncthreads() { meet(BLOCK); }
static void __threadfence() {}

static void check(uint32_t address, int size) {
    if (address % size || address + size > sizeof memory) ++outside;
}
static void perform(const Copy& c) { memcpy(memory + c.to, c.from, c.size); }
static void issue(uint32_t to, const void* from, int size) {
    check(to, size);
    if ((uintptr_t)from % size) ++outside;
    Copy c{to, {}, size, from};
    if (lazy)
        fibers[current].open.push_back(c);
    else
        perform(c);
}

typedef uint32_t u32;
typedef uint16_t u16;
typedef unsigned long long u64;
static u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - memory); }
static u32 read16(u32 a) {
    check(a, 2);
    u16 v;
    memcpy(&v, memory + a, 2);
    return v;
}
template <typename T>
static T read(u32 a) {
    check(a, sizeof(T));
    T v;
    memcpy(&v, memory + a, sizeof v);
    return v;
}
static u32 read32(u32 a) { return read<u32>(a); }
static uint2 read64(u32 a) { return read<uint2>(a); }
static uint4 read128(u32 a) { return read<uint4>(a); }
static void copy16(u32 to, const void* from) { issue(to, from, 16); }
static void copy8(u32 to, const void* from) { issue(to, from, 8); }
static void copy4(u32 to, const void* from) { issue(to, from, 4); }
static void commit() {
    Fiber& f = fibers[current];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
template <int N>
static void wait() {
    Fiber& f = fibers[current];
    while (f.groups.size() > N) {
        for (const Copy& c : f.groups.front()) perform(c);
        f.groups.erase(f.groups.begin());
    }
}
static void await_previous() {}
static u32 dot(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
static u32 permute(u32 a, u32 b, u32 selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 s = selector >> 4 * i & 15;
        u32 byte = both >> 8 * (s & 7) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << 8 * i;
    }
    return d;
}
static u32 align(u32 low, u32 high, u32 amount) { return (u32)(((u64)high << 32 | low) >> (amount & 31)); }
static u32 shift(u32 low, u32 high, u32 amount) {
    return amount < 32 ? (u32)(((u64)high << 32 | low) >> amount) : high;
}
static u32 madd(u32 a, u32 b, u32 c) { return a * b + c; }
static float widen(u32 bits) {
#if HALF
    _Float16 h;
    const u16 low = (u16)bits;
    memcpy(&h, &low, 2);
    return (float)h;
#else
    const u32 wide = bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
#endif
}
static u16 narrow(float v) {
#if HALF
    const _Float16 h = (_Float16)v;
    u16 r;
    memcpy(&r, &h, 2);
    return r;
#else
    u32 bits;
    memcpy(&bits, &v, 4);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
static u32 fused(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int at = 0; at < 32; at += 16) {
        const double product = (double)widen(a >> at & 0xffff) * widen(b >> at & 0xffff);
        d |= (u32)narrow((float)(product + widen(c >> at & 0xffff))) << at;
    }
    return d;
}
static u32 given[32][64][6];  // by warp: what its lanes hold
static void multiply(float* c, const u32* a, u32 b0, u32 b1) {  // PTX ISA, mma.m16n8k16: who holds what
    const int warp = current / 32, lane = current % 32, group = lane / 4, quarter = lane % 4;
    u32* mine = given[warp][lane];
    memcpy(mine, a, 16);
    mine[4] = b0;
    mine[5] = b1;
    meet(WARP);
    for (int r = 0; r < 4; ++r) {
        const int row = group + (r / 2) * 8, column = quarter * 2 + r % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            const u32 wa = given[warp][(row % 8) * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            const u32 wb = given[warp][column * 4 + k % 8 / 2][4 + k / 8];
            sum += widen(wa >> 16 * (k % 2) & 0xffff) * widen(wb >> 16 * (k % 2) & 0xffff);
        }
        c[r] += sum;
    }
    meet(WARP);
}
template <typename T>
static T __ldg(const T* p) {
    if ((uintptr_t)p % sizeof(T)) ++outside;
    return *p;
}
static uint4 fetch128(const uint4* p) { return __ldg(p); }
static uint2 fetch64(const uint2* p) { return __ldg(p); }
static u32 latest(const u32* p) { return __ldg(p); }
static float latest(const float* p) { return *p; }
static u32 passed[1024];  // by thread: what it shows the others of its warp
static u32 broadcast(u32 v, int lane) {
    passed[current] = v;
    meet(WARP);
    v = passed[current / 32 * 32 + lane];
    meet(WARP);
    return v;
}
static float __uint_as_float(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static float exchange(float v, int bit) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return __uint_as_float(broadcast(bits, current % 32 ^ bit));
}
static float low(u32 pair) { return widen(pair & 0xffff); }
static float high(u32 pair) { return widen(pair >> 16); }
static float __ldcg(const float* p) { return *p; }
static void __stcg(float* p, float v) { *p = v; }
static float4 __ldcg(const float4* p) { return __ldg(p); }
static void __stcg(float4* p, float4 v) {
    __ldg(p);
    *p = v;
}
static u32 atomicAdd(u32* p, u32 v) {
    const u32 old = *p;
    *p += v;
    return old;
}

static void enter() {
    body();
    meet(DONE);
}

// Runs a grid, block after block in a drawn order; gives how many accesses were outside or askew.
static long launch(int grid, int threads, std::function<void()> kernel) {
    body = kernel;
    outside = 0;
    std::vector<int> blocks(grid);
    for (int i = 0; i < grid; ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (int block : blocks) {
        memset(memory, 0xff, sizeof memory);  // NaN, wherever nothing was copied to
        blockIdx = {(unsigned)block, 0, 0};
        fibers.assign(threads, Fiber());
        for (Fiber& f : fibers) {
            f.stack.resize(1 << 16);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data();
            f.context.uc_stack.ss_size = f.stack.size();
            makecontext(&f.context, enter, 0);
        }
        for (;;) {
            std::vector<int> ready;
            for (int t = 0; t < threads; ++t)
                if (fibers[t].waits == NONE) ready.push_back(t);
            if (ready.empty()) {
                bool done = true, all = true;
                for (Fiber& f : fibers) {
                    done = done && f.waits == DONE;
                    all = all && f.waits == BLOCK;
                }
                if (done) break;
                if (all)
                    for (Fiber& f : fibers) f.waits = NONE;
                bool warps = false;
                for (int w = 0; w < threads; w += 32) {
                    bool together = true;
                    for (int t = w; t < w + 32; ++t) together = together && fibers[t].waits == WARP;
                    warps = warps || together;
                    if (together)
                        for (int t = w; t < w + 32; ++t) fibers[t].waits = NONE;
                }
                if (!all && !warps) return -1;  // threads wait for each other for ever
                continue;
            }
            current = ready[random_order() % ready.size()];
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &fibers[current].context);
        }
    }
    return outside;
}

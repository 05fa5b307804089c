// AMX on processors without it: its instructions are illegal there, and the signal's handler does what they would have
// done (amx_emulated.h). Linked with amx_bf16.cpp as it is compiled for use, in place of cpu.cpp and AVX-512's files.
#define PHOENIX_AMX_EMULATED
#include <signal.h>
#include <ucontext.h>

#include "amx_tiles.h"

namespace {

using Byte = unsigned char;

[[noreturn]] void unknown(const Byte* at) {
    std::fprintf(stderr, "illegal, and none of AMX's:");
    for (int i = 0; i < 10; ++i) std::fprintf(stderr, " %02x", at[i]);
    std::fprintf(stderr, "\n");
    std::_Exit(1);
}

// An instruction with a VEX prefix of three bytes, map 0F38, W 0, 128 bits: all of AMX's.
struct Instruction {
    int code, prefix;               // prefix: 0 none, 2 F3, 3 F2
    int reg, rm, second;            // ModRM.reg, ModRM.rm of a register, VEX.vvvv
    bool in_memory, indexed;
    const Byte* address = nullptr;  // without the index
    uint64_t stride = 0;            // the index, scaled
    int length = 5;

    Instruction(const Byte* at, const greg_t* registers) {
        if (at[0] != 0xc4 || (at[1] & 31) != 2 || (at[2] & 0x84)) unknown(at);
        static const int numbers[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        auto value = [&](int number, bool high) {
            return static_cast<uint64_t>(registers[numbers[number | (high ? 8 : 0)]]);
        };
        const bool high_index = !(at[1] & 0x40), high_base = !(at[1] & 0x20);
        const int mode = at[4] >> 6;
        prefix = at[2] & 3;
        second = ~at[2] >> 3 & 15;
        code = at[3];
        reg = at[4] >> 3 & 7;
        rm = at[4] & 7;
        in_memory = mode != 3;
        indexed = in_memory && rm == 4;
        if (!in_memory) return;
        uint64_t to = 0;
        int distance = mode == 1 ? 1 : mode == 2 ? 4 : 0;
        if (indexed) {
            length = 6;
            const int scale = at[5] >> 6, index = at[5] >> 3 & 7, base = at[5] & 7;
            if (index != 4 || high_index) stride = value(index, high_index) << scale;
            if (base == 5 && mode == 0) unknown(at);  // no base: not written by compilers here
            to = value(base, high_base);
        } else if (mode == 0 && rm == 5) {
            distance = 4;
            to = reinterpret_cast<uint64_t>(at) + 9;  // the next instruction
        } else {
            to = value(rm, high_base);
        }
        if (distance == 1) to += static_cast<int64_t>(static_cast<signed char>(at[length]));
        if (distance == 4) {
            int32_t far;
            std::memcpy(&far, at + length, 4);
            to += static_cast<int64_t>(far);
        }
        length += distance;
        address = reinterpret_cast<const Byte*>(to);
    }
};

void handle(int, siginfo_t*, void* context) {
    namespace tile = phx::tile;
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto* at = reinterpret_cast<const Byte*>(registers[REG_RIP]);
    const Instruction one(at, registers);
    const bool tiles = one.indexed && one.stride == tile::ROW_BYTES;
    if (one.code == 0x49 && one.prefix == 0 && one.in_memory && one.reg == 0) {
        tile::Shapes shapes;
        std::memcpy(&shapes, one.address + one.stride, sizeof shapes);
        tile::configure(shapes);
    } else if (one.code == 0x49 && one.prefix == 0 && at[4] == 0xc0) {
        tile::release();
    } else if (one.code == 0x49 && one.prefix == 3 && !one.in_memory && one.rm == 0) {
        tile::zero(one.reg);
    } else if (one.code == 0x4b && one.prefix == 3 && tiles) {
        tile::load(one.reg, one.address);
    } else if (one.code == 0x4b && one.prefix == 2 && tiles) {
        tile::store(one.reg, const_cast<Byte*>(one.address));
    } else if (one.code == 0x5c && one.prefix == 2 && !one.in_memory) {
        tile::dot(one.reg, one.rm, one.second);
    } else {
        unknown(at);
    }
    registers[REG_RIP] += one.length;
}

__attribute__((constructor)) void listen() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

namespace phx {
namespace {

Type tile_type(Type x, Type values) { return portable_path.tile_type(x, values); }
// Whoever asks this for five rows and more has left the tiles out.
const Decode* decode(Type x, Type values, int64_t batch) {
    tile::insist(batch < 5 || x != Type::bf16 || values == Type::f32, "tiles weren't used from five rows on");
    return portable_path.decode(x, values, batch);
}
void expand(const Matrix& w, int64_t row, Type to, void* out) { portable_path.expand(w, row, to, out); }
void product(Type type, const void* tile, int64_t tile_stride, int rows, const void* x, int64_t x_stride, int batch,
             int64_t cols, float* sums, int64_t sums_stride) {
    portable_path.product(type, tile, tile_stride, rows, x, x_stride, batch, cols, sums, sums_stride);
}
uint64_t read(const uint8_t* data, int64_t bytes) { return portable_path.read(data, bytes); }
bool not_here() { return false; }

}  // namespace

bool amx_available() { return true; }

// What the AMX path takes over from AVX-512's.
const Path avx512_path = {"", "", not_here, tile_type, decode, expand, product, nullptr, read, nullptr};
const Path avx512_vnni_path = avx512_path, avx2_path = avx512_path;

}  // namespace phx

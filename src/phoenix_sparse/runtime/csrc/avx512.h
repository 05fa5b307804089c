// What the two AVX-512 files share.
#pragma once

#include "kernels.h"

#if PHX_X86
#define PHX_AVX512_VNNI "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,bmi,bmi2,popcnt,avx2,fma"
#define PHX_AVX512_BF16 PHX_AVX512_VNNI ",avx512bf16"

// A lambda's body becomes part of the loop that calls it.
#define PHX_LAMBDA __attribute__((always_inline))

namespace phx {

// A mask of the first `count` lanes; of none below 0, and of all from 64 on.
PHX_INLINE uint64_t first_bits(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1;
}

bool avx2_available();
bool avx512_vnni_available();
bool avx512_bf16_available();

namespace avx512 {
const Decode* decode(Type x, Type values, int64_t batch);
void expand(const Matrix& w, int64_t row, Type to, void* out);
uint64_t read(const uint8_t* data, int64_t bytes);
}  // namespace avx512

}  // namespace phx
#endif

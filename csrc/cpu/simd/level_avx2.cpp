// The avx2 SIMD level. See level.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "scalar.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define BNK_NATIVE_BYTES 32
#define BNK_X86 1
#define BNK_AVX2 1
#define BNK_AVX512 0
#define BNK_AVX512_BF16 0

namespace bnk::cpu::avx2 {
#include "level.h"
}  // namespace bnk::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

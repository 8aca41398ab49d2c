// The avx512_bf16 SIMD level: avx512 with an instruction that rounds to bfloat16. See level.h.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // caused by _mm512_undefined_epi32() in gcc 9-12
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "scalar.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define BNK_NATIVE_BYTES 64
#define BNK_X86 1
#define BNK_AVX2 1
#define BNK_AVX512 1
#define BNK_AVX512_BF16 1

namespace bnk::cpu::avx512_bf16 {
#include "level.h"
}  // namespace bnk::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// The baseline SIMD level: instructions that every processor of the architecture has (SSE2 on x86-64). See level.h.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "scalar.h"

#define BNK_NATIVE_BYTES 16
#if defined(__x86_64__)
#define BNK_X86 1
#else
#define BNK_X86 0
#endif
#define BNK_AVX2 0
#define BNK_AVX512 0
#define BNK_AVX512_BF16 0

namespace bnk::cpu::baseline {
#include "level.h"
}  // namespace bnk::cpu::baseline

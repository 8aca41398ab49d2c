// The one door from the kernels to the hardware.
//
// Kernels reach threads, shared memory, shuffles, barriers, global memory, 16-bit conversion and the special functions
// ONLY through the names below. The names have two bodies with one meaning:
//
//   primitives_cuda.cuh             compiled by nvcc: each is one instruction or a few
//   simt/primitives_host.h          compiled by a host C++ compiler: the test instrument in tests/simt, where the
//   threads of
//                                   a grid are fibers, and every access is bounds-checked, race-checked and counted
//
// so that the kernel source that runs on the GPU is the source that is checked without one.
//
//   BNK_KERNEL(max_threads)         declares a kernel (returns void)
//   BNK_DEVICE                      declares a device function
//   BNK_SHARED(T, name, count)      T name[count] in the block's shared memory; contents undefined at the start
//
//   thread_rank() block_threads() block_rank() grid_blocks()    1-D indices and sizes; block_threads() % kWarpThreads
//   == 0 block_barrier()                 every thread of the block arrives before any leaves; orders shared and global
//   memory among them shuffle_xor(double, mask)       the value of lane (lane ^ mask); every lane of the warp takes
//   part
//
//   load(p), store(p, v)            one element of global memory
//   load_vector(p), store_vector(p, v)   kVectorBytes at an address aligned to kVectorBytes
//   Reuse::kAgain, Reuse::kLast     whether the bytes are worth keeping in cache for a later reader
//
//   widen(T) -> Compute<T>, narrow<T>(Compute<T>)      exact, and round-to-nearest-even (overflow to inf, NaN stays
//   NaN) widen_vector, narrow_vector     the same for all elements of a Vector fused_multiply_add(a, b, c)     a*b + c,
//   rounded once (the build contracts nothing by itself, on either side) reciprocal_sqrt(double)         1/sqrt(x),
//   both correctly rounded is_finite(x)
#pragma once

#include <cstdint>

namespace bnk {

inline constexpr int kWarpThreads = 32;
inline constexpr int kVectorBytes = 16;

// 16-bit floating point in memory; arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
// The type in which elements of type T are computed with.
template <typename T>
using Compute = typename ComputeOf<T>::type;

template <typename T>
inline constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// kVectorBytes of elements in registers; opaque, as its best form differs.
template <typename T>
struct Vector;

enum class Reuse { kAgain, kLast };

}  // namespace bnk

#if defined(__CUDACC__)
#include "primitives_cuda.cuh"
#else
#include "simt/primitives_host.h"
#endif

// The one door from the kernels to the hardware.
//
// Kernels reach threads, shared memory, shuffles, barriers, global memory, 16-bit conversion and the special functions
// ONLY through the names below. The names have two bodies with one meaning:
//
//   ptx_cuda.cuh       compiled by nvcc: each is one instruction or a few
//   simt/primitives_host.h    compiled by a host C++ compiler: the test instrument in tests/support/simt, where the threads of a
//                             grid are fibers, and every access is bounds-checked, race-checked and counted
//
// so that the kernel source that runs on the GPU is the source that is checked without one.
//
// Declarations
//   BNK_KERNEL(max_threads, min_blocks)  a kernel (returns void): __launch_bounds__
//   BNK_DEVICE                         a device function
//   BNK_SHARED(T, name, count)         T name[count] in the block's shared memory; contents undefined at the start
//   BNK_DYNAMIC_SHARED(T, name)        T* name, to as much of it as the launch gives; once in a kernel
//
// Threads
//   thread_rank(), block_threads()     1-D; block_threads() is a multiple of kWarpThreads
//   block_rank(), grid_blocks()        1-D
//   block_barrier()                    every thread of the block arrives before any leaves; orders shared and global
//                                      memory among them
//   shuffle_xor(double, mask)          the value of lane (lane ^ mask); every lane of the warp takes part
//   group_barrier(word, members, rank) every thread of a group of blocks, `rank` of `members` in each, arrives before any
//                                      leaves; orders shared and global memory among them. The blocks must all be
//                                      resident. Between barriers the word is 0 but for its top bit, which each barrier
//                                      flips: a barrier needs no reset before the next one, of any group size.
//   cluster_barrier()                  the same of a cluster: neighbouring blocks, as many as the launch says
//   last_to_arrive(word, count)        true for the last of `count` callers, whose earlier accesses are ordered before
//                                      the last's later ones. The word must be 0, and is 0 again after the last.
//   expect_uniform(key, value)         all blocks of a launch that pass this key here pass equal bits. Checked on the
//                                      host; no code on a GPU.
//
// Shared memory of another block
//   load_dsmem(p, rank)               the double that lies where p, in this block's shared memory, does in that of the
//                                      rank-th block of its cluster; which must have come to a barrier of the
//                                      cluster, and not have ended. A block in no cluster is alone in one.
//
// Global memory
//   load(p), store(p, v)               one element
//   load_vector(p), store_vector(p, v) a Vector<T>: kVectorBytes at an address aligned to kVectorBytes
//   CacheOp::kDefault, CacheOp::kStreaming        whether the bytes are worth keeping in cache for a later reader
//   evict_last(), evict_first()        a CacheHint: the same, of L2, for load_vector(p, hint), where it is known at run time
//                                      only, or where the later reader is of this launch; of memory that it does not write
//
// Values
//   Vector<T>{}                        zeros
//   set_element(vector, i, T)
//   widen(T) -> Compute<T>             exact
//   narrow<T>(Compute<T>)              round-to-nearest-even; overflow to inf, NaN stays NaN
//   to_opmath_vector, from_opmath_vector        the same for all elements of a Vector
//   fused_multiply_add(a, b, c)        a*b + c, rounded once (the build contracts nothing by itself, on either side)
//   reciprocal_sqrt(double)            1/sqrt(x), both correctly rounded
//   is_finite(x)
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
struct OpmathType {
  using type = float;
};
template <>
struct OpmathType<double> {
  using type = double;
};
// The type in which elements of type T are computed with.
template <typename T>
using opmath_type = typename OpmathType<T>::type;

template <typename T>
inline constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// kVectorBytes of elements in registers; opaque, as its best form differs.
template <typename T>
struct Vector;

enum class CacheOp { kDefault, kStreaming };

}  // namespace bnk

#if defined(__CUDACC__)
#include "ptx_cuda.cuh"
#else
#include "simt/primitives_host.h"
#endif

// Hardware access of the kernels.
//
// Kernels access threads, shared memory, shuffles, barriers, global memory, 16-bit conversion and special functions
// only through the names below. Each name has two implementations with the same semantics:
//
//   ptx_cuda.cuh              compiled by nvcc: each is one instruction or a few
//   simt/primitives_host.h    compiled by a host C++ compiler, for the tests in tests/support/simt: the threads of a
//                             grid are fibers, and every access is bounds-checked, race-checked and counted
//
// So the tests check the same kernel source on the host that runs on the GPU.
//
// Declarations
//   BNK_KERNEL(max_threads, min_blocks)   a kernel (returns void): __launch_bounds__
//   BNK_DEVICE                            a device function
//   BNK_SHARED(T, name, count)            T name[count] in the block's shared memory; contents undefined at the start
//   BNK_DYNAMIC_SHARED(T, name)           T* name, pointing to the launch's dynamic shared memory; once per kernel
//
// Threads
//   thread_rank(), block_threads()        1-D; block_threads() is a multiple of kWarpThreads
//   block_rank(), grid_blocks()           1-D
//   block_barrier()                       every thread of the block arrives before any leaves; orders shared and global
//                                         memory among them
//   shuffle_xor(double, mask)             the value of lane (lane ^ mask); every lane of the warp takes part
//   group_barrier(word, group_size, rank) every thread of a group of `group_size` blocks arrives before any leaves;
//                                         `rank` is the block's rank in the group. Orders shared and global memory
//                                         among them. The blocks must all be resident. Between barriers the word is 0
//                                         except for its top bit, which each barrier flips: the word needs no reset
//                                         before the next barrier, of any group size.
//   cluster_barrier()                     the same for a cluster: adjacent blocks, as many as the launch specifies
//   last_to_arrive(word, count)           true for the last of `count` callers. The other callers' earlier accesses are
//                                         ordered before the last caller's later ones. The word must be 0 before the
//                                         first call and is 0 again after the last.
//   expect_uniform(key, value)            all blocks of a launch that pass this key pass equal bits. Checked on the
//                                         host; no code on a GPU.
//
// Distributed shared memory
//   load_dsmem(p, rank)                   the double at p's address in the shared memory of the block of rank `rank` in
//                                         this block's cluster. That block must have reached a cluster barrier and not
//                                         have exited. A block without a cluster forms a cluster of one.
//
// Global memory
//   load(p), store(p, v)                  one element
//   load_vector(p), store_vector(p, v)    a Vector<T>: kVectorBytes at an address aligned to kVectorBytes
//   CacheOp::kDefault, kStreaming         whether a later reader benefits from caching the bytes
//   evict_last(), evict_first()           a CacheHint for load_vector(p, hint): the same for L2, when known only at run
//                                         time or when the later reader belongs to this launch; only for memory that
//                                         the launch does not write
//
// Values
//   Vector<T>{}                           zeros
//   set_element(vector, i, T)
//   to_opmath(T) -> opmath_type<T>        exact
//   from_opmath<T>(opmath_type<T>)        round-to-nearest-even; overflow to inf, NaN stays NaN
//   to_opmath_vector, from_opmath_vector  the same for all elements of a Vector
//   fused_multiply_add(a, b, c)           a*b + c, rounded once (both builds disable implicit contraction)
//   reciprocal_sqrt(double)               1/sqrt(x), both operations correctly rounded
//   is_finite(x)
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace bnk {

inline constexpr int kWarpThreads = 32;

// 16-bit floating point in memory; arithmetic is in float.
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
// The arithmetic type of elements of type T.
template <typename T>
using opmath_type = typename OpmathType<T>::type;

template <typename T>
inline constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// kVectorBytes of elements in registers; opaque, because the best representation differs between implementations.
template <typename T>
struct Vector;

enum class CacheOp { kDefault, kStreaming };

}  // namespace bnk

#if defined(__CUDACC__)
#include "ptx_cuda.cuh"
#else
#include "simt/primitives_host.h"
#endif

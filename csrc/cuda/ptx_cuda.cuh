// Implementation of ptx.cuh on the GPU.
//
// Every instruction that orders memory or is written as PTX (PTX ISA 9.0, "Memory Consistency Model" and the
// instruction's own section):
//
//   instruction                      from   scope    order     why it suffices
//   -------------------------------  -----  -------  --------  -----------------------------------------------------
//   bar.sync (__syncthreads)         all    block    acq_rel   all threads of the block, converged, call it
//   shfl.sync.bfly (__shfl_xor_sync) all    warp     none      moves registers only; all 32 lanes, converged, call it
//   atom.add.acq_rel.gpu             sm_70  gpu      acq_rel   arrival at group_barrier. The preceding bar.sync orders
//                                                              the whole block's accesses before thread 0's release;
//                                                              the additions of all CTAs of the group form one chain
//                                                              of atomic read-modify-writes, so observing the last one
//                                                              synchronizes with each of them.
//   ld.acquire.gpu                   sm_70  gpu      acquire   thread 0's wait for the flipped bit. The following
//                                                              bar.sync orders the whole block's later accesses after
//                                                              it, weak loads through L1 included.
//   atom.inc.acq_rel.gpu             sm_70  gpu      acq_rel   last_to_arrive: [word] = old >= count-1 ? 0 : old+1. One
//                                                              chain as above, so the last caller's stores come after
//                                                              all callers' loads. An old value above count-1 wraps
//                                                              too, and no caller is the last: the word must be 0.
//   barrier.cluster.arrive.release,  sm_90  cluster  release,  orders a CTA's stores to its shared memory before its
//   barrier.cluster.wait.acquire                     acquire   peers' loads, and those loads before the CTA exits.
//                                                              .aligned: the calls are outside of divergent code.
//   mapa.shared::cluster             sm_90  -        none      address arithmetic
//   ld.shared::cluster               sm_90  -        weak      between two cluster barriers; volatile so that it stays
//                                                              between them
//   createpolicy.fractional.L2       sm_80  -        none      creates a value; a hint affects performance only
//   ld.global.L2::cache_hint         sm_80  -        weak      not volatile: only for memory that the launch does not
//                                                              write, so moving or merging such loads changes nothing
//   ld.global.cs, st.global.cs       all    -        weak      as ld.global, st.global; "evict first"
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// min_blocks must be given: without it, ptxas spills registers to fit one more block per multiprocessor.
#define BNK_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define BNK_DEVICE __device__ __forceinline__
#define BNK_SHARED(T, name, count) __shared__ T name[count]
#define BNK_DYNAMIC_SHARED(T, name)             \
  extern __shared__ uint4 bnk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(bnk_dynamic_shared)

namespace bnk {

BNK_DEVICE unsigned thread_rank() { return threadIdx.x; }
BNK_DEVICE unsigned block_threads() { return blockDim.x; }
BNK_DEVICE unsigned block_rank() { return blockIdx.x; }
BNK_DEVICE unsigned grid_blocks() { return gridDim.x; }

BNK_DEVICE void block_barrier() { __syncthreads(); }

BNK_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Thread 0 arrives and waits for its block: the block barriers order the block's earlier accesses before the arrival
// and its later accesses after the wait. Rank 0 adds 0x80000000 - (group_size - 1) and every other CTA adds 1, so the
// top bit flips when all have arrived.
BNK_DEVICE void group_barrier(unsigned* word, unsigned group_size, unsigned rank) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned step = rank == 0 ? 0x80000000u - (group_size - 1) : 1;
    unsigned before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(step) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    } while (((before ^ now) & 0x80000000u) == 0);
  }
  __syncthreads();
}

// Devices before sm_90 have no clusters, and the plan launches none.
BNK_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

BNK_DEVICE double load_dsmem(const double* address, int rank) {
#if __CUDA_ARCH__ >= 900
  const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(address));
  unsigned other;
  double value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(other) : "memory");
  return value;
#else
  return *address;
#endif
}

BNK_DEVICE bool last_to_arrive(unsigned* word, unsigned count) {
  unsigned before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(count - 1) : "memory");
  return before == count - 1;
}

template <typename Value>
BNK_DEVICE void expect_uniform(int64_t /*key*/, Value /*value*/) {}

// Elements are loaded and stored as the unsigned integer of their size: the cache-hint intrinsics are overloaded for
// those.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned int;
};
template <>
struct Bits<8> {
  using type = unsigned long long;
};
template <>
struct Bits<16> {
  using type = uint4;
};

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE T load(const T* address) {
  using Raw = typename Bits<sizeof(T)>::type;
  const Raw* raw = reinterpret_cast<const Raw*>(address);
  const Raw bits = kCacheOp == CacheOp::kStreaming ? __ldcs(raw) : *raw;
  return reinterpret_cast<const T&>(bits);
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE void store(T* address, T value) {
  using Raw = typename Bits<sizeof(T)>::type;
  Raw* raw = reinterpret_cast<Raw*>(address);
  if constexpr (kCacheOp == CacheOp::kStreaming) {
    __stcs(raw, reinterpret_cast<const Raw&>(value));
  } else {
    *raw = reinterpret_cast<const Raw&>(value);
  }
}

// A vector stays in the four registers it was loaded into until its elements are converted: unpacking it earlier would
// make a thread wait for this load before it issues the next.
template <typename T>
struct alignas(kVectorBytes) Vector {
  uint32_t words[kVectorBytes / 4];
};

template <typename T>
BNK_DEVICE void set_element(Vector<T>& vector, int i, T value) {
  if constexpr (sizeof(T) == 8) {
    const uint64_t bits = __double_as_longlong(value);
    vector.words[2 * i] = static_cast<uint32_t>(bits);
    vector.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (sizeof(T) == 4) {
    vector.words[i] = __float_as_uint(value);
  } else {
    const int shift = 16 * (i % 2);
    vector.words[i / 2] = (vector.words[i / 2] & (0xffff0000u >> shift)) | (static_cast<uint32_t>(value.bits) << shift);
  }
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE Vector<T> load_vector(const T* address) {
  return load<kCacheOp>(reinterpret_cast<const Vector<T>*>(address));
}

// Before sm_80, loads ignore the hint.
struct CacheHint {
  uint64_t policy;
};

BNK_DEVICE CacheHint evict_last() {
  CacheHint hint{};
#if __CUDA_ARCH__ >= 800
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(hint.policy));
#endif
  return hint;
}

BNK_DEVICE CacheHint evict_first() {
  CacheHint hint{};
#if __CUDA_ARCH__ >= 800
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(hint.policy));
#endif
  return hint;
}

template <typename T>
BNK_DEVICE Vector<T> load_vector(const T* address, CacheHint hint) {
#if __CUDA_ARCH__ >= 800
  Vector<T> value;
  asm("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
      : "l"(address), "l"(hint.policy));
  return value;
#else
  return load_vector(address);
#endif
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE void store_vector(T* address, Vector<T> value) {
  store<kCacheOp>(reinterpret_cast<Vector<T>*>(address), value);
}

BNK_DEVICE double to_opmath(double value) { return value; }
BNK_DEVICE float to_opmath(float value) { return value; }
BNK_DEVICE float to_opmath(Half value) { return __half2float(__ushort_as_half(value.bits)); }
BNK_DEVICE float to_opmath(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
BNK_DEVICE T from_opmath(opmath_type<T> value) {
  if constexpr (sizeof(T) == sizeof(opmath_type<T>)) {
    return value;
  } else if constexpr (__is_same(T, Half)) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  }
}

template <typename T>
BNK_DEVICE void to_opmath_vector(const Vector<T>& in, opmath_type<T> (&out)[kVectorElements<T>]) {
#pragma unroll
  for (int word = 0; word < kVectorBytes / 4; ++word) {
    const uint32_t bits = in.words[word];
    if constexpr (sizeof(T) == 8) {
      if (word % 2 == 0) out[word / 2] = __hiloint2double(in.words[word + 1], bits);
    } else if constexpr (sizeof(T) == 4) {
      out[word] = __uint_as_float(bits);
    } else if constexpr (__is_same(T, Half)) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits));
      out[2 * word] = pair.x;
      out[2 * word + 1] = pair.y;
    } else {
      out[2 * word] = __uint_as_float(bits << 16);
      out[2 * word + 1] = __uint_as_float(bits & 0xffff0000u);
    }
  }
}

// 16-bit results are converted in pairs: one instruction packs two.
template <typename T>
BNK_DEVICE Vector<T> from_opmath_vector(const opmath_type<T> (&in)[kVectorElements<T>]) {
  Vector<T> out;
#pragma unroll
  for (int word = 0; word < kVectorBytes / 4; ++word) {
    if constexpr (sizeof(T) == 8) {
      out.words[word] = word % 2 == 0 ? __double2loint(in[word / 2]) : __double2hiint(in[word / 2]);
    } else if constexpr (sizeof(T) == 4) {
      out.words[word] = __float_as_uint(in[word]);
    } else if constexpr (__is_same(T, Half)) {
      const __half2 pair = __floats2half2_rn(in[2 * word], in[2 * word + 1]);
      out.words[word] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * word], in[2 * word + 1]);
      out.words[word] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  return out;
}

BNK_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BNK_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
BNK_DEVICE double reciprocal_sqrt(double value) { return __drcp_rn(__dsqrt_rn(value)); }
BNK_DEVICE bool is_finite(float value) { return isfinite(value); }
BNK_DEVICE bool is_finite(double value) { return isfinite(value); }

}  // namespace bnk

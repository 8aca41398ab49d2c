// The host implementation of ptx.cuh, for tests. Included by ptx.cuh, which documents the primitives.
//
// Every call carries its location in the kernel (a defaulted source location), so that a fault can name it. The engine
// checks and counts accesses to global memory; the accesses themselves are plain C++ that is inlined into the kernel,
// so a sanitizer sees them at the kernel's line. Vectors are accessed element by element, which moves the same bytes.
// Shared memory is plain C++ memory.
#pragma once

#include <cmath>
#include <type_traits>

#include "simt/buffers.h"
#include "simt/engine.h"
#include "simt/float16.h"

#define BNK_KERNEL(max_threads, min_blocks) inline void
#define BNK_DEVICE inline
// The lambda's type identifies the array: there is one for each declaration and each instantiation of a template around
// it.
#define BNK_SHARED(T, name, count) T(&name)[count] = ::simt::shared<T, count>([] {}, #name)
#define BNK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared(::simt::Site::current()))

namespace simt {

template <typename T, size_t kCount, typename Declaration>
T (&shared(Declaration, const char* name, Site site = Site::current()))
[kCount] {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_default_constructible_v<T>,
                "as CUDA asks of __shared__ variables");
  static_assert(alignof(T) <= 16);
  static const char key = 0;
  return *static_cast<T(*)[kCount]>(shared_array(&key, name, sizeof(T[kCount]), site));
}

}  // namespace simt

namespace bnk {

BNK_DEVICE unsigned thread_rank() { return simt::position().thread; }
BNK_DEVICE unsigned block_threads() { return simt::position().threads; }
BNK_DEVICE unsigned block_rank() { return simt::position().block; }
BNK_DEVICE unsigned grid_blocks() { return simt::position().blocks; }

BNK_DEVICE void block_barrier(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }

BNK_DEVICE double shuffle_xor(double value, int mask, simt::Site site = simt::Site::current()) {
  return simt::shuffle_xor(value, mask, site);
}

BNK_DEVICE void group_barrier(unsigned* counter, unsigned group_size, unsigned rank,
                              simt::Site site = simt::Site::current()) {
  simt::group_barrier(counter, group_size, rank, site);
}

BNK_DEVICE void cluster_barrier(simt::Site site = simt::Site::current()) { simt::cluster_barrier(site); }

BNK_DEVICE double load_dsmem(const double* address, int rank, simt::Site site = simt::Site::current()) {
  return *static_cast<const double*>(simt::in_cta(address, static_cast<unsigned>(rank), site));
}

BNK_DEVICE bool last_to_arrive(unsigned* counter, unsigned count, simt::Site site = simt::Site::current()) {
  return simt::last_to_arrive(counter, count, site);
}

template <typename Value>
BNK_DEVICE void expect_uniform(int64_t key, Value value, simt::Site site = simt::Site::current()) {
  simt::expect_uniform(key, static_cast<double>(value), site);
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE T load(const T* address, simt::Site site = simt::Site::current()) {
  return *static_cast<const T*>(simt::checked_read(address, sizeof(T), sizeof(T), site));
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE void store(T* address, T value, simt::Site site = simt::Site::current()) {
  *static_cast<T*>(simt::checked_write(address, sizeof(T), sizeof(T), site)) = value;
}

template <typename T>
struct alignas(kVectorBytes) Vector {
  T data[kVectorElements<T>];
};

template <typename T>
BNK_DEVICE void set_element(Vector<T>& vector, int i, T value) {
  vector.data[i] = value;
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE Vector<T> load_vector(const T* address, simt::Site site = simt::Site::current()) {
  const T* real = static_cast<const T*>(simt::checked_read(address, kVectorBytes, kVectorBytes, site));
  Vector<T> value;
  for (int i = 0; i < kVectorElements<T>; ++i) value.data[i] = real[i];
  return value;
}

struct CacheHint {};
BNK_DEVICE CacheHint evict_last() { return {}; }
BNK_DEVICE CacheHint evict_first() { return {}; }

template <typename T>
BNK_DEVICE Vector<T> load_vector(const T* address, CacheHint, simt::Site site = simt::Site::current()) {
  return load_vector(address, site);
}

template <CacheOp kCacheOp = CacheOp::kDefault, typename T>
BNK_DEVICE void store_vector(T* address, Vector<T> value, simt::Site site = simt::Site::current()) {
  T* real = static_cast<T*>(simt::checked_write(address, kVectorBytes, kVectorBytes, site));
  for (int i = 0; i < kVectorElements<T>; ++i) real[i] = value.data[i];
}

BNK_DEVICE double to_opmath(double value) { return value; }
BNK_DEVICE float to_opmath(float value) { return value; }
BNK_DEVICE float to_opmath(Half value) { return simt::half_to_float(value.bits); }
BNK_DEVICE float to_opmath(BFloat16 value) { return simt::bfloat16_to_float(value.bits); }

template <typename T>
BNK_DEVICE T from_opmath(opmath_type<T> value) {
  if constexpr (std::is_same_v<T, Half>) {
    return {simt::float_to_half(value)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {simt::float_to_bfloat16(value)};
  } else {
    return value;
  }
}

template <typename T>
BNK_DEVICE void to_opmath_vector(const Vector<T>& in, opmath_type<T> (&out)[kVectorElements<T>]) {
  for (int i = 0; i < kVectorElements<T>; ++i) out[i] = to_opmath(in.data[i]);
}

template <typename T>
BNK_DEVICE Vector<T> from_opmath_vector(const opmath_type<T> (&in)[kVectorElements<T>]) {
  Vector<T> out;
  for (int i = 0; i < kVectorElements<T>; ++i) out.data[i] = from_opmath<T>(in[i]);
  return out;
}

BNK_DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
BNK_DEVICE double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
BNK_DEVICE double reciprocal_sqrt(double value) { return 1.0 / std::sqrt(value); }
BNK_DEVICE bool is_finite(float value) { return std::isfinite(value); }
BNK_DEVICE bool is_finite(double value) { return std::isfinite(value); }

}  // namespace bnk

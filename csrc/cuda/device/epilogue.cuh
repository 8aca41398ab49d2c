// Epilogue: what a normalised value passes before it is written, and what is left of it for the backward (problem.h).
//
//   v = (x - mean) * invstd * weight + bias      y = relu(v + residual), each part if it is there
#pragma once

#include "../../core/relu_bounds.h"
#include "per_channel.cuh"
#include "visit_vectors.cuh"

namespace bnk {

template <typename opmath_t>
BNK_DEVICE opmath_t normalized(opmath_t x, opmath_t mean, opmath_t invstd, opmath_t weight, opmath_t bias) {
  const opmath_t xhat = (x - mean) * invstd;
  return fused_multiply_add(xhat, weight, bias);
}

// NaN stays NaN.
template <typename opmath_t>
BNK_DEVICE opmath_t relu(opmath_t value) {
  return value < 0 ? opmath_t(0) : value;
}

// The residual of a tile of vectors on its way out. kAhead: whole vectors are loaded ahead, all of a tile's together, as far
// as there are registers for it; others when their turn comes.
template <typename T, int kVectors, bool kAhead>
struct ResidualTile {
  Vector<T> bits[kVectors];

  template <Layout kLayout, typename Access>
  BNK_DEVICE void load(const View<const T, kLayout>& residual, const Access (&accesses)[kVectors]) {
    if constexpr (kAhead && Access::kFull) {
      if (residual.data != nullptr) load_vectors<CacheOp::kStreaming>(residual, accesses, bits);
    }
  }

  template <Layout kLayout, typename Access>
  BNK_DEVICE void add(const View<const T, kLayout>& residual, const Access (&accesses)[kVectors], int i,
                      opmath_type<T> (&values)[kVectorElements<T>]) {
    if (residual.data == nullptr) return;
    if constexpr (!(kAhead && Access::kFull)) bits[i] = load_access<CacheOp::kStreaming>(residual, accesses[i]);
    opmath_type<T> more[kVectorElements<T>];
    unpack_access(bits[i], accesses[i], more);
#pragma unroll
    for (int element = 0; element < kVectorElements<T>; ++element) values[element] += more[element];
  }
};

template <typename opmath_t, int kElements>
BNK_DEVICE void relu(bool enabled, opmath_t (&values)[kElements]) {
  if (!enabled) return;
#pragma unroll
  for (int element = 0; element < kElements; ++element) values[element] = relu(values[element]);
}

// By one thread for each channel, of the values that the channel was normalised with.
template <typename T>
BNK_DEVICE void write_relu_bounds(const Epilogue& epilogue, int64_t channel, opmath_type<T> mean, opmath_type<T> invstd,
                                  opmath_type<T> weight, opmath_type<T> bias) {
  using opmath_t = opmath_type<T>;
  const auto passes = [&](opmath_t x) {
    return !(to_opmath(from_opmath<T>(normalized(x, mean, invstd, weight, bias))) <= 0);
  };
  const ReluBounds<opmath_t> range = relu_bounds(mean, invstd, weight, bias, passes);
  write(epilogue.low, channel, range.low);
  write(epilogue.high, channel, range.high);
}

}  // namespace bnk

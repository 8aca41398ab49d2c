// Epilogue: applied to each normalised value before it is written, and its backward (problem.h).
//
//   forward    v = (x - mean) * invstd * weight + bias      y = relu(v + residual); residual and ReLU are optional
//   backward   g = grad_y if there is no ReLU, else  g = grad_y where low <= x <= high, 0 elsewhere  (relu_bounds.h)
#pragma once

#include <limits>
#include <type_traits>

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

// Residual values of one output tile. kAhead: load full vectors ahead of the arithmetic, all vectors of a tile
// together, if there are registers for them. All other vectors are loaded when they are added.
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

// Called by one thread per channel, with the values by which the channel was normalised.
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

// One end of the ReLU bounds is infinite. Storing the finite end and one bit takes half the registers of both ends:
// where y decreases as x increases, the bound and x are compared with their signs flipped.
template <typename opmath_t, int kColumns>
struct ReluBackward {
  opmath_t edge[kColumns];
  unsigned falling = 0;

  BNK_DEVICE void read_channel(const ConstPerChannel& lows, const ConstPerChannel& highs, int column, int64_t channel) {
    const opmath_t low = static_cast<opmath_t>(read(lows, channel));
    const opmath_t high = static_cast<opmath_t>(read(highs, channel));
    const bool falls = high < std::numeric_limits<opmath_t>::infinity();
    edge[column] = falls ? -high : low;
    falling |= falls ? 1u << column : 0;
  }

  // The gradient of one element of a vector. A NaN x, whose y is NaN, passes g.
  BNK_DEVICE opmath_t operator()(int element, opmath_t x, opmath_t g) const {
    const int column = element % kColumns;
    const opmath_t side = (falling >> column & 1u) != 0 ? -x : x;
    return side < edge[column] ? opmath_t(0) : g;
  }
};

template <typename opmath_t, int kColumns>
struct IdentityBackward {
  BNK_DEVICE void read_channel(const ConstPerChannel&, const ConstPerChannel&, int, int64_t) {}
  BNK_DEVICE opmath_t operator()(int, opmath_t, opmath_t g) const { return g; }
};

// kHasRelu: the forward ended with a ReLU.
template <bool kHasRelu, typename opmath_t, int kColumns>
using EpilogueBackward =
    std::conditional_t<kHasRelu, ReluBackward<opmath_t, kColumns>, IdentityBackward<opmath_t, kColumns>>;

}  // namespace bnk

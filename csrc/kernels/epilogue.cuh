// Epilogue: what a normalised value passes before it is written, and what is left of it for the backward (problem.h).
//
//   v = (x - mean) * invstd * weight + bias      y = relu(v + residual), each part if it is there
#pragma once

#include "../relu_range.h"
#include "per_channel.cuh"
#include "tiles.cuh"

namespace bnk {

template <typename Real>
BNK_DEVICE Real normalized(Real x, Real mean, Real invstd, Real weight, Real bias) {
  const Real xhat = (x - mean) * invstd;
  return fused_multiply_add(xhat, weight, bias);
}

// NaN stays NaN.
template <typename Real>
BNK_DEVICE Real relu(Real value) {
  return value < 0 ? Real(0) : value;
}

// The residual of a tile of windows on its way out. kAhead: whole windows are loaded ahead, all of a tile's together, as far
// as there are registers for it; others when their turn comes.
template <typename T, int kTile, bool kAhead>
struct ResidualTile {
  Vector<T> bits[kTile];

  template <Layout kLayout, typename Window_>
  BNK_DEVICE void load(const View<const T, kLayout>& residual, const Window_ (&windows)[kTile]) {
    if constexpr (kAhead && Window_::kWhole) {
      if (residual.data != nullptr) load_tile<Reuse::kLast>(residual, windows, bits);
    }
  }

  template <Layout kLayout, typename Window_>
  BNK_DEVICE void add(const View<const T, kLayout>& residual, const Window_ (&windows)[kTile], int i,
                      Compute<T> (&values)[kVectorElements<T>]) {
    if (residual.data == nullptr) return;
    if constexpr (!(kAhead && Window_::kWhole)) bits[i] = load_window<Reuse::kLast>(residual, windows[i]);
    Compute<T> more[kVectorElements<T>];
    unpack_window(bits[i], windows[i], more);
#pragma unroll
    for (int element = 0; element < kVectorElements<T>; ++element) values[element] += more[element];
  }
};

template <typename Real, int kElements>
BNK_DEVICE void relu(bool is_there, Real (&values)[kElements]) {
  if (!is_there) return;
#pragma unroll
  for (int element = 0; element < kElements; ++element) values[element] = relu(values[element]);
}

// By one thread for each channel, of the values that the channel was normalised with.
template <typename T>
BNK_DEVICE void write_relu_range(const Epilogue& epilogue, int64_t channel, Compute<T> mean, Compute<T> invstd,
                                 Compute<T> weight, Compute<T> bias) {
  using Real = Compute<T>;
  const auto passes = [&](Real x) { return !(widen(narrow<T>(normalized(x, mean, invstd, weight, bias))) <= 0); };
  const ReluRange<Real> range = relu_range(mean, invstd, weight, bias, passes);
  write(epilogue.low, channel, range.low);
  write(epilogue.high, channel, range.high);
}

}  // namespace bnk

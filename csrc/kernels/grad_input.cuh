// Backward, the result. With g = grad_y, as its gate lets it through, xhat = (x - mean) * invstd and
// scale = weight * invstd:
//
//   training    grad_x = (g - mean(g) - (x - mean) * slope) * scale    where slope = mean(g*xhat) * invstd
//   inference   grad_x = g * scale                                     and x is not read, but for that
//
// The statistics do not depend on x in inference, which is why its gradient has no further terms.
#pragma once

#include <type_traits>

#include "relu_gate.cuh"
#include "tiles.cuh"

namespace bnk {

// Windows of each of x and g a thread keeps in flight.
inline constexpr int kGradInputTile = 4;

struct GradInputParams {
  Walk walk;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  ConstPerChannel mean_g;       // training
  ConstPerChannel mean_g_xhat;  // training
  ConstPerChannel relu_low;     // null: no ReLU
  ConstPerChannel relu_high;
  bool training;
};

// kGated: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kGated>
BNK_KERNEL(kMaxBlockThreads)
grad_input_kernel(GradInputParams params) {
  using Walker_ = Walker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kColumns = Walker_::kColumns;
  constexpr int kTile = kGradInputTile;

  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  T* out = static_cast<T*>(params.grad_x);
  const View<const T, kLayout> x{lead, elements_of(params.walk), Walker_::is_wide(params.walk, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(params.walk), Walker_::is_wide(params.walk, grad, lead)};
  const View<T, kLayout> grad_x{out, elements_of(params.walk), Walker_::is_wide(params.walk, out, lead)};
  const bool whole = Walker_::is_whole(params.walk) && x.wide && g.wide && grad_x.wide;

  for (int64_t index = block_rank(); index < shares_of(params.walk); index += grid_blocks()) {
    const Share share = share_at(params.walk, index);
    Walker_ walker(params.walk, share, lead);

    Real scale[kColumns], mean[kColumns], mean_g[kColumns], slope[kColumns];
    GateIf<kGated, Real, kColumns> gate;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      const int64_t channel = walker.channel(column);
      const double invstd = read(params.invstd, channel);
      scale[column] = static_cast<Real>(read_or(params.weight, channel, 1) * invstd);
      gate.read_channel(params.relu_low, params.relu_high, column, channel);
      if (!params.training) continue;
      mean[column] = static_cast<Real>(read(params.mean, channel));
      mean_g[column] = static_cast<Real>(read(params.mean_g, channel));
      slope[column] = static_cast<Real>(read(params.mean_g_xhat, channel) * invstd);
    }

    // is_training.value is a constant.
    const auto write_tile = [&](const auto& windows, auto is_training) {
      constexpr bool kReadsX = is_training.value || kGated;
      Vector<T> g_bits[kTile], x_bits[kTile];
      load_tile<Reuse::kLast>(g, windows, g_bits);
      if constexpr (kReadsX) load_tile<Reuse::kLast>(x, windows, x_bits);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        Real gs[Walker_::kElements], xs[Walker_::kElements];
        unpack_window(g_bits[i], windows[i], gs);
        if constexpr (kReadsX) unpack_window(x_bits[i], windows[i], xs);
#pragma unroll
        for (int element = 0; element < Walker_::kElements; ++element) {
          const int column = element % kColumns;
          Real value = gs[element];
          if constexpr (kGated) value = gate(element, xs[element], value);
          if constexpr (is_training.value) {
            const Real deviation = xs[element] - mean[column];
            value = fused_multiply_add(-deviation, slope[column], value - mean_g[column]);
          }
          gs[element] = value * scale[column];
        }
        store_window(grad_x, windows[i], gs);
      }
    };
    if (params.training) {
      visit_tiles<kTile>(walker, whole, [&](const auto& windows, int) { write_tile(windows, std::true_type{}); });
    } else {
      visit_tiles<kTile>(walker, whole, [&](const auto& windows, int) { write_tile(windows, std::false_type{}); });
    }
  }
}

}  // namespace bnk

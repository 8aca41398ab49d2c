// Backward, the result. With g = grad_y and xhat = (x - mean) * invstd:
//
//   training    grad_x = (g - mean(g) - xhat * mean(g*xhat)) * (weight * invstd)
//   inference   grad_x = g * (weight * invstd)                                        and x is not read
//
// The statistics do not depend on x in inference, which is why its gradient has no further terms.
#pragma once

#include "per_channel.cuh"
#include "walkers.cuh"

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
  bool training;
};

template <typename T, Layout kLayout>
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

  for (int64_t index = block_rank(); index < shares_of(params.walk); index += grid_blocks()) {
    const Share share = share_at(params.walk, index);
    Walker_ walker(params.walk, share, lead);

    Real scale[kColumns], mean[kColumns], invstd[kColumns], mean_g[kColumns], mean_g_xhat[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      const int64_t channel = walker.channel(column);
      const double channel_invstd = read(params.invstd, channel);
      scale[column] = static_cast<Real>(read_or(params.weight, channel, 1) * channel_invstd);
      if (!params.training) continue;
      mean[column] = static_cast<Real>(read(params.mean, channel));
      invstd[column] = static_cast<Real>(channel_invstd);
      mean_g[column] = static_cast<Real>(read(params.mean_g, channel));
      mean_g_xhat[column] = static_cast<Real>(read(params.mean_g_xhat, channel));
    }

    while (walker.more()) {
      Window windows[kTile];
      Vector<T> g_bits[kTile], x_bits[kTile];
      next_tile(walker, windows);
      load_tile<Reuse::kLast>(g, windows, g_bits);
      if (params.training) load_tile<Reuse::kLast>(x, windows, x_bits);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        Real gs[Walker_::kElements], xs[Walker_::kElements];
        unpack_window(g_bits[i], windows[i], gs);
        if (params.training) unpack_window(x_bits[i], windows[i], xs);
#pragma unroll
        for (int element = 0; element < Walker_::kElements; ++element) {
          const int column = element % kColumns;
          Real value = gs[element];
          if (params.training) {
            const Real xhat = (xs[element] - mean[column]) * invstd[column];
            value = fused_multiply_add(-xhat, mean_g_xhat[column], value - mean_g[column]);
          }
          gs[element] = value * scale[column];
        }
        store_window(grad_x, windows[i], gs);
      }
    }
  }
}

}  // namespace bnk

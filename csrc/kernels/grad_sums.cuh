// Backward, the sums: each block sums g and g*xhat over each of its shares into a partial, where g = grad_y, as its gate lets
// it through, and xhat = (x - mean) * invstd. finish_grad_sums joins the partials (finish.cuh).
//
// A thread sums a tile of a few windows in the elements' compute type and the tiles in double.
#pragma once

#include "partials.cuh"
#include "relu_gate.cuh"
#include "sums.cuh"
#include "tiles.cuh"

namespace bnk {

// Windows of each of x and g a thread keeps in flight.
inline constexpr int kGradSumsTile = 4;

struct GradSumsParams {
  Walk walk;
  const void* grad_y;
  const void* x;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  ConstPerChannel relu_low;  // null: no ReLU
  ConstPerChannel relu_high;
  double* partial;  // Sums of g and of g*xhat, see partials.cuh
};

// kGated: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kGated>
BNK_KERNEL(kMaxBlockThreads)
grad_sums_kernel(GradSumsParams params) {
  using Walker_ = Walker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kColumns = Walker_::kColumns;
  BNK_SHARED(Sums, slots, (kReduceSlots<kColumns, Walker_::kLanes>));

  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  const View<const T, kLayout> x{lead, elements_of(params.walk), Walker_::is_wide(params.walk, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(params.walk), Walker_::is_wide(params.walk, grad, lead)};
  const bool whole = Walker_::is_whole(params.walk) && x.wide && g.wide;

  for (int64_t index = block_rank(); index < shares_of(params.walk); index += grid_blocks()) {
    const Share share = share_at(params.walk, index);
    Walker_ walker(params.walk, share, lead);

    Real mean[kColumns], invstd[kColumns];
    GateIf<kGated, Real, kColumns> gate;
    Sums total[kColumns] = {};
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      mean[column] = static_cast<Real>(read(params.mean, walker.channel(column)));
      invstd[column] = static_cast<Real>(read(params.invstd, walker.channel(column)));
      gate.read_channel(params.relu_low, params.relu_high, column, walker.channel(column));
    }

    visit_tiles<kGradSumsTile>(walker, whole, [&](const auto& windows, int /*number*/) {
      Vector<T> x_bits[kGradSumsTile], g_bits[kGradSumsTile];
      Real xs[kGradSumsTile][Walker_::kElements], gs[kGradSumsTile][Walker_::kElements];
      load_tile<Reuse::kAgain>(x, windows, x_bits);
      load_tile<Reuse::kAgain>(g, windows, g_bits);
      unpack_tile(x_bits, windows, xs);
      unpack_tile(g_bits, windows, gs);
      Real tile_g[kColumns] = {}, tile_g_xhat[kColumns] = {};
#pragma unroll
      for (int i = 0; i < kGradSumsTile; ++i) {
#pragma unroll
        for (int element = 0; element < Walker_::kElements; ++element) {
          // An element that is not there must add nothing, even where the channel's statistics are not finite.
          if (element < windows[i].begin || element >= windows[i].end) continue;
          const int column = element % kColumns;
          const Real xhat = (xs[i][element] - mean[column]) * invstd[column];
          const Real gradient = gate(element, xs[i][element], gs[i][element]);
          tile_g[column] += gradient;
          tile_g_xhat[column] = fused_multiply_add(gradient, xhat, tile_g_xhat[column]);
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        join(total[column], {static_cast<double>(tile_g[column]), static_cast<double>(tile_g_xhat[column])});
      }
    });

    store_share(params.partial, params.walk, share, total, slots);
  }
}

}  // namespace bnk

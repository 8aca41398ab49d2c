// Backward, grad_x. g = grad_y after the backward of the epilogue (epilogue.cuh), xhat = (x - mean) * invstd and scale
// = weight * invstd:
//
//   training    grad_x = (g - mean(g) - (x - mean) * slope) * scale    where slope = mean(g*xhat) * invstd
//   inference   grad_x = g * scale                                     reads x only if there is a ReLU
//
// In inference the statistics do not depend on x, so the gradient has no further terms. CTAs take work tiles
// round-robin; each thread writes the elements of its own vectors (tile_iterator.cuh).
#pragma once

#include <type_traits>

#include "../device/epilogue.cuh"
#include "../device/visit_vectors.cuh"

namespace bnk {

// Vectors of each of x and g that a thread has in flight.
inline constexpr int kGradInputTile = 4;

struct GradInputParams {
  TilePartition partition;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  ConstPerChannel mean_g;       // training only
  ConstPerChannel mean_g_xhat;  // training only
  ConstPerChannel relu_low;     // null: no ReLU
  ConstPerChannel relu_high;
  bool training;
};

// kHasRelu: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kHasRelu>
BNK_KERNEL(kMaxBlockThreads, 1)
grad_input_kernel(GradInputParams params) {
  using Iterator = TileIterator<T, kLayout>;
  using opmath_t = opmath_type<T>;
  constexpr int kColumns = Iterator::kColumns;
  constexpr int kVectors = kGradInputTile;

  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  T* out = static_cast<T*>(params.grad_x);
  const View<const T, kLayout> x{lead, elements_of(params.partition), Iterator::is_wide(params.partition, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(params.partition), Iterator::is_wide(params.partition, grad, lead)};
  const View<T, kLayout> grad_x{out, elements_of(params.partition), Iterator::is_wide(params.partition, out, lead)};
  const bool whole = Iterator::is_whole(params.partition) && x.wide && g.wide && grad_x.wide;

  for (int64_t index = block_rank(); index < work_tiles_of(params.partition); index += grid_blocks()) {
    const WorkTile work_tile = work_tile_at(params.partition, index);
    Iterator iterator(params.partition, work_tile, lead);

    opmath_t scale[kColumns], mean[kColumns], mean_g[kColumns], slope[kColumns];
    EpilogueBackward<kHasRelu, opmath_t, kColumns> epilogue;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!iterator.has_channel(column)) continue;
      const int64_t channel = iterator.channel(column);
      const double invstd = read(params.invstd, channel);
      scale[column] = static_cast<opmath_t>(read_or(params.weight, channel, 1) * invstd);
      epilogue.read_channel(params.relu_low, params.relu_high, column, channel);
      if (!params.training) continue;
      mean[column] = static_cast<opmath_t>(read(params.mean, channel));
      mean_g[column] = static_cast<opmath_t>(read(params.mean_g, channel));
      slope[column] = static_cast<opmath_t>(read(params.mean_g_xhat, channel) * invstd);
    }

    // is_training.value is a compile-time constant.
    const auto write_tile = [&](const auto& accesses, auto is_training) {
      constexpr bool kReadsX = is_training.value || kHasRelu;
      Vector<T> g_bits[kVectors], x_bits[kVectors];
      load_vectors<CacheOp::kStreaming>(g, accesses, g_bits);
      if constexpr (kReadsX) load_vectors<CacheOp::kStreaming>(x, accesses, x_bits);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        opmath_t gs[Iterator::kElements], xs[Iterator::kElements];
        unpack_access(g_bits[i], accesses[i], gs);
        if constexpr (kReadsX) unpack_access(x_bits[i], accesses[i], xs);
#pragma unroll
        for (int element = 0; element < Iterator::kElements; ++element) {
          const int column = element % kColumns;
          opmath_t value = gs[element];
          if constexpr (kHasRelu) value = epilogue(element, xs[element], value);
          if constexpr (is_training.value) {
            const opmath_t deviation = xs[element] - mean[column];
            value = fused_multiply_add(-deviation, slope[column], value - mean_g[column]);
          }
          gs[element] = value * scale[column];
        }
        store_access(grad_x, accesses[i], gs);
      }
    };
    if (params.training) {
      visit_vectors<kVectors>(iterator, whole,
                              [&](const auto& accesses, int) { write_tile(accesses, std::true_type{}); });
    } else {
      visit_vectors<kVectors>(iterator, whole,
                              [&](const auto& accesses, int) { write_tile(accesses, std::false_type{}); });
    }
  }
}

}  // namespace bnk

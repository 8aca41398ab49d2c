// Backward, the sums: sum(g) and sum(g*xhat) per channel, where g = grad_y after the backward of the epilogue
// (epilogue.cuh) and xhat = (x - mean) * invstd.
//
// CTAs take work tiles round-robin and store one partial per work tile and channel; finalize_grad_sums combines them
// (finalize.cuh). A thread sums the elements of its own vectors (tile_iterator.cuh): a tile of a few vectors in
// opmath_t, the tiles in double.
#pragma once

#include "../device/block_reduce.cuh"
#include "../device/epilogue.cuh"
#include "../device/partials.cuh"
#include "../device/visit_vectors.cuh"

namespace bnk {

// Vectors of each of x and g that a thread has in flight.
inline constexpr int kGradSumsTile = 4;

struct GradSumsParams {
  TilePartition partition;
  const void* grad_y;
  const void* x;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  ConstPerChannel relu_low;  // null: no ReLU
  ConstPerChannel relu_high;
  double* partial;  // Sums of g and of g*xhat, see partials.cuh
};

// kHasRelu: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kHasRelu>
BNK_KERNEL(kMaxBlockThreads, 1)
grad_sums_kernel(GradSumsParams params) {
  using Iterator = TileIterator<T, kLayout>;
  using opmath_t = opmath_type<T>;
  constexpr int kColumns = Iterator::kColumns;
  BNK_SHARED(Sums, slots, (kReduceSlots<kColumns, Iterator::kThreadsC>));

  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  const View<const T, kLayout> x{lead, elements_of(params.partition), Iterator::is_wide(params.partition, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(params.partition), Iterator::is_wide(params.partition, grad, lead)};
  const bool whole = Iterator::is_whole(params.partition) && x.wide && g.wide;

  for (int64_t index = block_rank(); index < work_tiles_of(params.partition); index += grid_blocks()) {
    const WorkTile work_tile = work_tile_at(params.partition, index);
    Iterator iterator(params.partition, work_tile, lead);

    opmath_t mean[kColumns], invstd[kColumns];
    EpilogueBackward<kHasRelu, opmath_t, kColumns> epilogue;
    Sums total[kColumns] = {};
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!iterator.has_channel(column)) continue;
      mean[column] = static_cast<opmath_t>(read(params.mean, iterator.channel(column)));
      invstd[column] = static_cast<opmath_t>(read(params.invstd, iterator.channel(column)));
      epilogue.read_channel(params.relu_low, params.relu_high, column, iterator.channel(column));
    }

    visit_vectors<kGradSumsTile>(iterator, whole, [&](const auto& accesses, int /*number*/) {
      Vector<T> x_bits[kGradSumsTile], g_bits[kGradSumsTile];
      opmath_t xs[kGradSumsTile][Iterator::kElements], gs[kGradSumsTile][Iterator::kElements];
      load_vectors<CacheOp::kDefault>(x, accesses, x_bits);
      load_vectors<CacheOp::kDefault>(g, accesses, g_bits);
      unpack_vectors(x_bits, accesses, xs);
      unpack_vectors(g_bits, accesses, gs);
      opmath_t tile_g[kColumns] = {}, tile_g_xhat[kColumns] = {};
#pragma unroll
      for (int i = 0; i < kGradSumsTile; ++i) {
#pragma unroll
        for (int element = 0; element < Iterator::kElements; ++element) {
          // A masked element must add nothing, even if the channel's statistics are not finite.
          if (element < accesses[i].begin || element >= accesses[i].end) continue;
          const int column = element % kColumns;
          const opmath_t xhat = (xs[i][element] - mean[column]) * invstd[column];
          const opmath_t gradient = epilogue(element, xs[i][element], gs[i][element]);
          tile_g[column] += gradient;
          tile_g_xhat[column] = fused_multiply_add(gradient, xhat, tile_g_xhat[column]);
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        combine(total[column], {static_cast<double>(tile_g[column]), static_cast<double>(tile_g_xhat[column])});
      }
    });

    store_work_tile(params.partial, params.partition, work_tile, total, slots);
  }
}

}  // namespace bnk

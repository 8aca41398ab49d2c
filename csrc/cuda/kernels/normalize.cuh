// Forward, the result:  y = epilogue((x - mean) * invstd * weight + bias)
//
// Training uses the statistics of finalize_statistics. Inference uses the running statistics; the first split of each
// channel tile stores the mean and invstd it used, for the backward. CTAs take work tiles round-robin, and each thread
// writes the elements of its own vectors (tile_iterator.cuh). A thread's channels stay the same for a whole work tile,
// so their four constants are read once into registers.
#pragma once

#include "../device/epilogue.cuh"

namespace bnk {

// Vectors that a thread has in flight.
inline constexpr int kNormalizeTile = 4;

struct NormalizeParams {
  TilePartition partition;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  ConstPerChannel mean;
  ConstPerChannel invstd_or_var;  // invstd, or the variance if `inference`
  bool inference;
  double eps;             // inference only
  PerChannel mean_out;    // inference only
  PerChannel invstd_out;  // inference only
  Epilogue epilogue;
};

// kHasEpilogue: params.epilogue.enabled().
template <typename T, Layout kLayout, bool kHasEpilogue>
BNK_KERNEL(kMaxBlockThreads, 1)
normalize_kernel(NormalizeParams params) {
  using Iterator = TileIterator<T, kLayout>;
  using opmath_t = opmath_type<T>;
  constexpr int kColumns = Iterator::kColumns;

  const T* lead = static_cast<const T*>(params.x);
  const T* more = kHasEpilogue ? static_cast<const T*>(params.epilogue.residual) : nullptr;
  T* out = static_cast<T*>(params.y);
  const View<const T, kLayout> x{lead, elements_of(params.partition), Iterator::is_wide(params.partition, lead, lead)};
  const View<const T, kLayout> residual{more, elements_of(params.partition),
                                        Iterator::is_wide(params.partition, more, lead)};
  const View<T, kLayout> y{out, elements_of(params.partition), Iterator::is_wide(params.partition, out, lead)};
  const bool whole = Iterator::is_whole(params.partition) && x.wide && y.wide && (more == nullptr || residual.wide);

  for (int64_t index = block_rank(); index < work_tiles_of(params.partition); index += grid_blocks()) {
    const WorkTile work_tile = work_tile_at(params.partition, index);
    Iterator iterator(params.partition, work_tile, lead);

    opmath_t mean[kColumns], invstd[kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!iterator.has_channel(column)) continue;
      const int64_t channel = iterator.channel(column);
      const double invstd_or_var = read(params.invstd_or_var, channel);
      mean[column] = static_cast<opmath_t>(read(params.mean, channel));
      invstd[column] =
          static_cast<opmath_t>(params.inference ? reciprocal_sqrt(invstd_or_var + params.eps) : invstd_or_var);
      weight[column] = static_cast<opmath_t>(read_or(params.weight, channel, 1));
      bias[column] = static_cast<opmath_t>(read_or(params.bias, channel, 0));
      if (params.inference && work_tile.split == 0 && iterator.first_in_block()) {
        write(params.mean_out, channel, mean[column]);
        write(params.invstd_out, channel, invstd[column]);
      }
    }

    visit_vectors<kNormalizeTile>(iterator, whole, [&](const auto& accesses, int /*number*/) {
      Vector<T> bits[kNormalizeTile];
      [[maybe_unused]] ResidualTile<T, kNormalizeTile, true> added;
      load_vectors<CacheOp::kStreaming>(x, accesses, bits);
      if constexpr (kHasEpilogue) added.load(residual, accesses);
#pragma unroll
      for (int i = 0; i < kNormalizeTile; ++i) {
        opmath_t values[Iterator::kElements];
        unpack_access(bits[i], accesses[i], values);
#pragma unroll
        for (int element = 0; element < Iterator::kElements; ++element) {
          const int column = element % kColumns;
          values[element] = normalized(values[element], mean[column], invstd[column], weight[column], bias[column]);
        }
        if constexpr (kHasEpilogue) {
          added.add(residual, accesses, i, values);
          relu(params.epilogue.relu, values);
        }
        store_access(y, accesses[i], values);
      }
    });

    if constexpr (kHasEpilogue) {
      if (params.epilogue.low.data == nullptr || work_tile.split != 0 || !iterator.first_in_block()) continue;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        if (!iterator.has_channel(column)) continue;
        write_relu_bounds<T>(params.epilogue, iterator.channel(column), mean[column], invstd[column], weight[column],
                             bias[column]);
      }
    }
  }
}

}  // namespace bnk

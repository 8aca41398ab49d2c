// Forward, the result:  y = (x - mean) * invstd * weight + bias, through the epilogue
//
// Training takes the statistics that finish_statistics left; inference takes the running ones, and the first chunk of
// each slab leaves the mean and invstd it used for the backward. A thread's channels stay the same for a whole share,
// so their four constants are read once and live in registers.
#pragma once

#include "epilogue.cuh"

namespace bnk {

// Windows a thread keeps in flight.
inline constexpr int kNormalizeTile = 4;

struct NormalizeParams {
  Walk walk;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  ConstPerChannel mean;
  ConstPerChannel spread;  // invstd, or the variance if `inference`
  bool inference;
  double eps;             // inference
  PerChannel mean_out;    // inference
  PerChannel invstd_out;  // inference
  Epilogue epilogue;
};

// kFused: there is an epilogue.
template <typename T, Layout kLayout, bool kFused>
BNK_KERNEL(kMaxBlockThreads)
normalize_kernel(NormalizeParams params) {
  using Walker_ = Walker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kColumns = Walker_::kColumns;

  const T* lead = static_cast<const T*>(params.x);
  const T* more = kFused ? static_cast<const T*>(params.epilogue.residual) : nullptr;
  T* out = static_cast<T*>(params.y);
  const View<const T, kLayout> x{lead, elements_of(params.walk), Walker_::is_wide(params.walk, lead, lead)};
  const View<const T, kLayout> residual{more, elements_of(params.walk), Walker_::is_wide(params.walk, more, lead)};
  const View<T, kLayout> y{out, elements_of(params.walk), Walker_::is_wide(params.walk, out, lead)};
  const bool whole = Walker_::is_whole(params.walk) && x.wide && y.wide && (more == nullptr || residual.wide);

  for (int64_t index = block_rank(); index < shares_of(params.walk); index += grid_blocks()) {
    const Share share = share_at(params.walk, index);
    Walker_ walker(params.walk, share, lead);

    Real mean[kColumns], invstd[kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      const int64_t channel = walker.channel(column);
      const double spread = read(params.spread, channel);
      mean[column] = static_cast<Real>(read(params.mean, channel));
      invstd[column] = static_cast<Real>(params.inference ? reciprocal_sqrt(spread + params.eps) : spread);
      weight[column] = static_cast<Real>(read_or(params.weight, channel, 1));
      bias[column] = static_cast<Real>(read_or(params.bias, channel, 0));
      if (params.inference && share.chunk == 0 && walker.first_in_block()) {
        write(params.mean_out, channel, mean[column]);
        write(params.invstd_out, channel, invstd[column]);
      }
    }

    visit_tiles<kNormalizeTile>(walker, whole, [&](const auto& windows, int /*number*/) {
      Vector<T> bits[kNormalizeTile];
      [[maybe_unused]] ResidualTile<T, kNormalizeTile, true> added;
      load_tile<Reuse::kLast>(x, windows, bits);
      if constexpr (kFused) added.load(residual, windows);
#pragma unroll
      for (int i = 0; i < kNormalizeTile; ++i) {
        Real values[Walker_::kElements];
        unpack_window(bits[i], windows[i], values);
#pragma unroll
        for (int element = 0; element < Walker_::kElements; ++element) {
          const int column = element % kColumns;
          values[element] = normalized(values[element], mean[column], invstd[column], weight[column], bias[column]);
        }
        if constexpr (kFused) {
          added.add(residual, windows, i, values);
          relu(params.epilogue.relu, values);
        }
        store_window(y, windows[i], values);
      }
    });

    if constexpr (kFused) {
      if (params.epilogue.low.data == nullptr || share.chunk != 0 || !walker.first_in_block()) continue;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        if (!walker.has_channel(column)) continue;
        write_relu_range<T>(params.epilogue, walker.channel(column), mean[column], invstd[column], weight[column],
                            bias[column]);
      }
    }
  }
}

}  // namespace bnk

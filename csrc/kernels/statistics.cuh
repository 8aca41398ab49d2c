// Forward training, the statistics (Ioffe & Szegedy 2015, Algorithm 1, lines 1 and 2): each block joins the moments of each
// of its shares of x into a partial. finish_statistics joins the partials (finish.cuh).
//
// Every partial and the counter is written by exactly one thread.
#pragma once

#include "block_reduce.cuh"
#include "moments.cuh"
#include "partials.cuh"
#include "tiles.cuh"

namespace bnk {

// Windows a thread keeps in flight, and joins as one tile: 32 elements of one channel (16 in double), or 8 rows.
template <typename T, Layout kLayout>
inline constexpr int kStatisticsTile = kLayout == Layout::kChannelsLast ? 8
                                       : sizeof(T) == 8                 ? 8
                                                                        : 32 / kVectorElements<T>;

struct StatisticsParams {
  Walk walk;
  const void* x;
  double* partial;               // Moments, see partials.cuh
  int64_t* num_batches_tracked;  // or null
};

template <typename T, typename Window_, int kTile>
BNK_DEVICE void join_windows(Moments (&total)[1], const Window_ (&windows)[kTile],
                             const Compute<T> (&values)[kTile][kVectorElements<T>]) {
  constexpr int kElements = kVectorElements<T>;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kTile; ++i) count += windows[i].size();
  if (count == 0) return;
  const auto at = [&](int i) { return values[i / kElements][i % kElements]; };
  const auto has = [&](int i) {
    const Window_& window = windows[i / kElements];
    return i % kElements >= window.begin && i % kElements < window.end;
  };
  join_tile<Compute<T>>(total[0], tile_moments<kTile * kElements>(count, at, has));
}

template <typename T, typename Window_, int kTile>
BNK_DEVICE void join_windows(Moments (&total)[kVectorElements<T>], const Window_ (&windows)[kTile],
                             const Compute<T> (&values)[kTile][kVectorElements<T>]) {
  int rows = 0;
#pragma unroll
  for (int i = 0; i < kTile; ++i) rows += windows[i].size() > 0;
  if (rows == 0) return;
#pragma unroll
  for (int column = 0; column < kVectorElements<T>; ++column) {
    const auto at = [&](int i) { return values[i][column]; };
    const auto has = [&](int i) { return i < rows; };  // a thread runs out of rows once, at its end
    join_tile<Compute<T>>(total[column], tile_moments<kTile>(rows, at, has));
  }
}

template <typename T, Layout kLayout>
BNK_KERNEL(kMaxBlockThreads)
statistics_kernel(StatisticsParams params) {
  using Walker_ = Walker<T, kLayout>;
  constexpr int kTile = kStatisticsTile<T, kLayout>;
  BNK_SHARED(Moments, slots, (kReduceSlots<Walker_::kColumns, Walker_::kLanes>));

  // Counted here, a launch before finish_statistics reads it: all its blocks then see the same count.
  if (params.num_batches_tracked != nullptr && block_rank() == 0 && thread_rank() == 0) {
    store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
  }

  const T* data = static_cast<const T*>(params.x);
  const View<const T, kLayout> x{data, elements_of(params.walk), Walker_::is_wide(params.walk, data, data)};
  const bool whole = Walker_::is_whole(params.walk) && x.wide;
  for (int64_t index = block_rank(); index < shares_of(params.walk); index += grid_blocks()) {
    const Share share = share_at(params.walk, index);
    Walker_ walker(params.walk, share, data);
    Moments total[Walker_::kColumns] = {};
    visit_tiles<kTile>(walker, whole, [&](const auto& windows, int /*number*/) {
      Vector<T> bits[kTile];
      Compute<T> values[kTile][Walker_::kElements];
      load_tile<Reuse::kAgain>(x, windows, bits);
      unpack_tile(bits, windows, values);
      join_windows<T>(total, windows, values);
    });

    store_share(params.partial, params.walk, share, total, slots);
  }
}

}  // namespace bnk

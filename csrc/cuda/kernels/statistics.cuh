// Training forward, the statistics: count, mean and m2 = sum((x - mean)^2) per channel (Ioffe & Szegedy 2015, Algorithm
// 1, lines 1 and 2).
//
// CTAs take work tiles round-robin and store one partial of Welford data per work tile and channel; finalize_statistics
// combines them (finalize.cuh). A thread accumulates the elements of its own vectors (tile_iterator.cuh). Each partial
// and the batch counter are written by exactly one thread.
#pragma once

#include "../device/block_reduce.cuh"
#include "../device/partials.cuh"
#include "../device/visit_vectors.cuh"
#include "../device/welford.cuh"

namespace bnk {

// Vectors that a thread has in flight and combines as one tile: 32 elements of one channel (16 in double), or 8 rows.
template <typename T, Layout kLayout>
inline constexpr int kStatisticsVectors = kLayout == Layout::kChannelsLast ? 8
                                          : sizeof(T) == 8                 ? 8
                                                                           : 32 / kVectorElements<T>;

struct StatisticsParams {
  TilePartition partition;
  const void* x;
  double* partial;               // WelfordData, see partials.cuh
  int64_t* num_batches_tracked;  // may be null
};

template <typename T, typename Access, int kVectors>
BNK_DEVICE void combine_vectors(WelfordData (&total)[1], const Access (&accesses)[kVectors],
                                const opmath_type<T> (&values)[kVectors][kVectorElements<T>]) {
  constexpr int kElements = kVectorElements<T>;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) count += accesses[i].size();
  if (count == 0) return;
  const auto at = [&](int i) { return values[i / kElements][i % kElements]; };
  const auto has = [&](int i) {
    const Access& access = accesses[i / kElements];
    return i % kElements >= access.begin && i % kElements < access.end;
  };
  combine_tile<opmath_type<T>>(total[0], tile_welford<kVectors * kElements>(count, at, has));
}

template <typename T, typename Access, int kVectors>
BNK_DEVICE void combine_vectors(WelfordData (&total)[kVectorElements<T>], const Access (&accesses)[kVectors],
                                const opmath_type<T> (&values)[kVectors][kVectorElements<T>]) {
  int rows = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) rows += accesses[i].size() > 0;
  if (rows == 0) return;
#pragma unroll
  for (int column = 0; column < kVectorElements<T>; ++column) {
    const auto at = [&](int i) { return values[i][column]; };
    const auto has = [&](int i) { return i < rows; };  // only a thread's last tile has missing rows, at its end
    combine_tile<opmath_type<T>>(total[column], tile_welford<kVectors>(rows, at, has));
  }
}

template <typename T, Layout kLayout>
BNK_KERNEL(kMaxBlockThreads, 1)
statistics_kernel(StatisticsParams params) {
  using Iterator = TileIterator<T, kLayout>;
  constexpr int kVectors = kStatisticsVectors<T, kLayout>;
  BNK_SHARED(WelfordData, slots, (kReduceSlots<Iterator::kColumns, Iterator::kThreadsC>));

  // Incremented here, one launch before finalize_statistics reads it, so that all its CTAs see the same count.
  if (params.num_batches_tracked != nullptr && block_rank() == 0 && thread_rank() == 0) {
    store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
  }

  const T* data = static_cast<const T*>(params.x);
  const View<const T, kLayout> x{data, elements_of(params.partition), Iterator::is_wide(params.partition, data, data)};
  const bool whole = Iterator::is_whole(params.partition) && x.wide;
  for (int64_t index = block_rank(); index < work_tiles_of(params.partition); index += grid_blocks()) {
    const WorkTile work_tile = work_tile_at(params.partition, index);
    Iterator iterator(params.partition, work_tile, data);
    WelfordData total[Iterator::kColumns] = {};
    visit_vectors<kVectors>(iterator, whole, [&](const auto& accesses, int /*number*/) {
      Vector<T> bits[kVectors];
      opmath_type<T> values[kVectors][Iterator::kElements];
      load_vectors<CacheOp::kDefault>(x, accesses, bits);
      unpack_vectors(bits, accesses, values);
      combine_vectors<T>(total, accesses, values);
    });

    store_work_tile(params.partial, params.partition, work_tile, total, slots);
  }
}

}  // namespace bnk

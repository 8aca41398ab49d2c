// Partials: one kernel stores a partial per (split, channel), the next kernel combines them in split order.
//
// An accumulator is a struct of doubles. Field f of (split, channel) lies at [f][split][channel], so adjacent threads,
// which handle adjacent channels, access adjacent memory.
#pragma once

#include "block_reduce.cuh"
#include "tile_iterator.cuh"

namespace bnk {

template <typename Accumulator>
inline constexpr int kFields = static_cast<int>(sizeof(Accumulator) / sizeof(double));

template <typename Accumulator>
BNK_DEVICE void store_partial(double* partial, const TilePartition& partition, int64_t split, int64_t channel,
                              const Accumulator& value) {
  const double* fields = reinterpret_cast<const double*>(&value);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    store(partial + (field * partition.splits + split) * partition.channels + channel, fields[field]);
  }
}

// Reduces the accumulators of a CTA and stores the work tile's partials.
template <int kColumns, typename Accumulator>
BNK_DEVICE void store_work_tile(double* partial, const TilePartition& partition, const WorkTile& work_tile,
                                const Accumulator (&local)[kColumns], Accumulator* slots) {
  const auto at = [&](int column) { return local[column]; };
  reduce_block<kColumns>(at, partition.threads_c, slots, [&](int column, const Accumulator& combined) {
    const int64_t channel = work_tile.channel_tile * partition.threads_c * kColumns + column;
    if (channel < partition.channels) store_partial(partial, partition, work_tile.split, channel, combined);
  });
}

template <typename Accumulator>
BNK_DEVICE Accumulator load_partial(const double* partial, const Finalize& finalize, int64_t split, int64_t channel) {
  Accumulator result;
  double* fields = reinterpret_cast<double*>(&result);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    fields[field] = load(partial + (field * finalize.splits + split) * finalize.channels + channel);
  }
  return result;
}

// Combines the partials of the channels first .. first + count - 1 and calls done(channel - first, combined) once per
// channel, from one thread. Each of `workers` CTAs takes threads_c adjacent channels per iteration; its threads with
// the same index along C divide the splits of one channel.
template <typename Accumulator, typename Done>
BNK_DEVICE void combine_channels(const Finalize& finalize, const double* partial, int64_t first, int64_t count,
                                 int64_t worker, int64_t workers, Accumulator* slots, const Done& done) {
  const int threads_c = finalize.threads_c;
  const int thread_c = static_cast<int>(thread_rank()) % threads_c;
  for (int64_t begin = worker * threads_c; begin < count; begin += workers * threads_c) {
    Accumulator total{};
    if (begin + thread_c < count) {
      for (int64_t split = thread_rank() / threads_c; split < finalize.splits; split += block_threads() / threads_c) {
        combine(total, load_partial<Accumulator>(partial, finalize, split, first + begin + thread_c));
      }
    }
    const auto at = [&](int) { return total; };
    reduce_block<1>(at, threads_c, slots, [&](int column, const Accumulator& combined) {
      if (begin + column < count) done(begin + column, combined);
    });
  }
}

// Combines the partials of all channels, with all CTAs of the grid as workers.
template <typename Accumulator, typename Done>
BNK_DEVICE void finalize_channels(const Finalize& finalize, const double* partial, Accumulator* slots,
                                  const Done& done) {
  combine_channels(finalize, partial, 0, finalize.channels, block_rank(), grid_blocks(), slots, done);
}

}  // namespace bnk

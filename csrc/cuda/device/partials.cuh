// Partials: what one kernel leaves for each (split, channel) and the next one joins, in split order.
//
// An accumulator is a struct of doubles; field f of (split, channel) lies at [f][split][channel], so that neighbouring
// threads, on neighbouring channels, touch neighbouring memory.
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

// Joins what the threads of a block gathered for a share, and stores the share's partials.
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

// Joins the partials of the channels first .. first + count - 1 and calls done(channel - first, joined), once per channel
// in all, from one thread. Each of several workers, a block each, takes `lanes` neighbouring channels at a time; its
// threads of the same lane share the splits of one channel.
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

// The same for all channels, by all blocks.
template <typename Accumulator, typename Done>
BNK_DEVICE void finalize_channels(const Finalize& finalize, const double* partial, Accumulator* slots,
                                  const Done& done) {
  combine_channels(finalize, partial, 0, finalize.channels, block_rank(), grid_blocks(), slots, done);
}

}  // namespace bnk

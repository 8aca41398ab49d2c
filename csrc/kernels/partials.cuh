// Partials: what one kernel leaves for each (chunk, channel) and the next one joins, in chunk order.
//
// An accumulator is a struct of doubles; field f of (chunk, channel) lies at [f][chunk][channel], so that neighbouring
// threads, on neighbouring channels, touch neighbouring memory.
#pragma once

#include "block_reduce.cuh"
#include "walkers.cuh"

namespace bnk {

template <typename Accumulator>
inline constexpr int kFields = static_cast<int>(sizeof(Accumulator) / sizeof(double));

template <typename Accumulator>
BNK_DEVICE void store_partial(double* partial, const Walk& walk, int64_t chunk, int64_t channel,
                              const Accumulator& value) {
  const double* fields = reinterpret_cast<const double*>(&value);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    store(partial + (field * walk.chunks + chunk) * walk.channels + channel, fields[field]);
  }
}

// Joins what the threads of a block gathered for a share, and stores the share's partials.
template <int kColumns, typename Accumulator>
BNK_DEVICE void store_share(double* partial, const Walk& walk, const Share& share, const Accumulator (&mine)[kColumns],
                            Accumulator* slots) {
  const auto at = [&](int column) { return mine[column]; };
  reduce_block<kColumns>(at, walk.lanes, slots, [&](int column, const Accumulator& joined) {
    const int64_t channel = share.slab * walk.lanes * kColumns + column;
    if (channel < walk.channels) store_partial(partial, walk, share.chunk, channel, joined);
  });
}

template <typename Accumulator>
BNK_DEVICE Accumulator load_partial(const double* partial, const Finish& finish, int64_t chunk, int64_t channel) {
  Accumulator result;
  double* fields = reinterpret_cast<double*>(&result);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    fields[field] = load(partial + (field * finish.chunks + chunk) * finish.channels + channel);
  }
  return result;
}

// Joins the partials of the channels first .. first + count - 1 and calls done(channel - first, joined), once per channel
// in all, from one thread. Each of several workers, a block each, takes `lanes` neighbouring channels at a time; its
// threads of the same lane share the chunks of one channel.
template <typename Accumulator, typename Done>
BNK_DEVICE void join_channels(const Finish& finish, const double* partial, int64_t first, int64_t count, int64_t worker,
                              int64_t workers, Accumulator* slots, const Done& done) {
  const int lanes = finish.lanes;
  const int lane = static_cast<int>(thread_rank()) % lanes;
  for (int64_t begin = worker * lanes; begin < count; begin += workers * lanes) {
    Accumulator total{};
    if (begin + lane < count) {
      for (int64_t chunk = thread_rank() / lanes; chunk < finish.chunks; chunk += block_threads() / lanes) {
        join(total, load_partial<Accumulator>(partial, finish, chunk, first + begin + lane));
      }
    }
    const auto at = [&](int) { return total; };
    reduce_block<1>(at, lanes, slots, [&](int column, const Accumulator& joined) {
      if (begin + column < count) done(begin + column, joined);
    });
  }
}

// The same for all channels, by all blocks.
template <typename Accumulator, typename Done>
BNK_DEVICE void finish_channels(const Finish& finish, const double* partial, Accumulator* slots, const Done& done) {
  join_channels(finish, partial, 0, finish.channels, block_rank(), grid_blocks(), slots, done);
}

}  // namespace bnk

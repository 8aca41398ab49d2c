// Partials: what one kernel leaves for each (chunk, channel) and the next one joins, in chunk order.
//
// An accumulator is a struct of doubles; field f of (chunk, channel) lies at [f][chunk][channel], so that neighbouring
// threads, on neighbouring channels, touch neighbouring memory.
#pragma once

#include "block_reduce.cuh"
#include "walk.cuh"

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
BNK_DEVICE void store_share(double* partial, const Walk& walk, const Share& share, Accumulator (&mine)[kColumns],
                            Accumulator* slots) {
  reduce_block(mine, walk.lanes, slots, [&](int column, const Accumulator& joined) {
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

// Joins the partials of each channel and calls done(channel, joined), once per channel in all, from one thread. Each
// block takes `lanes` neighbouring channels at a time; its threads of the same lane share the chunks of one channel.
template <typename Accumulator, typename Done>
BNK_DEVICE void finish_channels(const Finish& finish, const double* partial, Accumulator* slots, const Done& done) {
  const int lanes = finish.lanes;
  const int lane = static_cast<int>(thread_rank()) % lanes;
  const int64_t groups = (finish.channels + lanes - 1) / lanes;
  for (int64_t group = block_rank(); group < groups; group += grid_blocks()) {
    const int64_t channel = group * lanes + lane;
    Accumulator total[1] = {};
    if (channel < finish.channels) {
      for (int64_t chunk = thread_rank() / lanes; chunk < finish.chunks; chunk += block_threads() / lanes) {
        join(total[0], load_partial<Accumulator>(partial, finish, chunk, channel));
      }
    }
    reduce_block(total, lanes, slots, [&](int column, const Accumulator& joined) {
      if (group * lanes + column < finish.channels) done(group * lanes + column, joined);
    });
  }
}

}  // namespace bnk

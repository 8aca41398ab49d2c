// Block-wide reduction of a channel tile: one value per channel, in a fixed order.
//
// Each thread contributes one accumulator per element of its vectors. The accumulators of a channel are
//
//   channels-first   all accumulators of all threads
//   channels-last    one column of the threads with the same index along C
//   packed           some columns of adjacent indices along C; the columns of a thread belong to at most two channels
#pragma once

#include "block_reduce.cuh"
#include "tile_iterator.cuh"

namespace bnk {

// Shared memory of reduce_channel_tile, in accumulators.
template <typename T, Layout kLayout>
inline constexpr int kChannelTileSlots =
    kLayout == Layout::kPacked ? 2 * kMaxBlockThreads
                               : kReduceSlots<TileIterator<T, kLayout>::kColumns, TileIterator<T, kLayout>::kThreadsC>;

template <typename Accumulator>
BNK_DEVICE Accumulator combine_warp(Accumulator partial) {
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) combine(partial, shuffle_xor(partial, mask));
  return partial;
}

// Calls done(local, combined) once for each channel of the channel tile, from one thread each. at(element) is the
// calling thread's accumulator for one element of its vectors. All threads of the CTA must call it. On return, all
// threads see what done() wrote to shared memory, and `slots` may be reused.
template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_channel_tile(const TilePartition& partition,
                                    const TileIterator<T, Layout::kChannelsFirst, InRow>& /*tile iterator*/,
                                    int /*channel tile*/, const At& at, Accumulator* slots, const Done& done) {
  Accumulator partial = at(0);
#pragma unroll
  for (int i = 1; i < kVectorElements<T>; ++i) combine(partial, at(i));
  reduce_block<1>([&](int) { return partial; }, partition.threads_c, slots, done);
}

template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_channel_tile(const TilePartition& partition,
                                    const TileIterator<T, Layout::kChannelsLast, InRow>& /*tile iterator*/,
                                    int channel_tile, const At& at, Accumulator* slots, const Done& done) {
  const int64_t rest = partition.channels - int64_t{channel_tile} * partition.tile_channels;
  reduce_block<kVectorElements<T>>(at, partition.threads_c, slots, [&](int column, const Accumulator& combined) {
    if (column < rest) done(column, combined);
  });
}

template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_channel_tile(const TilePartition& partition,
                                    const TileIterator<T, Layout::kPacked, InRow>& iterator, int channel_tile,
                                    const At& at, Accumulator* slots, const Done& done) {
  constexpr int kElements = kVectorElements<T>;
  const int first = iterator.local(0);
  Accumulator halves[2] = {};
#pragma unroll
  for (int column = 0; column < kElements; ++column) {
    if (iterator.local(column) == first) {
      combine(halves[0], at(column));
    } else {
      combine(halves[1], at(column));
    }
  }
  const int thread = static_cast<int>(thread_rank());
  slots[2 * thread] = halves[0];
  slots[2 * thread + 1] = halves[1];
  block_barrier();  // every thread's halves are written before they are read

  const int inner = static_cast<int>(partition.inner);
  const int rows = static_cast<int>(block_threads()) / partition.threads_c;
  const int64_t rest = partition.channels - int64_t{channel_tile} * partition.tile_channels;
  const int channels = rest < partition.tile_channels ? static_cast<int>(rest) : partition.tile_channels;
  const int warps = static_cast<int>(block_threads()) / kWarpThreads;
  for (int channel = thread / kWarpThreads; channel < channels; channel += warps) {
    const int first_thread_c = channel * inner / kElements;
    const int threads_c = ((channel + 1) * inner - 1) / kElements + 1 - first_thread_c;
    Accumulator all{};
    for (int i = thread % kWarpThreads; i < threads_c * rows; i += kWarpThreads) {
      const int thread_c = first_thread_c + i % threads_c;
      const int half = thread_c * kElements / inner == channel ? 0 : 1;
      combine(all, slots[2 * (i / threads_c * partition.threads_c + thread_c) + half]);
    }
    all = combine_warp(all);
    if (thread % kWarpThreads == 0) done(channel, all);
  }
  block_barrier();  // the slots are read before the next reduction overwrites them
}

}  // namespace bnk

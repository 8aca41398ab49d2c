// Joining what the threads of a block gathered of a slab: for every channel one value, in a fixed order.
//
// A thread brings one accumulator for each element of its windows. Those of a channel are
//
//   channels-first   all of them, of all threads
//   channels-last    one column of the threads that share a lane
//   packed           some columns of neighbouring lanes; a lane's columns are of two channels at most
#pragma once

#include "block_reduce.cuh"
#include "walkers.cuh"

namespace bnk {

// Shared memory that reduce_slab needs, in accumulators.
template <typename T, Layout kLayout>
inline constexpr int kSlabSlots =
    kLayout == Layout::kPacked ? 2 * kMaxBlockThreads
                               : kReduceSlots<Walker<T, kLayout>::kColumns, Walker<T, kLayout>::kLanes>;

template <typename Accumulator>
BNK_DEVICE Accumulator join_warp(Accumulator mine) {
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) join(mine, shuffle_xor(mine, mask));
  return mine;
}

// Calls done(local, joined) once for each channel that the slab has, from one thread each. at(element) is the calling
// thread's accumulator of one of its windows' elements. Every thread of the block calls it; what done() wrote to shared
// memory is there for all when it returns, and `slots` may be used again.
template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_slab(const Walk& walk, const Walker<T, Layout::kChannelsFirst, InRow>& /*walker*/, int /*slab*/,
                            const At& at, Accumulator* slots, const Done& done) {
  Accumulator mine = at(0);
#pragma unroll
  for (int i = 1; i < kVectorElements<T>; ++i) join(mine, at(i));
  reduce_block<1>([&](int) { return mine; }, walk.lanes, slots, done);
}

template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_slab(const Walk& walk, const Walker<T, Layout::kChannelsLast, InRow>& /*walker*/, int slab,
                            const At& at, Accumulator* slots, const Done& done) {
  const int64_t rest = walk.channels - int64_t{slab} * walk.slab_channels;
  reduce_block<kVectorElements<T>>(at, walk.lanes, slots, [&](int column, const Accumulator& joined) {
    if (column < rest) done(column, joined);
  });
}

template <typename T, typename InRow, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_slab(const Walk& walk, const Walker<T, Layout::kPacked, InRow>& walker, int slab, const At& at,
                            Accumulator* slots, const Done& done) {
  constexpr int kElements = kVectorElements<T>;
  const int first = walker.local(0);
  Accumulator halves[2] = {};
#pragma unroll
  for (int column = 0; column < kElements; ++column) {
    if (walker.local(column) == first) {
      join(halves[0], at(column));
    } else {
      join(halves[1], at(column));
    }
  }
  const int thread = static_cast<int>(thread_rank());
  slots[2 * thread] = halves[0];
  slots[2 * thread + 1] = halves[1];
  block_barrier();  // every thread's halves are written before they are read

  const int inner = static_cast<int>(walk.inner);
  const int rows = static_cast<int>(block_threads()) / walk.lanes;
  const int64_t rest = walk.channels - int64_t{slab} * walk.slab_channels;
  const int channels = rest < walk.slab_channels ? static_cast<int>(rest) : walk.slab_channels;
  const int warps = static_cast<int>(block_threads()) / kWarpThreads;
  for (int channel = thread / kWarpThreads; channel < channels; channel += warps) {
    const int first_lane = channel * inner / kElements;
    const int lanes = ((channel + 1) * inner - 1) / kElements + 1 - first_lane;
    Accumulator all{};
    for (int i = thread % kWarpThreads; i < lanes * rows; i += kWarpThreads) {
      const int lane = first_lane + i % lanes;
      const int half = lane * kElements / inner == channel ? 0 : 1;
      join(all, slots[2 * (i / lanes * walk.lanes + lane) + half]);
    }
    all = join_warp(all);
    if (thread % kWarpThreads == 0) done(channel, all);
  }
  block_barrier();  // the slots are read before the next reduction overwrites them
}

}  // namespace bnk

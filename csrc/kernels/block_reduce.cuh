// Joining what the threads of a block gathered, in a fixed order: the same bits on every run.
//
// Thread t holds kColumns accumulators for the columns of lane t % lanes (lanes: a power of two <= 32). First the
// threads of a warp that share a lane join by shuffles, then the first `lanes` threads of each warp put theirs in
// shared memory, then one thread per column joins the warps in order of rank.
#pragma once

#include "../plan.h"
#include "primitives.cuh"

namespace bnk {

inline constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;

// Shared memory that reduce_block needs, in accumulators, for up to kLanes lanes.
template <int kColumns, int kLanes>
inline constexpr int kReduceSlots = kMaxWarps * kColumns * kLanes;

// Returns to thread t < lanes * kColumns the joined accumulator of column t % kColumns of lane t / kColumns; the other
// threads' return value means nothing. Every thread of the block calls it. `slots` may be written again only after the
// next block_barrier().
template <int kColumns, typename Accumulator>
BNK_DEVICE Accumulator reduce_block(Accumulator (&mine)[kColumns], int lanes, Accumulator* slots) {
  for (int mask = kWarpThreads / 2; mask >= lanes; mask /= 2) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) join(mine[column], shuffle_xor(mine[column], mask));
  }

  const int thread = static_cast<int>(thread_rank());
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const int width = lanes * kColumns;
  if (lane < lanes) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) slots[warp * width + lane * kColumns + column] = mine[column];
  }
  block_barrier();  // every warp's slots are written before they are read

  Accumulator result{};
  if (thread < width) {
    const int warps = static_cast<int>(block_threads()) / kWarpThreads;
    for (int other = 0; other < warps; ++other) join(result, slots[other * width + thread]);
  }
  return result;
}

}  // namespace bnk

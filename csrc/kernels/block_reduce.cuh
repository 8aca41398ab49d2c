// Joining what the threads of a block gathered, in a fixed order: the same bits on every run.
//
// Thread t holds kColumns accumulators for the columns of lane t % lanes (lanes: a power of two <= 32). First the
// threads of a warp that share a lane join by shuffles, then the first `lanes` threads of each warp put theirs in
// shared memory, then one thread per column joins the warps in order of rank.
#pragma once

#include "../plan.h"
#include "sums.cuh"

namespace bnk {

inline constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;

// Shared memory that reduce_block needs, in accumulators, for up to kLanes lanes.
template <int kColumns, int kLanes>
inline constexpr int kReduceSlots = kMaxWarps * kColumns * kLanes;

// Calls done(column, joined) once for each of the lanes * kColumns columns, from one thread each; column c is column
// c % kColumns of lane c / kColumns. Every thread of the block calls it; `slots` may be used again when it returns.
template <int kColumns, typename Accumulator, typename Done>
BNK_DEVICE void reduce_block(Accumulator (&mine)[kColumns], int lanes, Accumulator* slots, const Done& done) {
  for (int mask = kWarpThreads / 2; mask >= lanes; mask /= 2) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) join(mine[column], shuffle_xor(mine[column], mask));
  }

  const int thread = static_cast<int>(thread_rank());
  const int threads = static_cast<int>(block_threads());
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const int width = lanes * kColumns;
  if (lane < lanes) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) slots[warp * width + lane * kColumns + column] = mine[column];
  }
  block_barrier();  // every warp's slots are written before they are read

  for (int column = thread; column < width; column += threads) {
    Accumulator joined = slots[column];
    for (int other = 1; other < threads / kWarpThreads; ++other) join(joined, slots[other * width + column]);
    done(column, joined);
  }
  block_barrier();  // the slots are read before the next reduction overwrites them
}

}  // namespace bnk

// Joining what the threads of a block gathered, in a fixed order: the same bits on every run.
//
// Thread t has kColumns accumulators, for the columns of lane t % lanes (lanes: a power of two <= 32). First the threads of
// a warp that share a lane join by shuffles, then the first `lanes` threads of each warp put theirs in shared memory,
// where one thread per column joins them: the later half of the warps before the earlier half, which so share the same
// memory.
#pragma once

#include "../../plan/plan.h"
#include "sums.cuh"

namespace bnk {

inline constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;
static_assert(kMaxWarps % 2 == 0);

// Shared memory that reduce_block needs, in accumulators, for up to kLanes lanes. Where there are several warps, they have a
// thread for each column.
template <int kColumns, int kThreadsC>
inline constexpr int kReduceSlots = kMaxWarps / 2 * kColumns * kThreadsC;

// Columns whose accumulators are in registers at a time.
template <int kColumns>
inline constexpr int kReduceColumns = kColumns > 4 ? kColumns / 2 : kColumns;

// Joins at(column) of the threads of a warp that share a lane, and puts the lanes' results in `slots`.
template <int kColumns, typename Accumulator, typename At>
BNK_DEVICE void reduce_warp(const At& at, int threads_c, Accumulator* slots) {
  constexpr int kPart = kReduceColumns<kColumns>;
  const int lane = static_cast<int>(thread_rank()) % kWarpThreads;
#pragma unroll
  for (int first = 0; first < kColumns; first += kPart) {
    Accumulator partial[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) partial[i] = at(first + i);
    for (int mask = kWarpThreads / 2; mask >= threads_c; mask /= 2) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) combine(partial[i], shuffle_xor(partial[i], mask));
    }
    if (lane < threads_c) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) slots[lane * kColumns + first + i] = partial[i];
    }
  }
}

// Calls done(column, joined) once for each of the lanes * kColumns columns, from one thread each; column c is column
// c % kColumns of lane c / kColumns. at(column) is the calling thread's accumulator of one of its own kColumns columns.
// Every thread of the block calls it; what done() wrote to shared memory is there for all when it returns, and `slots` may
// be used again.
template <int kColumns, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_block(const At& at, int threads_c, Accumulator* slots, const Done& done) {
  const int thread = static_cast<int>(thread_rank());
  const int threads = static_cast<int>(block_threads());
  const int warp = thread / kWarpThreads;
  const int warps = threads / kWarpThreads;
  const int half = (warps + 1) / 2;
  const int width = threads_c * kColumns;
  Accumulator later{};  // of column `thread`, over the later warps
  for (int first = half < warps ? half : 0;; first = 0) {
    const int end = first > 0 ? warps : half;
    if (warp >= first && warp < end) reduce_warp<kColumns>(at, threads_c, slots + (warp - first) * width);
    block_barrier();  // these warps' slots are written before they are read
    if (first > 0) {
      for (int other = 0; other < end - first && thread < width; ++other) combine(later, slots[other * width + thread]);
    } else {
      for (int column = thread; column < width; column += threads) {
        Accumulator combined = slots[column];
        for (int other = 1; other < end; ++other) combine(combined, slots[other * width + column]);
        if (half < warps) combine(combined, later);
        done(column, combined);
      }
    }
    block_barrier();  // the slots are read before they are overwritten, by the earlier warps or the next reduction
    if (first == 0) return;
  }
}

}  // namespace bnk

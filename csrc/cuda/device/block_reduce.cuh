// Block-wide reduction in a fixed order: the same bits on every run.
//
// Thread t has kColumns accumulators, for the columns of index t % threads_c along C (threads_c: a power of two <= 32).
// The threads of a warp with the same index along C first combine by shuffles. Then the first threads_c threads of each
// warp store their results to shared memory, where one thread per column combines them. The later half of the warps
// goes before the earlier half, so that both use the same shared memory.
#pragma once

#include "../../plan/plan.h"
#include "../ptx.cuh"

namespace bnk {

// Two sums accumulated together, in double.
struct Sums {
  double first;
  double second;
};

BNK_DEVICE void combine(Sums& a, const Sums& b) {
  a.first += b.first;
  a.second += b.second;
}

BNK_DEVICE Sums shuffle_xor(const Sums& sums, int mask) {
  return {shuffle_xor(sums.first, mask), shuffle_xor(sums.second, mask)};
}

BNK_DEVICE void combine(double& a, const double& b) { a += b; }

inline constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;
static_assert(kMaxWarps % 2 == 0);

// Shared memory of reduce_block, in accumulators, for up to kThreadsC threads along C. A CTA of several warps has at
// least one thread per column.
template <int kColumns, int kThreadsC>
inline constexpr int kReduceSlots = kMaxWarps / 2 * kColumns * kThreadsC;

// Columns whose accumulators are in registers at once.
template <int kColumns>
inline constexpr int kReduceColumns = kColumns > 4 ? kColumns / 2 : kColumns;

// Combines at(column) over the threads of a warp with the same index along C and stores the results in `slots`.
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

// Calls done(column, combined) once for each of the threads_c * kColumns columns, from one thread each; column c is
// column c % kColumns of index c / kColumns along C. at(column) is the calling thread's accumulator for one of its own
// kColumns columns. All threads of the CTA must call it. On return, all threads see what done() wrote to shared memory,
// and `slots` may be reused.
template <int kColumns, typename Accumulator, typename At, typename Done>
BNK_DEVICE void reduce_block(const At& at, int threads_c, Accumulator* slots, const Done& done) {
  const int thread = static_cast<int>(thread_rank());
  const int threads = static_cast<int>(block_threads());
  const int warp = thread / kWarpThreads;
  const int warps = threads / kWarpThreads;
  const int half = (warps + 1) / 2;
  const int width = threads_c * kColumns;
  Accumulator later{};  // column `thread` over the later warps
  for (int first = half < warps ? half : 0;; first = 0) {
    const int end = first > 0 ? warps : half;
    if (warp >= first && warp < end) reduce_warp<kColumns>(at, threads_c, slots + (warp - first) * width);
    block_barrier();  // the slots of these warps are written before they are read
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
    block_barrier();  // the slots are read before the earlier warps or the next reduction overwrite them
    if (first == 0) return;
  }
}

}  // namespace bnk

// Small kernels, each with a planted fault that a template parameter selects. Without the fault, the same kernel must
// pass in every build, which shows that the tests detect the fault and not an artefact of the test setup.
#pragma once

#include "cuda/ptx.cuh"

namespace planted {

using bnk::kWarpThreads;

struct Params {
  const float* x;     // `count` elements, 16-byte aligned
  float* y;           // `count` elements
  float* partial;     // one per block
  float* sum;         // one element
  unsigned* counter;  // one element, 0
  int count;
};

// ---- block sums: warp shuffles, then thread 0 sums over shared memory -----------------------------------------------

enum class BlockSum {
  kSound,
  kNoBarrier,
  kNoSecondBarrier,
  kReadsUnwritten,
  kWritesOutside,
  kIndexOutside,
  kTooMuchShared
};

template <BlockSum kFault>
BNK_KERNEL(1024, 1)
block_sum(Params params) {
  BNK_SHARED(double, slots, 32);
  if constexpr (kFault == BlockSum::kTooMuchShared) {
    BNK_SHARED(double, more, 6 * 1024);
    more[bnk::thread_rank()] = 0;
  }
  const int thread = static_cast<int>(bnk::thread_rank());
  const int warp = thread / kWarpThreads;
  // Two rounds over the same slots: the second must not overwrite what threads still read in the first.
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    const int i = static_cast<int>(bnk::block_rank() * bnk::block_threads()) + thread;
    double value = i < params.count ? static_cast<double>(bnk::load(params.x + i)) * (round + 1) : 0.0;
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) value += bnk::shuffle_xor(value, mask);

    const bool writes = kFault == BlockSum::kReadsUnwritten ? warp > 0 : true;
    if (thread % kWarpThreads == 0 && writes) slots[warp] = value;
    if (thread == 0 && kFault == BlockSum::kIndexOutside) slots[warp + 32] = 1;
    if (thread == 0 && kFault == BlockSum::kWritesOutside) *(slots + 32 + params.count % 2) = 1;
    if (kFault != BlockSum::kNoBarrier) bnk::block_barrier();
    if (thread == 0) {
      double total = 0;
      for (int other = 0; other < static_cast<int>(bnk::block_threads()) / kWarpThreads; ++other) total += slots[other];
      sum += static_cast<float>(total);
    }
    if (kFault != BlockSum::kNoSecondBarrier) bnk::block_barrier();
  }
  if (thread == 0) bnk::store(params.partial + bnk::block_rank(), sum);
}

// ---- a grid sum: block 0 waits for all others and sums their partials -----------------------------------------------

enum class GridSum { kSound, kNoWait, kNoArrival, kWaitsForTooMany };

template <GridSum kFault>
BNK_KERNEL(1024, 1)
grid_sum(Params params) {
  if (bnk::thread_rank() == 0) {
    bnk::store(params.partial + bnk::block_rank(), bnk::load(params.x + bnk::block_rank()));
    const unsigned group_size = bnk::grid_blocks() + (kFault == GridSum::kWaitsForTooMany ? 1 : 0);
    unsigned before = 0;
    if (kFault != GridSum::kNoArrival || bnk::block_rank() != 1) {
      const unsigned step = bnk::block_rank() == 0 ? 0x80000000u - (group_size - 1) : 1;
      before = simt::arrive(params.counter, step, simt::Site::current());
    }
    // Every block waits, as in a group barrier, so all blocks must be resident at the same time.
    if (kFault != GridSum::kNoWait) simt::wait_for_flip(params.counter, before, simt::Site::current());
    if (bnk::block_rank() == 0) {
      float total = 0;
      for (unsigned block = 0; block < bnk::grid_blocks(); ++block) total += bnk::load(params.partial + block);
      bnk::store(params.sum, total);
    }
  }
}

// ---- a cluster sum: each block reads the partials of the others from their shared memory ----------------------------

enum class ClusterSum { kSound, kNoBarrier, kNoBarrierAtEnd, kNoSuchBlock, kNoSuchArray, kTwoBarriers, kEarlyReturn };

template <ClusterSum kFault>
BNK_KERNEL(1024, 1)
cluster_sum(Params params) {
  BNK_SHARED(double, partial, 1);
  constexpr int kBlocks = 2;
  if (bnk::thread_rank() == 0) partial[0] = static_cast<double>(bnk::load(params.x + bnk::block_rank()));
  if (kFault == ClusterSum::kEarlyReturn && bnk::block_rank() == 1 && bnk::thread_rank() == 5) return;
  if (kFault == ClusterSum::kTwoBarriers && bnk::block_rank() == 1) {
    bnk::cluster_barrier();
  } else if (kFault != ClusterSum::kNoBarrier) {
    bnk::cluster_barrier();
  }
  if (bnk::thread_rank() == 0) {
    double total = 0;
    for (int rank = 0; rank < kBlocks + (kFault == ClusterSum::kNoSuchBlock ? 1 : 0); ++rank) {
      total += bnk::load_dsmem(partial - (kFault == ClusterSum::kNoSuchArray ? 1 : 0), rank);
    }
    bnk::store(params.partial + bnk::block_rank(), static_cast<float>(total));
  }
  if (kFault != ClusterSum::kNoBarrierAtEnd) bnk::cluster_barrier();
}

// ---- y = 2x by vectors, with a tail ---------------------------------------------------------------------------------

enum class Scale {
  kSound,
  kNoTail,
  kTailTooLong,
  kReadsBefore,
  kReadsFar,
  kWritesFar,
  kNoSuchMemory,
  kMisaligned,
  kPastPrimitives,
  kWritesInput
};

template <Scale kFault>
BNK_KERNEL(1024, 1)
scale(Params params) {
  const int thread = static_cast<int>(bnk::block_rank() * bnk::block_threads() + bnk::thread_rank());
  const int threads = static_cast<int>(bnk::grid_blocks() * bnk::block_threads());
  const int vectors = params.count / 4;
  for (int i = thread; i < vectors; i += threads) {
    const int shift = kFault == Scale::kMisaligned && i == 3 ? 1 : 0;
    bnk::Vector<float> value = bnk::load_vector(params.x + 4 * i + shift);
    for (float& element : value.data) element *= 2;
    bnk::store_vector(params.y + 4 * i, value);
  }
  const int end = kFault == Scale::kNoTail ? 0 : params.count + (kFault == Scale::kTailTooLong ? 1 : 0);
  for (int i = 4 * vectors + thread; i < end; i += threads) bnk::store(params.y + i, 2 * bnk::load(params.x + i));
  if (thread != 0) return;
  if (kFault == Scale::kReadsBefore) bnk::store(params.y, bnk::load(params.x - 1));
  if (kFault == Scale::kReadsFar) bnk::store(params.y, bnk::load(params.x + 1000000));
  if (kFault == Scale::kWritesFar) bnk::store(params.y + 1000, 2.0f);
  if (kFault == Scale::kNoSuchMemory) bnk::store(params.y, bnk::load(static_cast<const float*>(nullptr)));
  if (kFault == Scale::kPastPrimitives) params.y[0] = params.x[0];
  if (kFault == Scale::kWritesInput) bnk::store(const_cast<float*>(params.x), 2.0f);
}

// ---- data races -----------------------------------------------------------------------------------------------------

enum class Race { kSound, kShared, kSharedReadWrite, kGlobalAcrossBlocks, kGlobalVector, kShuffleAsBarrier };

template <Race kFault>
BNK_KERNEL(1024, 1)
race(Params params) {
  BNK_SHARED(float, cell, 64);
  const unsigned thread = bnk::thread_rank();
  if (thread < 32) cell[kFault == Race::kShared ? 0 : thread] = 1;  // all write the same value: no result changes
  if (kFault == Race::kShuffleAsBarrier) {
    if (thread < 32) bnk::shuffle_xor(0.0, 1);  // synchronises a warp, but orders no memory
  } else {
    bnk::block_barrier();
  }
  const float mine = kFault == Race::kShared ? cell[0] : thread < 32 ? cell[thread ^ 1] : 1;
  bnk::block_barrier();
  if (kFault == Race::kSharedReadWrite && thread < 2) {
    if (thread == 0) cell[1] = 1;
    if (thread == 1) bnk::store(params.partial + bnk::block_rank(), cell[1]);
  }
  if (thread != 0) return;
  const unsigned block = bnk::block_rank();
  bnk::store(params.y + (kFault == Race::kGlobalAcrossBlocks ? 0 : block), mine);
  if (kFault == Race::kGlobalVector && block == 0) bnk::store_vector(params.y, bnk::Vector<float>{{1, 1, 1, 1}});
}

// ---- divergence -----------------------------------------------------------------------------------------------------

enum class Meeting {
  kSound,
  kTwoBarriers,
  kEarlyReturn,
  kLateReturn,
  kBarrierInBranch,
  kLaneMissing,
  kLaneAtBarrier,
  kTwoShuffles,
  kLaneReturned,
};

template <Meeting kFault>
BNK_KERNEL(1024, 1)
meeting(Params params) {
  const unsigned thread = bnk::thread_rank();
  if (kFault == Meeting::kEarlyReturn && thread == 5) return;
  if (kFault == Meeting::kTwoBarriers && thread >= 32) {
    bnk::block_barrier();
  } else if (kFault != Meeting::kBarrierInBranch || thread < 32) {
    bnk::block_barrier();
  }
  if (kFault == Meeting::kLateReturn && thread == 5) return;
  double value = thread;
  if (kFault == Meeting::kLaneReturned && thread == 31) return;
  if (kFault == Meeting::kLaneAtBarrier && thread == 31) bnk::block_barrier();
  if (kFault == Meeting::kTwoShuffles && thread == 31) {
    value += bnk::shuffle_xor(value, 1);
  } else if (kFault != Meeting::kLaneMissing || thread != 31) {
    value += bnk::shuffle_xor(value, 1);
  }
  bnk::block_barrier();
  bnk::store(params.y + bnk::block_rank() * bnk::block_threads() + thread, static_cast<float>(value));
}

}  // namespace planted

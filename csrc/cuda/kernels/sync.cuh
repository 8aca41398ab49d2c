// Synchronized BatchNorm: the row that one rank sends to the others, and how the rows of all ranks are combined.
//
//   finalize_welford      combines a channel's partials (statistics.cuh) into this rank's row: mean, m2, count
//   combine_statistics    combines the rows of all ranks and writes the results (statistics_results.cuh)
//   combine_grad_sums     combines the rows of the backward into the means of g and g*xhat for grad_input_kernel
//
// finalize_grad_sums writes a rank's row of the backward. One thread per channel (combine_grad_sums: per value)
// combines the ranks, in rank order.
#pragma once

#include "../../core/problem_sync.h"
#include "../device/block_reduce.cuh"
#include "../device/partials.cuh"
#include "../device/statistics_results.cuh"

namespace bnk {

struct FinalizeWelfordParams {
  Finalize finalize;
  const double* partial;  // WelfordData
  double count;           // elements per channel
  double* row;            // statistics_row()
};

static BNK_KERNEL(kMaxBlockThreads, 1) finalize_welford(FinalizeWelfordParams params) {
  BNK_SHARED(WelfordData, slots, (kReduceSlots<1, kWarpThreads>));
  const int64_t channels = params.finalize.channels;
  if (block_rank() == 0 && thread_rank() == 0) store(params.row + 2 * channels, params.count);
  finalize_channels<WelfordData>(params.finalize, params.partial, slots, [&](int64_t channel, const WelfordData& all) {
    store(params.row + channel, all.mean);
    store(params.row + channels + channel, all.m2);
  });
}

struct CombineStatisticsParams {
  int64_t channels;
  RankRows rows;
  const int64_t* num_batches_tracked;  // read if cumulative
  StatisticsResults results;
  double* count;
};

BNK_DEVICE WelfordData welford_of_ranks(const RankRows& rows, int64_t channels, int64_t channel) {
  WelfordData all{};
  for (int64_t rank = 0; rank < rows.ranks; ++rank) {
    const double* row = rows.data + rank * rows.row;
    combine(all, {load(row + 2 * channels), load(row + channel), load(row + channels + channel)});
  }
  return all;
}

static BNK_KERNEL(kMaxBlockThreads, 1) combine_statistics(CombineStatisticsParams params) {
  const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) : 0;
  const int64_t threads = static_cast<int64_t>(grid_blocks()) * block_threads();
  for (int64_t channel = static_cast<int64_t>(block_rank()) * block_threads() + thread_rank();
       channel < params.channels; channel += threads) {
    const WelfordData all = welford_of_ranks(params.rows, params.channels, channel);
    if (channel == 0) store(params.count, all.count);
    if (all.count == 0) {
      write(params.results.mean, channel, 0);
      write(params.results.invstd, channel, 0);
    } else if (all.count == 1) {
      write(params.results.mean, channel, all.mean);
      write(params.results.invstd, channel, invstd_of(params.results, all));
    } else {
      write_statistics(params.results, channel, all, running_factor(params.results, batches));
    }
  }
}

struct CombineGradSumsParams {
  RankRows rows;
  const double* count;
  double* means;  // out: the C means of g, then the C means of g*xhat
};

static BNK_KERNEL(kMaxBlockThreads, 1) combine_grad_sums(CombineGradSumsParams params) {
  const double count = load(params.count);
  const int64_t sums = params.rows.row;
  const int64_t threads = static_cast<int64_t>(grid_blocks()) * block_threads();
  for (int64_t i = static_cast<int64_t>(block_rank()) * block_threads() + thread_rank(); i < sums; i += threads) {
    double total = 0;
    for (int64_t rank = 0; rank < params.rows.ranks; ++rank) total += load(params.rows.data + rank * sums + i);
    store(params.means + i, total / count);
  }
}

}  // namespace bnk

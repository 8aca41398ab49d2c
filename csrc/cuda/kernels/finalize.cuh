// Finalize: the kernels after statistics.cuh and grad_sums.cuh. Combine each channel's partials in split order.
//
//   finalize_statistics   writes the results of the Welford data (statistics_results.cuh)
//   finalize_grad_sums    grad_bias = sum(g),  grad_weight = sum(g*xhat), and both divided by n for grad_input_kernel
//
// A CTA handles threads_c adjacent channels per iteration, and its threads with the same index along C divide a
// channel's splits (combine_channels, in partials.cuh). Each value is written by exactly one thread. These kernels are
// not templates: every translation unit that includes this file compiles them.
#pragma once

#include "../device/block_reduce.cuh"
#include "../device/partials.cuh"
#include "../device/statistics_results.cuh"

namespace bnk {

struct FinalizeStatisticsParams {
  Finalize finalize;
  const double* partial;
  const int64_t* num_batches_tracked;  // read if cumulative
  StatisticsResults results;
};

static BNK_KERNEL(kMaxBlockThreads, 1) finalize_statistics(FinalizeStatisticsParams params) {
  BNK_SHARED(WelfordData, slots, (kReduceSlots<1, kWarpThreads>));
  const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) : 0;
  finalize_channels<WelfordData>(params.finalize, params.partial, slots, [&](int64_t channel, const WelfordData& all) {
    write_statistics(params.results, channel, all, running_factor(params.results, batches));
  });
}

struct FinalizeGradSumsParams {
  Finalize finalize;
  const double* partial;
  double elements_per_channel;
  PerChannel grad_weight;  // may be null
  PerChannel grad_bias;    // may be null
  PerChannel mean_g;       // double, may be null
  PerChannel mean_g_xhat;  // double, may be null
};

static BNK_KERNEL(kMaxBlockThreads, 1) finalize_grad_sums(FinalizeGradSumsParams params) {
  BNK_SHARED(Sums, slots, (kReduceSlots<1, kWarpThreads>));
  finalize_channels<Sums>(params.finalize, params.partial, slots, [&](int64_t channel, const Sums& all) {
    write(params.grad_bias, channel, all.first);
    write(params.grad_weight, channel, all.second);
    write(params.mean_g, channel, all.first / params.elements_per_channel);
    write(params.mean_g_xhat, channel, all.second / params.elements_per_channel);
  });
}

}  // namespace bnk

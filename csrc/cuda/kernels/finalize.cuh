// The second kernel of statistics.cuh and of grad_sums.cuh: joins a channel's partials in split order.
//
//   finalize_statistics   writes what the Welford data become (statistics_results.cuh)
//   finalize_grad_sums    grad_bias = sum(g),  grad_weight = sum(g*xhat), and both over n for grad_input_kernel
//
// Each value is written by exactly one thread. These kernels are not templates: every translation unit that includes this file
// compiles them.
#pragma once

#include "../device/partials.cuh"
#include "../device/statistics_results.cuh"
#include "../device/sums.cuh"

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
  PerChannel grad_weight;  // or null
  PerChannel grad_bias;    // or null
  PerChannel mean_g;       // double, or null
  PerChannel mean_g_xhat;  // double, or null
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

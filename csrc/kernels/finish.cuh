// The second kernel of statistics.cuh and of grad_sums.cuh: joins a channel's partials in chunk order.
//
//   finish_statistics   writes what the moments become (statistics_results.cuh)
//   finish_grad_sums    grad_bias = sum(g),  grad_weight = sum(g*xhat), and both over n for grad_input_kernel
//
// Each value is written by exactly one thread. These kernels are not templates: every translation unit that includes this file
// compiles them.
#pragma once

#include "partials.cuh"
#include "statistics_results.cuh"
#include "sums.cuh"

namespace bnk {

struct FinishStatisticsParams {
  Finish finish;
  const double* partial;
  const int64_t* num_batches_tracked;  // read if cumulative
  StatisticsResults results;
};

static BNK_KERNEL(kMaxBlockThreads) finish_statistics(FinishStatisticsParams params) {
  BNK_SHARED(Moments, slots, (kReduceSlots<1, kWarpThreads>));
  const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) : 0;
  finish_channels<Moments>(params.finish, params.partial, slots, [&](int64_t channel, const Moments& all) {
    write_statistics(params.results, channel, all, running_factor(params.results, batches));
  });
}

struct FinishGradSumsParams {
  Finish finish;
  const double* partial;
  double elements_per_channel;
  PerChannel grad_weight;  // or null
  PerChannel grad_bias;    // or null
  PerChannel mean_g;       // double, or null
  PerChannel mean_g_xhat;  // double, or null
};

static BNK_KERNEL(kMaxBlockThreads) finish_grad_sums(FinishGradSumsParams params) {
  BNK_SHARED(Sums, slots, (kReduceSlots<1, kWarpThreads>));
  finish_channels<Sums>(params.finish, params.partial, slots, [&](int64_t channel, const Sums& all) {
    write(params.grad_bias, channel, all.first);
    write(params.grad_weight, channel, all.second);
    write(params.mean_g, channel, all.first / params.elements_per_channel);
    write(params.mean_g_xhat, channel, all.second / params.elements_per_channel);
  });
}

}  // namespace bnk

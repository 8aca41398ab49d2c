// Results of a channel's Welford data: the saved statistics and the running ones (Ioffe & Szegedy 2015, Algorithm 1).
//
//   mean,  invstd = 1/sqrt(m2/n + eps)
//   running_mean += factor*(mean - running_mean)    running_var += factor*(m2/(n-1) - running_var)
#pragma once

#include "per_channel.cuh"
#include "welford.cuh"

namespace bnk {

struct StatisticsResults {
  double momentum;
  bool cumulative;
  double eps;
  PerChannel mean;
  PerChannel invstd;
  PerChannel running_mean;  // may be null
  PerChannel running_var;   // may be null
};

template <typename Args>
StatisticsResults results_of(const Args& args) {
  return {
      .momentum = args.momentum,
      .cumulative = args.cumulative,
      .eps = args.eps,
      .mean = args.mean,
      .invstd = args.invstd,
      .running_mean = args.running_mean,
      .running_var = args.running_var,
  };
}

// count: batches so far, including this one; used only by cumulative averages.
BNK_DEVICE double running_factor(const StatisticsResults& results, int64_t count) {
  return results.cumulative ? 1 / static_cast<double>(count) : results.momentum;
}

BNK_DEVICE void update_running(const PerChannel& running, int64_t channel, double value, double factor) {
  if (running.data == nullptr) return;
  write(running, channel,
        fused_multiply_add(factor, value, (1 - factor) * read({running.data, running.dtype}, channel)));
}

BNK_DEVICE double invstd_of(const StatisticsResults& results, const WelfordData& all) {
  return reciprocal_sqrt(all.m2 / all.count + results.eps);
}

// Called by one thread per channel.
BNK_DEVICE void write_statistics(const StatisticsResults& results, int64_t channel, const WelfordData& all,
                                 double factor) {
  write(results.mean, channel, all.mean);
  write(results.invstd, channel, invstd_of(results, all));
  update_running(results.running_mean, channel, all.mean, factor);
  update_running(results.running_var, channel, all.m2 / (all.count - 1), factor);
}

}  // namespace bnk

#include "ranks.h"

#include <cmath>

#include "backend.h"
#include "simd/scalar.h"
#include "tiling.h"

namespace bnk::cpu {
namespace {

void update_running(const PerChannel& running, int64_t channel, double value, double factor) {
  if (running.data == nullptr) return;
  const double old = read(running, channel);
  write(running, channel, old + factor * (value - old));
}

}  // namespace

Partial combine_welford(const RankRows& rows, int64_t channels, int64_t channel, double* count) {
  Partial total{};
  double before = 0;
  for (int64_t rank = 0; rank < rows.ranks; ++rank) {
    const double* row = rows.data + rank * rows.row;
    const double of_rank = row[2 * channels];
    if (of_rank == 0) continue;
    combine_welford(&total, before, {row[channel], row[channels + channel]}, of_rank);
    before += of_rank;
  }
  *count = before;
  return total;
}

Partial combine_grad_sums(const RankRows& rows, int64_t channels, int64_t channel) {
  Partial total{};
  for (int64_t rank = 0; rank < rows.ranks; ++rank) {
    const double* row = rows.data + rank * rows.row;
    total.first += row[channel];
    total.second += row[channels + channel];
  }
  return total;
}

void combine_statistics(const CombineStatisticsArgs& args) {
  const double factor = args.cumulative ? 1.0 / static_cast<double>(*args.num_batches_tracked) : args.momentum;
  for (int64_t c = 0; c < args.channels; ++c) {
    const Partial total = combine_welford(args.rows, args.channels, c, args.count);
    const double n = *args.count;
    write(args.mean, c, total.first);
    write(args.invstd, c, n == 0 ? 0 : 1 / std::sqrt(total.second / n + args.eps));
    if (n < 2) continue;
    update_running(args.running_mean, c, total.first, factor);
    update_running(args.running_var, c, total.second / (n - 1), factor);
  }
}

void grad_sums(const GradSumsArgs& args) {
  const int64_t channels = args.problem.channels;
  backward({
      .problem = args.problem,
      .grad_y = args.grad_y,
      .x = args.x,
      .grad_x = nullptr,
      .weight = {},
      .mean = args.mean,
      .invstd = args.invstd,
      .grad_weight = {args.row + channels, Dtype::kFloat64},
      .grad_bias = {args.row, Dtype::kFloat64},
      .training = true,
  });
  for (int64_t c = 0; c < channels; ++c) {
    write(args.grad_bias, c, args.row[c]);
    write(args.grad_weight, c, args.row[channels + c]);
  }
}

}  // namespace bnk::cpu

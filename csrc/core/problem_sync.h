// Synchronized BatchNorm: the steps of a batch distributed over several ranks, and the raw-pointer arguments of each
// step.
//
//   forward    statistics of x -> [ranks exchange] -> combine_statistics -> normalize
//   backward   grad_sums of (g, x) -> [ranks exchange] -> grad_input
//
// Each rank sends one row of doubles, whatever the dtype of x: a mean and a sum of squares lose no precision, and a
// count is exact up to 2^53. A rank without data sends a count of 0, or sums of 0. Rows are combined in rank order, so
// every rank gets the same bits.
#pragma once

#include "problem.h"

namespace bnk {

// Doubles in one rank's row. Forward: C means, C sums of squared deviations, and one count. Backward: C sums of g, and
// C sums of g*xhat.
constexpr int64_t statistics_row(int64_t channels) { return 2 * channels + 1; }
constexpr int64_t grad_sums_row(int64_t channels) { return 2 * channels; }

// The rows of all ranks, concatenated in rank order.
struct RankRows {
  const double* data;
  int64_t ranks;
  int64_t row;  // doubles per row
};

// Precondition: elements() >= 1.
struct StatisticsArgs {
  Problem problem;
  const void* x;
  double eps;   // the layer's eps; sets the CPU's underflow floor
  double* row;  // out, statistics_row()
};

// mean, invstd = 1/sqrt(m2/n + eps), where n is the count over all ranks. The running statistics are updated as in
// ForwardTrainArgs if n >= 2 and left unchanged otherwise; mean = invstd = 0 if n = 0. num_batches_tracked already
// counts this batch and is read only if cumulative.
struct CombineStatisticsArgs {
  int64_t channels;
  RankRows rows;
  const int64_t* num_batches_tracked;
  double momentum;
  bool cumulative;
  double eps;
  PerChannel mean;          // out
  PerChannel invstd;        // out
  PerChannel running_mean;  // may be null
  PerChannel running_var;   // may be null
  double* count;            // out: n
};

// y = (x - mean)*invstd*weight + bias. Precondition: elements() >= 1.
struct NormalizeArgs {
  Problem problem;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  ConstPerChannel mean;    // accumulate_dtype
  ConstPerChannel invstd;  // accumulate_dtype
};

// This rank's sums, both for the exchange and for its own parameter gradients. Precondition: elements() >= 1.
struct GradSumsArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  ConstPerChannel mean;    // accumulate_dtype
  ConstPerChannel invstd;  // accumulate_dtype
  double* row;             // out, grad_sums_row()
  PerChannel grad_weight;  // may be null
  PerChannel grad_bias;    // may be null
};

// grad_x = weight*invstd*(g - sum(g)/n - xhat*sum(g*xhat)/n); the sums and the count n are over all ranks.
// Precondition: elements() >= 1.
struct GradInputArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;    // accumulate_dtype
  ConstPerChannel invstd;  // accumulate_dtype
  RankRows rows;
  const double* count;
};

}  // namespace bnk

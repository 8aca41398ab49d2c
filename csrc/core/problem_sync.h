// The steps of a BatchNorm whose batch lies on several ranks, and the raw-pointer arguments of each.
//
//   forward    statistics of x -> [ranks exchange] -> combine_statistics -> normalize
//   backward   grad_sums of (g, x) -> [ranks exchange] -> grad_input
//
// What a rank sends is one row of doubles, whatever the dtype of x: a mean and a sum of squares lose nothing on the way,
// and a count is exact up to 2^53. A rank without data sends a count of 0, or sums of 0. Rows are joined in the order of
// the ranks, so that each of them gets the same bits.
#pragma once

#include "problem.h"

namespace bnk {

// Doubles of a rank's row. Forward: the means of C channels, their sums of squared deviations, and one count for all.
// Backward: C sums of g, and C sums of g*xhat.
constexpr int64_t statistics_row(int64_t channels) { return 2 * channels + 1; }
constexpr int64_t grad_sums_row(int64_t channels) { return 2 * channels; }

// The rows of all ranks, one after the other.
struct RankRows {
  const double* data;
  int64_t ranks;
  int64_t row;  // doubles of each
};

// Precondition: elements() >= 1.
struct StatisticsArgs {
  Problem problem;
  const void* x;
  double eps;   // what the sums of squares will be compared with
  double* row;  // out, statistics_row()
};

// With n the count over all ranks: mean, invstd = 1/sqrt(m2/n + eps), and the running statistics as in ForwardTrainArgs;
// these stay as they are where n < 2, and mean = invstd = 0 where n = 0.
// num_batches_tracked, this batch among them, is read if cumulative.
struct CombineStatisticsArgs {
  int64_t channels;
  RankRows rows;
  const int64_t* num_batches_tracked;
  double momentum;
  bool cumulative;
  double eps;
  PerChannel mean;          // out
  PerChannel invstd;        // out
  PerChannel running_mean;  // or null
  PerChannel running_var;   // or null
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

// This rank's sums, for the others and for its own parameters. Precondition: elements() >= 1.
struct GradSumsArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  ConstPerChannel mean;    // accumulate_dtype
  ConstPerChannel invstd;  // accumulate_dtype
  double* row;             // out, grad_sums_row()
  PerChannel grad_weight;  // or null
  PerChannel grad_bias;    // or null
};

// grad_x = weight*invstd*(g - sum(g)/n - xhat*sum(g*xhat)/n), with the sums and the count n of all ranks.
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

// Synchronized BatchNorm (problem_sync.h) as launch sequences over any executor (see two_pass.h): the two-pass path,
// interrupted where the ranks exchange.
#pragma once

#include "../kernels/sync.cuh"
#include "two_pass.h"

namespace bnk::sync {

// Doubles of scratch memory. Uninitialized on entry; the contents afterwards are unspecified.
inline int64_t statistics_scratch(const TwoPassPlan& plan) { return two_pass::forward_train_scratch(plan); }
inline int64_t grad_sums_scratch(const TwoPassPlan& plan) {
  return kFields<Sums> * plan.partition.splits * plan.partition.channels;
}
inline int64_t grad_input_scratch(const TwoPassPlan& plan) { return grad_sums_row(plan.partition.channels); }

template <typename Executor>
void statistics(const StatisticsArgs& args, const TwoPassPlan& plan, double* scratch, Executor& executor) {
  const StatisticsParams statistics{plan.partition, args.x, scratch, nullptr};
  const FinalizeWelfordParams finalize{plan.finalize, scratch, static_cast<double>(args.problem.elements_per_channel()),
                                       args.row};
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, statistics_of<T>(two_pass::layout_of(args.problem)), statistics);
    executor.launch(plan.finalize_launch, finalize_welford, finalize);
  });
}

template <typename Executor>
void combine_statistics(const CombineStatisticsArgs& args, Launch launch, Executor& executor) {
  const CombineStatisticsParams params{
      .channels = args.channels,
      .rows = args.rows,
      .num_batches_tracked = args.num_batches_tracked,
      .results = results_of(args),
      .count = args.count,
  };
  executor.launch(launch, bnk::combine_statistics, params);
}

template <typename Executor>
void normalize(const NormalizeArgs& args, const TwoPassPlan& plan, Executor& executor) {
  const NormalizeParams params = two_pass::normalize_by(args, plan);
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, normalize_of<T>(two_pass::layout_of(args.problem), false), params);
  });
}

template <typename Executor>
void grad_sums(const GradSumsArgs& args, const TwoPassPlan& plan, double* scratch, Executor& executor) {
  const GradSumsParams sums = two_pass::grad_sums_by(args, plan, scratch);
  const FinalizeGradSumsParams finalize{
      .finalize = plan.finalize,
      .partial = scratch,
      .elements_per_channel = 1,  // writes the sums themselves: only the ranks together know the number of elements
      .grad_weight = args.grad_weight,
      .grad_bias = args.grad_bias,
      .mean_g = {args.row, Dtype::kFloat64},
      .mean_g_xhat = {args.row + args.problem.channels, Dtype::kFloat64},
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, grad_sums_of<T>(two_pass::layout_of(args.problem), false), sums);
    executor.launch(plan.finalize_launch, finalize_grad_sums, finalize);
  });
}

// combine: the launch that combines the rows.
template <typename Executor>
void grad_input(const GradInputArgs& args, const TwoPassPlan& plan, Launch combine, double* scratch,
                Executor& executor) {
  const CombineGradSumsParams means{args.rows, args.count, scratch};
  const PerChannel mean_g{scratch, Dtype::kFloat64};
  const PerChannel mean_g_xhat{scratch + args.problem.channels, Dtype::kFloat64};
  const GradInputParams input = two_pass::grad_input_by(args, plan, mean_g, mean_g_xhat, true);
  executor.launch(combine, combine_grad_sums, means);
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, grad_input_of<T>(two_pass::layout_of(args.problem), false), input);
  });
}

}  // namespace bnk::sync

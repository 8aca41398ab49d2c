// The steps of problem_sync.h as sequences of launches, over any executor (as streaming.h is): the streaming path, cut
// where the ranks exchange.
#pragma once

#include "../kernels/ranks.cuh"
#include "streaming.h"

namespace bnk::sync {

// Doubles of scratch memory; its contents are undefined before and after.
inline int64_t statistics_scratch(const StreamingPlan& plan) { return streaming::forward_train_scratch(plan); }
inline int64_t grad_sums_scratch(const StreamingPlan& plan) {
  return kFields<Sums> * plan.walk.chunks * plan.walk.channels;
}
inline int64_t grad_input_scratch(const StreamingPlan& plan) { return grad_sums_row(plan.walk.channels); }

template <typename Executor>
void statistics(const StatisticsArgs& args, const StreamingPlan& plan, double* scratch, Executor& executor) {
  const StatisticsParams statistics{plan.walk, args.x, scratch, nullptr};
  const FinishMomentsParams finish{plan.finish, scratch, static_cast<double>(args.problem.elements_per_channel()),
                                   args.row};
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.walk_launch, statistics_of<T>(streaming::layout_of(args.problem)), statistics);
    executor.launch(plan.finish_launch, finish_moments, finish);
  });
}

template <typename Executor>
void join_statistics(const JoinStatisticsArgs& args, Launch launch, Executor& executor) {
  const JoinStatisticsParams params{
      .channels = args.channels,
      .rows = args.rows,
      .num_batches_tracked = args.num_batches_tracked,
      .results = results_of(args),
      .count = args.count,
  };
  executor.launch(launch, bnk::join_statistics, params);
}

template <typename Executor>
void normalize(const NormalizeArgs& args, const StreamingPlan& plan, Executor& executor) {
  const NormalizeParams params = streaming::normalize_by(args, plan);
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.walk_launch, normalize_of<T>(streaming::layout_of(args.problem), false), params);
  });
}

template <typename Executor>
void grad_sums(const GradSumsArgs& args, const StreamingPlan& plan, double* scratch, Executor& executor) {
  const GradSumsParams sums = streaming::grad_sums_by(args, plan, scratch);
  const FinishGradSumsParams finish{
      .finish = plan.finish,
      .partial = scratch,
      .elements_per_channel = 1,  // the sums themselves: how many elements there are the ranks only know together
      .grad_weight = args.grad_weight,
      .grad_bias = args.grad_bias,
      .mean_g = {args.row, Dtype::kFloat64},
      .mean_g_xhat = {args.row + args.problem.channels, Dtype::kFloat64},
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.walk_launch, grad_sums_of<T>(streaming::layout_of(args.problem), false), sums);
    executor.launch(plan.finish_launch, finish_grad_sums, finish);
  });
}

// `join`: the launch that joins the rows.
template <typename Executor>
void grad_input(const GradInputArgs& args, const StreamingPlan& plan, Launch join, double* scratch,
                Executor& executor) {
  const JoinGradSumsParams means{args.rows, args.count, scratch};
  const PerChannel mean_g{scratch, Dtype::kFloat64};
  const PerChannel mean_g_xhat{scratch + args.problem.channels, Dtype::kFloat64};
  const GradInputParams input = streaming::grad_input_by(args, plan, mean_g, mean_g_xhat, true);
  executor.launch(join, join_grad_sums, means);
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.walk_launch, grad_input_of<T>(streaming::layout_of(args.problem), false), input);
  });
}

}  // namespace bnk::sync

// The steps of a synchronized batch norm across ranks (csrc/cuda/launch/sync.h), as operations of run_kernels.cpp.
//
// OPERATION is sync_statistics, sync_combine, sync_normalize, sync_grad_sums or sync_grad_input. Tensors have the names
// of their fields in problem_sync.h; `rows` needs the key `ranks`. The launch that combines rows has blocks of
// finalize_block threads.
#pragma once

#include <algorithm>

#include "cuda/launch/sync.h"
#include "simt/request.h"

namespace simt {

inline bnk::RankRows rows_of(const Request& request, int64_t row) {
  return {static_cast<const double*>(request.data("rows")), request.integer("ranks", 0), row};
}

inline bnk::Launch combine_launch(const Request& request, int64_t values) {
  bnk::Launch launch = bnk::plan_combine(values);
  launch.block = static_cast<int>(request.integer("finalize_block", launch.block));
  launch.grid = std::min((values + launch.block - 1) / launch.block, request.integer("grid", launch.grid));
  return launch;
}

inline int64_t sync_scratch(const Request& request, const bnk::TwoPassPlan& plan) {
  if (request.operation == "sync_statistics") return bnk::sync::statistics_scratch(plan);
  if (request.operation == "sync_grad_sums") return bnk::sync::grad_sums_scratch(plan);
  return request.operation == "sync_grad_input" ? bnk::sync::grad_input_scratch(plan) : 0;
}

template <typename Executor>
void run_sync(const Request& request, const bnk::TwoPassPlan& plan, double* scratch, Executor& executor) {
  const bnk::Problem problem = request.problem();
  if (request.operation == "sync_statistics") {
    const bnk::StatisticsArgs args{.problem = problem,
                                   .x = request.data("x"),
                                   .eps = request.real("eps"),
                                   .row = static_cast<double*>(request.data("row"))};
    bnk::sync::statistics(args, plan, scratch, executor);
  } else if (request.operation == "sync_combine") {
    const bnk::CombineStatisticsArgs args{
        .channels = problem.channels,
        .rows = rows_of(request, bnk::statistics_row(problem.channels)),
        .num_batches_tracked = static_cast<const int64_t*>(request.data("num_batches_tracked")),
        .momentum = request.real("momentum"),
        .cumulative = request.integer("cumulative", 0) != 0,
        .eps = request.real("eps"),
        .mean = request.vector("mean"),
        .invstd = request.vector("invstd"),
        .running_mean = request.vector("running_mean"),
        .running_var = request.vector("running_var"),
        .count = static_cast<double*>(request.data("count"))};
    bnk::sync::combine_statistics(args, combine_launch(request, problem.channels), executor);
  } else if (request.operation == "sync_normalize") {
    const bnk::NormalizeArgs args{.problem = problem,
                                  .x = request.data("x"),
                                  .y = request.data("y"),
                                  .weight = request.vector("weight"),
                                  .bias = request.vector("bias"),
                                  .mean = request.vector("mean"),
                                  .invstd = request.vector("invstd")};
    bnk::sync::normalize(args, plan, executor);
  } else if (request.operation == "sync_grad_sums") {
    const bnk::GradSumsArgs args{.problem = problem,
                                 .grad_y = request.data("grad_y"),
                                 .x = request.data("x"),
                                 .mean = request.vector("mean"),
                                 .invstd = request.vector("invstd"),
                                 .row = static_cast<double*>(request.data("row")),
                                 .grad_weight = request.vector("grad_weight"),
                                 .grad_bias = request.vector("grad_bias")};
    bnk::sync::grad_sums(args, plan, scratch, executor);
  } else {
    const int64_t row = bnk::grad_sums_row(problem.channels);
    const bnk::GradInputArgs args{.problem = problem,
                                  .grad_y = request.data("grad_y"),
                                  .x = request.data("x"),
                                  .grad_x = request.data("grad_x"),
                                  .weight = request.vector("weight"),
                                  .mean = request.vector("mean"),
                                  .invstd = request.vector("invstd"),
                                  .rows = rows_of(request, row),
                                  .count = static_cast<const double*>(request.data("count"))};
    bnk::sync::grad_input(args, plan, combine_launch(request, row), scratch, executor);
  }
}

}  // namespace simt

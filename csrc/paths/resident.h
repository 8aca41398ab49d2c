// The resident path: one launch a call, over any executor (as streaming.h is).
#pragma once

#include "../plan.h"
#include "dispatch.h"
#include "kernels.h"

namespace bnk::resident {

// Doubles of scratch memory; its contents are undefined before and after.
inline int64_t forward_scratch(const ResidentPlan& plan) {
  return plan.group != Group::kVirtualCluster ? 0 : kFields<Moments> * plan.members * plan.walk.channels;
}
inline int64_t backward_scratch(const ResidentPlan& plan) {
  if (plan.group != Group::kVirtualCluster) return 0;
  return (kFields<Sums> * plan.members + (plan.divided ? 2 : 0)) * plan.walk.channels;
}

// Whether a launch uses its barrier workspace. cumulative: it averages the running statistics over all batches, and the
// last of its blocks counts this one.
inline bool needs_barrier_workspace(const ResidentPlan& plan, bool cumulative) {
  return plan.group == Group::kVirtualCluster || cumulative;
}

inline Residence residence(const ResidentPlan& plan, double* scratch, void* barrier_workspace) {
  return {plan.group,   plan.members,    plan.groups, plan.kept,
          plan.divided, plan.join_lanes, scratch,     static_cast<BarrierWord*>(barrier_workspace)};
}

template <typename Executor>
void forward_train(const ForwardTrainArgs& args, const ResidentPlan& plan, double* scratch, void* barrier_workspace,
                   Executor& executor) {
  const ResidentForwardParams params{
      .walk = plan.walk,
      .residence = residence(plan, scratch, barrier_workspace),
      .x = args.x,
      .y = args.y,
      .weight = args.weight,
      .bias = args.bias,
      .num_batches_tracked = args.num_batches_tracked,
      .results = results_of(args),
      .epilogue = args.epilogue,
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan, resident_forward_of<T>(plan.walk.layout, args.epilogue.is_there()), params);
  });
}

// Precondition: args.training and args.grad_x.
template <typename Executor>
void backward(const BackwardArgs& args, const ResidentPlan& plan, double* scratch, void* barrier_workspace,
              Executor& executor) {
  // The two means stand behind the partials.
  double* means = scratch + kFields<Sums> * plan.members * plan.walk.channels;
  const ResidentBackwardParams params{
      .walk = plan.walk,
      .residence = residence(plan, scratch, barrier_workspace),
      .grad_y = args.grad_y,
      .x = args.x,
      .grad_x = args.grad_x,
      .weight = args.weight,
      .mean = args.mean,
      .invstd = args.invstd,
      .elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),
      .grad_weight = args.grad_weight,
      .grad_bias = args.grad_bias,
      .mean_g = {plan.divided ? means : nullptr, Dtype::kFloat64},
      .mean_g_xhat = {plan.divided ? means + plan.walk.channels : nullptr, Dtype::kFloat64},
      .relu_low = args.relu_low,
      .relu_high = args.relu_high,
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan, resident_backward_of<T>(plan.walk.layout, args.behind_relu()), params);
  });
}

}  // namespace bnk::resident

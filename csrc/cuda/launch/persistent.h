// The persistent kernel: one launch per call, over any executor (see two_pass.h).
#pragma once

#include "../../plan/plan.h"
#include "dispatch.h"
#include "kernels.h"

namespace bnk::persistent {

// Doubles of scratch memory. Uninitialized on entry; the contents afterwards are unspecified.
inline int64_t forward_scratch(const PersistentPlan& plan) {
  return plan.group != GroupKind::kGrid ? 0 : kFields<WelfordData> * plan.group_size * plan.partition.channels;
}
inline int64_t backward_scratch(const PersistentPlan& plan) {
  if (plan.group != GroupKind::kGrid) return 0;
  return (kFields<Sums> * plan.group_size + (plan.two_shot ? 2 : 0)) * plan.partition.channels;
}

// Whether a launch uses its barrier workspace. cumulative: the running statistics average over all batches, and the
// last CTA of the launch counts this batch.
inline bool needs_barrier_workspace(const PersistentPlan& plan, bool cumulative) {
  return plan.group == GroupKind::kGrid || cumulative;
}

inline PersistentParams persistent_params(const PersistentPlan& plan, double* scratch, void* barrier_workspace) {
  return {plan.group,    plan.group_size,        plan.groups, plan.cached_vectors,
          plan.two_shot, plan.combine_threads_c, scratch,     static_cast<BarrierWord*>(barrier_workspace)};
}

template <typename Executor>
void forward_train(const ForwardTrainArgs& args, const PersistentPlan& plan, double* scratch, void* barrier_workspace,
                   Executor& executor) {
  const PersistentForwardParams params{
      .partition = plan.partition,
      .persistent = persistent_params(plan, scratch, barrier_workspace),
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
    executor.launch(plan, persistent_forward_of<T>(plan.partition.layout, args.epilogue.enabled()), params);
  });
}

// Precondition: args.training and args.grad_x.
template <typename Executor>
void backward(const BackwardArgs& args, const PersistentPlan& plan, double* scratch, void* barrier_workspace,
              Executor& executor) {
  // The two means follow the partials.
  double* means = scratch + kFields<Sums> * plan.group_size * plan.partition.channels;
  const PersistentBackwardParams params{
      .partition = plan.partition,
      .persistent = persistent_params(plan, scratch, barrier_workspace),
      .grad_y = args.grad_y,
      .x = args.x,
      .grad_x = args.grad_x,
      .weight = args.weight,
      .mean = args.mean,
      .invstd = args.invstd,
      .elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),
      .grad_weight = args.grad_weight,
      .grad_bias = args.grad_bias,
      .mean_g = {plan.two_shot ? means : nullptr, Dtype::kFloat64},
      .mean_g_xhat = {plan.two_shot ? means + plan.partition.channels : nullptr, Dtype::kFloat64},
      .relu_low = args.relu_low,
      .relu_high = args.relu_high,
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan, persistent_backward_of<T>(plan.partition.layout, args.has_relu()), params);
  });
}

}  // namespace bnk::persistent

// The two-pass path as a sequence of launches, over any executor.
//
// An executor has one member, launch(Launch, kernel, params). StreamExecutor (executor.h) launches the kernel on a CUDA
// stream; the executor of tests/support/simt runs it on the host. So the tests without a GPU check this very sequence.
#pragma once

#include "../../plan/plan.h"
#include "../kernels/finalize.cuh"
#include "dispatch.h"
#include "kernels.h"

namespace bnk::two_pass {

// Whether the tensor to which vectors are aligned starts on a vector boundary: the `aligned` of plans.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

// Doubles of scratch memory. Uninitialized on entry; the contents afterwards are unspecified.
inline int64_t forward_train_scratch(const TwoPassPlan& plan) {
  return kFields<WelfordData> * plan.partition.splits * plan.partition.channels;
}
inline int64_t backward_scratch(const TwoPassPlan& plan) {
  return (kFields<Sums> * plan.partition.splits + 2) * plan.partition.channels;
}

inline Layout layout_of(const Problem& problem) {
  return problem.channels_last() ? Layout::kChannelsLast : Layout::kChannelsFirst;
}

// Normalizes by a given mean and invstd.
template <typename Args>
NormalizeParams normalize_by(const Args& args, const TwoPassPlan& plan, const Epilogue& epilogue = {}) {
  return {
      .partition = plan.partition,
      .x = args.x,
      .y = args.y,
      .weight = args.weight,
      .bias = args.bias,
      .mean = args.mean,
      .invstd_or_var = args.invstd,
      .inference = false,
      .eps = 0,
      .mean_out = {},
      .invstd_out = {},
      .epilogue = epilogue,
  };
}

// ReLU bounds of the forward; null if it had no ReLU.
struct Relu {
  ConstPerChannel low = {nullptr, Dtype::kFloat32};
  ConstPerChannel high = {nullptr, Dtype::kFloat32};
};

template <typename Args>
GradSumsParams grad_sums_by(const Args& args, const TwoPassPlan& plan, double* partial, const Relu& relu = {}) {
  return {plan.partition, args.grad_y, args.x, args.mean, args.invstd, relu.low, relu.high, partial};
}

template <typename Args>
GradInputParams grad_input_by(const Args& args, const TwoPassPlan& plan, PerChannel mean_g, PerChannel mean_g_xhat,
                              bool training, const Relu& relu = {}) {
  return {
      .partition = plan.partition,
      .grad_y = args.grad_y,
      .x = args.x,
      .grad_x = args.grad_x,
      .weight = args.weight,
      .mean = args.mean,
      .invstd = args.invstd,
      .mean_g = mean_g,
      .mean_g_xhat = mean_g_xhat,
      .relu_low = relu.low,
      .relu_high = relu.high,
      .training = training,
  };
}

template <typename Executor>
void forward_train(const ForwardTrainArgs& args, const TwoPassPlan& plan, double* scratch, Executor& executor) {
  const StatisticsParams statistics{plan.partition, args.x, scratch, args.num_batches_tracked};
  const FinalizeStatisticsParams finalize{
      .finalize = plan.finalize,
      .partial = scratch,
      .num_batches_tracked = args.num_batches_tracked,
      .results = results_of(args),
  };
  const NormalizeParams normalize = normalize_by(args, plan, args.epilogue);
  const Layout layout = layout_of(args.problem);
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, statistics_of<T>(layout), statistics);
    executor.launch(plan.finalize_launch, finalize_statistics, finalize);
    executor.launch(plan.tile_launch, normalize_of<T>(layout, args.epilogue.enabled()), normalize);
  });
}

template <typename Executor>
void forward_eval(const ForwardEvalArgs& args, const TwoPassPlan& plan, Executor& executor) {
  const NormalizeParams normalize{
      .partition = plan.partition,
      .x = args.x,
      .y = args.y,
      .weight = args.weight,
      .bias = args.bias,
      .mean = args.running_mean,
      .invstd_or_var = args.running_var,
      .inference = true,
      .eps = args.eps,
      .mean_out = args.mean,
      .invstd_out = args.invstd,
      .epilogue = args.epilogue,
  };
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    executor.launch(plan.tile_launch, normalize_of<T>(layout_of(args.problem), args.epilogue.enabled()), normalize);
  });
}

template <typename Executor>
void backward(const BackwardArgs& args, const TwoPassPlan& plan, double* scratch, Executor& executor) {
  // The two means follow the partials; only grad_x of a training forward needs them.
  double* means = scratch + kFields<Sums> * plan.partition.splits * plan.partition.channels;
  const bool needs_means = args.training && args.grad_x != nullptr;
  const bool needs_sums = needs_means || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;
  const PerChannel mean_g{needs_means ? means : nullptr, Dtype::kFloat64};
  const PerChannel mean_g_xhat{needs_means ? means + plan.partition.channels : nullptr, Dtype::kFloat64};

  const Relu relu{args.relu_low, args.relu_high};
  const GradSumsParams sums = grad_sums_by(args, plan, scratch, relu);
  const FinalizeGradSumsParams finalize{
      .finalize = plan.finalize,
      .partial = scratch,
      .elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),
      .grad_weight = args.grad_weight,
      .grad_bias = args.grad_bias,
      .mean_g = mean_g,
      .mean_g_xhat = mean_g_xhat,
  };
  const GradInputParams input = grad_input_by(args, plan, mean_g, mean_g_xhat, args.training, relu);
  const Layout layout = layout_of(args.problem);
  const bool has_relu = args.has_relu();
  with_dtype(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (needs_sums) {
      executor.launch(plan.tile_launch, grad_sums_of<T>(layout, has_relu), sums);
      executor.launch(plan.finalize_launch, finalize_grad_sums, finalize);
    }
    if (args.grad_x != nullptr) executor.launch(plan.tile_launch, grad_input_of<T>(layout, has_relu), input);
  });
}

}  // namespace bnk::two_pass

#include "ops.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "arguments.h"
#include "dispatch.h"
#include "ops_results.h"

namespace bnk {
namespace {

// A row of a (2, C) tensor; null for an empty tensor.
PerChannel row_of(const at::Tensor& bounds, int64_t row, const Input& input) {
  const Dtype dtype = accumulate_dtype(input.problem.dtype);
  if (!bounds.defined() || bounds.numel() == 0) return {nullptr, dtype};
  return {static_cast<char*>(bounds.data_ptr()) + row * input.problem.channels * size_of(dtype), dtype};
}

// The tensors that an epilogue reads and writes, after their checks.
struct EpilogueTensors {
  at::Tensor residual;     // dense in the layout of the input, or undefined
  at::Tensor relu_bounds;  // (2, C) for a ReLU without a residual, otherwise of size 0
  bool relu;

  EpilogueTensors(const OptionalTensor& added, bool relu, const Input& input) : relu(relu) {
    const bool adds = added.has_value() && added->defined();
    if (adds) residual = residual_like(*added, input);
    if (relu && !adds) {
      relu_bounds = at::empty({2, input.problem.channels}, statistic_options(input));
      if (input.problem.elements() == 0) relu_bounds.zero_();
    } else {
      relu_bounds = empty_statistic(0, input);
    }
  }

  Epilogue arguments(const Input& input) const {
    return {
        .residual = residual.defined() ? residual.const_data_ptr() : nullptr,
        .relu = relu,
        .low = row_of(relu_bounds, 0, input),
        .high = row_of(relu_bounds, 1, input),
    };
  }
};

}  // namespace

FourTensors batch_norm_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                             const OptionalTensor& residual, bool relu) {
  const Input input = describe_input(x);
  ChannelVector average_mean(running_mean, "running_mean", input);
  ChannelVector average_var(running_var, "running_var", input);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  check_updated(average_mean, average_var, x, scale, shift, residual.value_or(at::Tensor()));
  check_counter(num_batches_tracked, input.tensor.device());
  const bool counts = num_batches_tracked.has_value() && num_batches_tracked->defined();
  const bool averages = average_mean.defined();
  TORCH_CHECK_VALUE(averages == average_var.defined(),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK(momentum.has_value() || counts || !averages,
              "batch_norm: momentum=None (a cumulative average) needs num_batches_tracked, but got None");
  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);

  TORCH_CHECK_VALUE(input.problem.elements_per_channel() != 1,
                    "Expected more than 1 value per channel when training, got input size torch.Size(", x.sizes(), ")");

  const EpilogueTensors epilogue(residual, relu, input);
  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    // Nothing to average: the running statistics do not change, but the batch is counted.
    const at::Tensor none = at::zeros({input.problem.channels}, statistic_options(input));
    const at::Tensor zeros = at::zeros_like(none);
    if (counts) count_batch(*num_batches_tracked);
    return {y, none, zeros, epilogue.relu_bounds};
  }
  const at::Tensor mean = empty_statistic(input.problem.channels, input);
  const at::Tensor invstd = empty_statistic(input.problem.channels, input);
  run(
      ForwardTrainArgs{
          .problem = input.problem,
          .x = input.tensor.const_data_ptr(),
          .y = y.data_ptr(),
          .weight = scale.pointer(),
          .bias = shift.pointer(),
          .running_mean = average_mean.pointer(),
          .running_var = average_var.pointer(),
          .num_batches_tracked = counts ? num_batches_tracked->data_ptr<int64_t>() : nullptr,
          .momentum = momentum.value_or(0),
          .cumulative = !momentum.has_value() && averages,
          .eps = eps,
          .mean = pointer_to(mean, input),
          .invstd = pointer_to(invstd, input),
          .epilogue = epilogue.arguments(input),
      },
      input.tensor);
  average_mean.write_back();
  average_var.write_back();
  if (counts) mark_changed(*num_batches_tracked);
  return {y, mean, invstd, epilogue.relu_bounds};
}

FourTensors batch_norm_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                            const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                            const OptionalTensor& residual, bool relu) {
  const Input input = describe_input(x);
  const ChannelVector average_mean(running_mean, "running_mean", input);
  const ChannelVector average_var(running_var, "running_var", input);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  check_same_dtype(average_mean, "running_mean", average_var, "running_var");
  TORCH_CHECK(average_mean.defined(), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(average_var.defined(), "running_var must be defined in evaluation mode");
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);

  const EpilogueTensors epilogue(residual, relu, input);
  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    const at::TensorOptions options = statistic_options(input);
    return {y, running_mean.to(options.dtype()).clone(), at::rsqrt(at::add(running_var.to(options.dtype()), eps)),
            epilogue.relu_bounds};
  }
  const at::Tensor mean = empty_statistic(input.problem.channels, input);
  const at::Tensor invstd = empty_statistic(input.problem.channels, input);
  run(
      ForwardEvalArgs{
          .problem = input.problem,
          .x = input.tensor.const_data_ptr(),
          .y = y.data_ptr(),
          .weight = scale.pointer(),
          .bias = shift.pointer(),
          .running_mean = average_mean.pointer(),
          .running_var = average_var.pointer(),
          .eps = eps,
          .mean = pointer_to(mean, input),
          .invstd = pointer_to(invstd, input),
          .epilogue = epilogue.arguments(input),
      },
      input.tensor);
  return {y, mean, invstd, epilogue.relu_bounds};
}

ThreeTensors batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                                 bool need_weight, bool need_bias, const OptionalTensor& relu_bounds) {
  const Input input = describe_input(x);
  const at::Tensor grad_y = grad_like(grad, input);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector saved_mean = saved_statistic(mean, "mean", input);
  const ChannelVector saved_invstd = saved_statistic(invstd, "invstd", input);
  const at::Tensor bounds = relu_bounds.has_value() ? saved_relu_bounds(*relu_bounds, input) : at::Tensor();

  const Dtype parameter_dtype = scale.defined() ? scale.pointer().dtype : accumulate_dtype(input.problem.dtype);
  const bool empty = input.problem.elements() == 0;
  const auto parameter_grad = [&](bool needed) {
    const at::Tensor grad = empty_vector(needed ? input.problem.channels : 0, parameter_dtype, input.tensor);
    if (empty) grad.zero_();
    return grad;
  };
  const at::Tensor grad_x = need_input ? empty_result(input) : empty_vector(0, input.problem.dtype, input.tensor);
  const at::Tensor grad_weight = parameter_grad(need_weight && scale.defined());
  const at::Tensor grad_bias = parameter_grad(need_bias);
  if (empty) return {grad_x, grad_weight, grad_bias};

  const auto pointer = [](const at::Tensor& tensor, Dtype dtype) -> PerChannel {
    return {tensor.numel() == 0 ? nullptr : tensor.data_ptr(), dtype};
  };
  run(
      BackwardArgs{
          .problem = input.problem,
          .grad_y = grad_y.const_data_ptr(),
          .x = input.tensor.const_data_ptr(),
          .grad_x = need_input ? grad_x.data_ptr() : nullptr,
          .weight = scale.pointer(),
          .mean = saved_mean.pointer(),
          .invstd = saved_invstd.pointer(),
          .grad_weight = pointer(grad_weight, parameter_dtype),
          .grad_bias = pointer(grad_bias, parameter_dtype),
          .training = training,
          .relu_low = row_of(bounds, 0, input),
          .relu_high = row_of(bounds, 1, input),
      },
      input.tensor);
  return {grad_x, grad_weight, grad_bias};
}

namespace {

using SevenTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// batch_norm_train without side effects, so that torch.compile can reorder and fuse around it: returns new buffers.
SevenTensors batch_norm_train_functional(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                         double eps, const OptionalTensor& residual, bool relu) {
  const Changed buffers(running_mean, running_var, num_batches_tracked);
  auto [y, mean, invstd, relu_bounds] = batch_norm_train(x, weight, bias, buffers.running_mean, buffers.running_var,
                                                         buffers.num_batches_tracked, momentum, eps, residual, relu);
  auto [new_mean, new_var, new_count] = buffers.or_empty(mean);
  return {y, mean, invstd, relu_bounds, new_mean, new_var, new_count};
}

}  // namespace

TORCH_LIBRARY(bnkernels, library) {
  const std::vector<at::Tag> tags = op_tags();
  library.def(
      "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? residual=None, bool relu=False) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds)",
      tags);
  library.def(
      "batch_norm_train_functional(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "Tensor? num_batches_tracked, float? momentum, float eps, Tensor? residual=None, bool relu=False) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds, Tensor running_mean_out, Tensor running_var_out, "
      "Tensor num_batches_tracked_out)",
      tags);
  library.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
      "Tensor? residual=None, bool relu=False) -> (Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds)",
      tags);
  library.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
      "bool need_input, bool need_weight, bool need_bias, Tensor? relu_bounds=None) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
      tags);
}

static void register_kernels(torch::Library& library) {
  library.impl("batch_norm_train", TORCH_FN(batch_norm_train));
  library.impl("batch_norm_train_functional", TORCH_FN(batch_norm_train_functional));
  library.impl("batch_norm_eval", TORCH_FN(batch_norm_eval));
  library.impl("batch_norm_backward", TORCH_FN(batch_norm_backward));
}

TORCH_LIBRARY_IMPL(bnkernels, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(bnkernels, CUDA, library) { register_kernels(library); }

}  // namespace bnk

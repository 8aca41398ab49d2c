// The ops: schemas, allocation, and the choice of the backend.
//
// Shapes: x (N, C, *); weight, bias, running_mean, running_var, mean, invstd (C,). See README for the dtypes.
#include "ops.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "arguments.h"
#include "backend.h"
#include "ops_results.h"

namespace bnk {
namespace {

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ThreeTensors train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const Input input = describe_input(x);
  Vector average_mean(running_mean, "running_mean", input);
  Vector average_var(running_var, "running_var", input);
  const Vector scale(weight, "weight", input);
  const Vector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  check_same_dtype(average_mean, "running_mean", average_var, "running_var");
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

  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    // Nothing to average: the running statistics stay, the batch counts.
    if (counts) num_batches_tracked->add_(1);
    const at::Tensor none = at::zeros({input.problem.channels}, statistic_options(input));
    return {y, none, at::zeros_like(none)};
  }
  const at::Tensor mean = at::empty({input.problem.channels}, statistic_options(input));
  const at::Tensor invstd = at::empty_like(mean);
  run_forward_train(
      {
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
      },
      input.tensor);
  average_mean.write_back();
  average_var.write_back();
  if (counts) mark_changed(*num_batches_tracked);
  return {y, mean, invstd};
}

// The same without a change to its arguments: what torch.compile can move and fuse around.
SixTensors train_functional(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const Changed buffers(running_mean, running_var, num_batches_tracked);
  auto [y, mean, invstd] =
      train(x, weight, bias, buffers.running_mean, buffers.running_var, buffers.num_batches_tracked, momentum, eps);
  auto [new_mean, new_var, new_count] = buffers.or_empty(mean);
  return {y, mean, invstd, new_mean, new_var, new_count};
}

ThreeTensors eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  const at::Tensor& running_mean, const at::Tensor& running_var, double eps) {
  const Input input = describe_input(x);
  const Vector average_mean(running_mean, "running_mean", input);
  const Vector average_var(running_var, "running_var", input);
  const Vector scale(weight, "weight", input);
  const Vector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  check_same_dtype(average_mean, "running_mean", average_var, "running_var");
  TORCH_CHECK(average_mean.defined(), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(average_var.defined(), "running_var must be defined in evaluation mode");
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);

  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    const at::TensorOptions options = statistic_options(input);
    return {y, running_mean.to(options.dtype()).clone(), at::rsqrt(at::add(running_var.to(options.dtype()), eps))};
  }
  const at::Tensor mean = at::empty({input.problem.channels}, statistic_options(input));
  const at::Tensor invstd = at::empty_like(mean);
  run_forward_eval(
      {
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
      },
      input.tensor);
  return {y, mean, invstd};
}

ThreeTensors backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                      const at::Tensor& invstd, bool training, bool need_input, bool need_weight, bool need_bias) {
  const Input input = describe_input(x);
  const at::Tensor grad_y = grad_like(grad, input);
  const Vector scale(weight, "weight", input);
  const Vector saved_mean = saved_statistic(mean, "mean", input);
  const Vector saved_invstd = saved_statistic(invstd, "invstd", input);

  const at::TensorOptions parameter_options =
      scale.defined() ? input.tensor.options().dtype(scale.scalar_type()) : statistic_options(input);
  const bool empty = input.problem.elements() == 0;
  const auto parameter_grad = [&](bool needed) {
    const int64_t size = needed ? input.problem.channels : 0;
    return empty ? at::zeros({size}, parameter_options) : at::empty({size}, parameter_options);
  };
  const at::Tensor grad_x = need_input ? empty_result(input) : at::empty({0}, input.tensor.options());
  const at::Tensor grad_weight = parameter_grad(need_weight && scale.defined());
  const at::Tensor grad_bias = parameter_grad(need_bias);
  if (empty) return {grad_x, grad_weight, grad_bias};

  const auto pointer = [](const at::Tensor& tensor, Dtype dtype) -> PerChannel {
    return {tensor.numel() == 0 ? nullptr : tensor.data_ptr(), dtype};
  };
  const Dtype parameter_dtype = scale.defined() ? scale.pointer().dtype : accumulate_dtype(input.problem.dtype);
  run_backward(
      {
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
      },
      input.tensor);
  return {grad_x, grad_weight, grad_bias};
}

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

ThreeTensors batch_norm_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  static const auto op = find_op<decltype(train)>("bnkernels::batch_norm_train");
  return op.call(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
}

ThreeTensors batch_norm_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const at::Tensor& running_mean, const at::Tensor& running_var, double eps) {
  static const auto op = find_op<decltype(eval)>("bnkernels::batch_norm_eval");
  return op.call(x, weight, bias, running_mean, running_var, eps);
}

ThreeTensors batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                                 bool need_weight, bool need_bias) {
  static const auto op = find_op<decltype(backward)>("bnkernels::batch_norm_backward");
  return op.call(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias);
}

TORCH_LIBRARY(bnkernels, library) {
  const std::vector<at::Tag> tags = op_tags();
  library.def(
      "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor y, Tensor mean, Tensor invstd)",
      tags);
  library.def(
      "batch_norm_train_functional(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "Tensor? num_batches_tracked, float? momentum, float eps) -> (Tensor y, Tensor mean, Tensor invstd, "
      "Tensor running_mean_out, Tensor running_var_out, Tensor num_batches_tracked_out)",
      tags);
  library.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps) -> "
      "(Tensor y, Tensor mean, Tensor invstd)",
      tags);
  library.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
      "bool need_input, bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
      tags);
}

void register_kernels(torch::Library& library) {
  library.impl("batch_norm_train", TORCH_FN(train));
  library.impl("batch_norm_train_functional", TORCH_FN(train_functional));
  library.impl("batch_norm_eval", TORCH_FN(eval));
  library.impl("batch_norm_backward", TORCH_FN(backward));
}

TORCH_LIBRARY_IMPL(bnkernels, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(bnkernels, CUDA, library) { register_kernels(library); }

}  // namespace bnk

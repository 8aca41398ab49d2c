#include "ops_calls.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "arguments.h"
#include "dispatch.h"
#include "ops_results.h"

namespace bnk {
namespace {

// A row of a (2, C) tensor; null if it is not there.
PerChannel row_of(const at::Tensor& range, int64_t row, const Input& input) {
  const Dtype dtype = accumulate_dtype(input.problem.dtype);
  if (!range.defined() || range.numel() == 0) return {nullptr, dtype};
  return {static_cast<char*>(range.data_ptr()) + row * input.problem.channels * size_of(dtype), dtype};
}

// What a fusion reads and writes, checked.
struct EpilogueResults {
  at::Tensor residual;     // dense in the layout of the input, or undefined
  at::Tensor relu_bounds;  // undefined: nothing asks for it
  bool relu;

  EpilogueResults(const EpilogueTensors& epilogue, const Input& input) : relu(epilogue.relu) {
    const bool adds = epilogue.residual.has_value() && epilogue.residual->defined();
    if (adds) residual = residual_like(*epilogue.residual, input);
    if (relu && !adds) relu_bounds = at::empty({2, input.problem.channels}, statistic_options(input));
    if (relu_bounds.defined() && input.problem.elements() == 0) relu_bounds.zero_();
  }

  Epilogue epilogue(const Input& input) const {
    return {
        .residual = residual.defined() ? residual.const_data_ptr() : nullptr,
        .relu = relu,
        .low = row_of(relu_bounds, 0, input),
        .high = row_of(relu_bounds, 1, input),
    };
  }
};

}  // namespace

Normalized call_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                      const EpilogueTensors& epilogue) {
  const Input input = describe_input(x);
  Vector average_mean(running_mean, "running_mean", input);
  Vector average_var(running_var, "running_var", input);
  const Vector scale(weight, "weight", input);
  const Vector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  check_updated(average_mean, average_var, x, scale, shift, epilogue.residual.value_or(at::Tensor()));
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

  const EpilogueResults epilogue_results(epilogue, input);
  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    // Nothing to average: the running statistics stay, the batch counts.
    const at::Tensor none = at::zeros({input.problem.channels}, statistic_options(input));
    const Normalized all{y, none, at::zeros_like(none), epilogue_results.relu_bounds};
    if (counts) count_batch(*num_batches_tracked);
    return all;
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
          .epilogue = epilogue_results.epilogue(input),
      },
      input.tensor);
  average_mean.write_back();
  average_var.write_back();
  if (counts) mark_changed(*num_batches_tracked);
  return {y, mean, invstd, epilogue_results.relu_bounds};
}

Normalized call_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                     const EpilogueTensors& epilogue) {
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

  const EpilogueResults epilogue_results(epilogue, input);
  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) {
    const at::TensorOptions options = statistic_options(input);
    return {y, running_mean.to(options.dtype()).clone(), at::rsqrt(at::add(running_var.to(options.dtype()), eps)),
            epilogue_results.relu_bounds};
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
          .epilogue = epilogue_results.epilogue(input),
      },
      input.tensor);
  return {y, mean, invstd, epilogue_results.relu_bounds};
}

ThreeTensors call_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                           const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                           bool need_weight, bool need_bias, const OptionalTensor& relu_bounds) {
  const Input input = describe_input(x);
  const at::Tensor grad_y = grad_like(grad, input);
  const Vector scale(weight, "weight", input);
  const Vector saved_mean = saved_statistic(mean, "mean", input);
  const Vector saved_invstd = saved_statistic(invstd, "invstd", input);
  const at::Tensor range = relu_bounds.has_value() ? saved_relu_bounds(*relu_bounds, input) : at::Tensor();

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
          .relu_low = row_of(range, 0, input),
          .relu_high = row_of(range, 1, input),
      },
      input.tensor);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace bnk

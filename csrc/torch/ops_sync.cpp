// The ops of a synchronized batch norm across ranks. Between these steps, Python exchanges rows (problem_sync.h).
//
// Shapes: x (N, C, *), where N may be 0; weight, bias, running_mean, running_var, mean, invstd (C,); rows are float64.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "arguments.h"
#include "dispatch.h"
#include "ops_results.h"

namespace bnk {
namespace {

using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::TensorOptions row_options(const at::Tensor& beside) { return beside.options().dtype(at::kDouble); }

at::Tensor statistics(const at::Tensor& x, double eps) {
  const Input input = describe_input(x);
  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  const int64_t size = statistics_row(input.problem.channels);
  if (input.problem.elements() == 0) return at::zeros({size}, row_options(x));
  const at::Tensor row = at::empty({size}, row_options(x));
  run(
      StatisticsArgs{
          .problem = input.problem,
          .x = input.tensor.const_data_ptr(),
          .eps = eps,
          .row = row.data_ptr<double>(),
      },
      x);
  return row;
}

// dtype: of the input x.
ThreeTensors combine(const at::Tensor& rows, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                     at::ScalarType dtype) {
  const at::Device device = rows.device();
  const int64_t channels = rows.dim() == 2 ? (rows.size(1) - 1) / 2 : 0;
  TORCH_CHECK(channels >= 1,
              "sync_batch_norm: expected a row of 2*C + 1 doubles from each rank, with 1 channel or more, ",
              "but got shape ", rows.sizes());
  const at::Tensor dense = rank_rows(rows, statistics_row(channels), device);
  ChannelVector average_mean(running_mean, "running_mean", channels, dtype, device);
  ChannelVector average_var(running_var, "running_var", channels, dtype, device);
  check_updated(average_mean, average_var, rows);
  check_counter(num_batches_tracked, device);
  const bool counts = num_batches_tracked.has_value() && num_batches_tracked->defined();
  const bool averages = average_mean.defined();
  TORCH_CHECK_VALUE(averages == average_var.defined(),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK(momentum.has_value() || counts || !averages,
              "batch_norm: momentum=None (a cumulative average) needs num_batches_tracked, but got None");
  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);

  const Dtype statistic = accumulate_dtype(to_dtype(dtype));
  const at::Tensor mean = at::empty({channels}, rows.options().dtype(to_scalar_type(statistic)));
  const at::Tensor invstd = at::empty_like(mean);
  const at::Tensor count = at::empty({1}, rows.options());
  // A separate operation: on a GPU, no block may increment the counter while another reads it.
  if (counts) count_batch(*num_batches_tracked);
  run(
      CombineStatisticsArgs{
          .channels = channels,
          .rows = {dense.const_data_ptr<double>(), dense.size(0), dense.size(1)},
          .num_batches_tracked = counts ? num_batches_tracked->const_data_ptr<int64_t>() : nullptr,
          .momentum = momentum.value_or(0),
          .cumulative = !momentum.has_value() && averages,
          .eps = eps,
          .mean = {mean.data_ptr(), statistic},
          .invstd = {invstd.data_ptr(), statistic},
          .running_mean = average_mean.pointer(),
          .running_var = average_var.pointer(),
          .count = count.data_ptr<double>(),
      },
      rows);
  average_mean.write_back();
  average_var.write_back();
  return {mean, invstd, count};
}

SixTensors combine_functional(const at::Tensor& rows, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                              std::optional<double> momentum, double eps, at::ScalarType dtype) {
  const Changed buffers(running_mean, running_var, num_batches_tracked);
  auto [mean, invstd, count] =
      combine(rows, buffers.running_mean, buffers.running_var, buffers.num_batches_tracked, momentum, eps, dtype);
  auto [new_mean, new_var, new_count] = buffers.or_empty(mean);
  return {mean, invstd, count, new_mean, new_var, new_count};
}

at::Tensor normalize(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& mean, const at::Tensor& invstd) {
  const Input input = describe_input(x);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector shift(bias, "bias", input);
  check_same_dtype(scale, "weight", shift, "bias");
  const ChannelVector combined_mean = saved_statistic(mean, "mean", input);
  const ChannelVector combined_invstd = saved_statistic(invstd, "invstd", input);
  const at::Tensor y = empty_result(input);
  if (input.problem.elements() == 0) return y;
  run(
      NormalizeArgs{
          .problem = input.problem,
          .x = input.tensor.const_data_ptr(),
          .y = y.data_ptr(),
          .weight = scale.pointer(),
          .bias = shift.pointer(),
          .mean = combined_mean.pointer(),
          .invstd = combined_invstd.pointer(),
      },
      x);
  return y;
}

ThreeTensors grad_sums(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                       const at::Tensor& mean, const at::Tensor& invstd, bool need_weight, bool need_bias) {
  const Input input = describe_input(x);
  const at::Tensor grad_y = grad_like(grad, input);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector combined_mean = saved_statistic(mean, "mean", input);
  const ChannelVector combined_invstd = saved_statistic(invstd, "invstd", input);

  const int64_t channels = input.problem.channels;
  const at::TensorOptions parameter_options =
      scale.defined() ? x.options().dtype(scale.scalar_type()) : statistic_options(input);
  const int64_t weights = need_weight && scale.defined() ? channels : 0;
  const int64_t biases = need_bias ? channels : 0;
  if (input.problem.elements() == 0) {
    return {at::zeros({grad_sums_row(channels)}, row_options(x)), at::zeros({weights}, parameter_options),
            at::zeros({biases}, parameter_options)};
  }
  const at::Tensor row = at::empty({grad_sums_row(channels)}, row_options(x));
  const at::Tensor grad_weight = at::empty({weights}, parameter_options);
  const at::Tensor grad_bias = at::empty({biases}, parameter_options);
  const Dtype parameter = to_dtype(grad_bias.scalar_type());
  run(
      GradSumsArgs{
          .problem = input.problem,
          .grad_y = grad_y.const_data_ptr(),
          .x = input.tensor.const_data_ptr(),
          .mean = combined_mean.pointer(),
          .invstd = combined_invstd.pointer(),
          .row = row.data_ptr<double>(),
          .grad_weight = {weights == 0 ? nullptr : grad_weight.data_ptr(), parameter},
          .grad_bias = {biases == 0 ? nullptr : grad_bias.data_ptr(), parameter},
      },
      x);
  return {row, grad_weight, grad_bias};
}

at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                      const at::Tensor& invstd, const at::Tensor& rows, const at::Tensor& count) {
  const Input input = describe_input(x);
  const at::Tensor grad_y = grad_like(grad, input);
  const ChannelVector scale(weight, "weight", input);
  const ChannelVector combined_mean = saved_statistic(mean, "mean", input);
  const ChannelVector combined_invstd = saved_statistic(invstd, "invstd", input);
  const at::Tensor dense = rank_rows(rows, grad_sums_row(input.problem.channels), x.device());
  TORCH_CHECK(count.numel() == 1 && count.scalar_type() == at::kDouble && count.device() == x.device(),
              "sync_batch_norm: expected the count as one double on ", x.device(), ", but got shape ", count.sizes(),
              " and dtype ", count.scalar_type(), " on ", count.device());
  const at::Tensor grad_x = empty_result(input);
  if (input.problem.elements() == 0) return grad_x;
  run(
      GradInputArgs{
          .problem = input.problem,
          .grad_y = grad_y.const_data_ptr(),
          .x = input.tensor.const_data_ptr(),
          .grad_x = grad_x.data_ptr(),
          .weight = scale.pointer(),
          .mean = combined_mean.pointer(),
          .invstd = combined_invstd.pointer(),
          .rows = {dense.const_data_ptr<double>(), dense.size(0), dense.size(1)},
          .count = count.const_data_ptr<double>(),
      },
      x);
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bnkernels, library) {
  const std::vector<at::Tag> tags = op_tags();
  library.def("sync_batch_norm_statistics(Tensor x, float eps) -> Tensor row", tags);
  library.def(
      "sync_batch_norm_combine(Tensor rows, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, ScalarType dtype) -> "
      "(Tensor mean, Tensor invstd, Tensor count)",
      tags);
  library.def(
      "sync_batch_norm_combine_functional(Tensor rows, Tensor? running_mean, Tensor? running_var, "
      "Tensor? num_batches_tracked, float? momentum, float eps, ScalarType dtype) -> (Tensor mean, Tensor invstd, "
      "Tensor count, Tensor running_mean_out, Tensor running_var_out, Tensor num_batches_tracked_out)",
      tags);
  library.def(
      "sync_batch_norm_normalize(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd) -> Tensor y",
      tags);
  library.def(
      "sync_batch_norm_grad_sums(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "bool need_weight, bool need_bias) -> (Tensor row, Tensor grad_weight, Tensor grad_bias)",
      tags);
  library.def(
      "sync_batch_norm_grad_input(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor rows, "
      "Tensor count) -> Tensor grad_x",
      tags);
}

static void register_sync_kernels(torch::Library& library) {
  library.impl("sync_batch_norm_statistics", TORCH_FN(statistics));
  library.impl("sync_batch_norm_combine", TORCH_FN(combine));
  library.impl("sync_batch_norm_combine_functional", TORCH_FN(combine_functional));
  library.impl("sync_batch_norm_normalize", TORCH_FN(normalize));
  library.impl("sync_batch_norm_grad_sums", TORCH_FN(grad_sums));
  library.impl("sync_batch_norm_grad_input", TORCH_FN(grad_input));
}

TORCH_LIBRARY_IMPL(bnkernels, CPU, library) { register_sync_kernels(library); }
TORCH_LIBRARY_IMPL(bnkernels, CUDA, library) { register_sync_kernels(library); }

}  // namespace bnk

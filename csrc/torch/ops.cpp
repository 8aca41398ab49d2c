// The ops: their schemas. What they do is in ops_calls.h; the fused ones are in ops_fused.cpp.
#include "ops.h"

#include <torch/library.h>

#include "ops_calls.h"
#include "ops_results.h"

namespace bnk {
namespace {

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ThreeTensors train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const Normalized all = call_train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
  return {all.y, all.mean, all.invstd};
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
  const Normalized all = call_eval(x, weight, bias, running_mean, running_var, eps);
  return {all.y, all.mean, all.invstd};
}

ThreeTensors backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                      const at::Tensor& invstd, bool training, bool need_input, bool need_weight, bool need_bias) {
  return call_backward(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias);
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

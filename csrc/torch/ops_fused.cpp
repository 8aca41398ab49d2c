// The ops of BatchNorm with what follows it: an addition, a ReLU, or both.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops_calls.h"
#include "ops_results.h"

namespace bnk {
namespace {

using SevenTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FourTensors results_of(const Normalized& all) {
  return {all.y, all.mean, all.invstd,
          all.relu_bounds.defined() ? all.relu_bounds : at::empty({0}, all.mean.options())};
}

FourTensors fused_train(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                        std::optional<double> momentum, double eps, bool relu) {
  return results_of(call_train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                               {.residual = residual, .relu = relu}));
}

// The same without a change to its arguments: what torch.compile can move and fuse around.
SevenTensors fused_train_functional(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                    std::optional<double> momentum, double eps, bool relu) {
  const Changed buffers(running_mean, running_var, num_batches_tracked);
  auto [y, mean, invstd, relu_bounds] =
      fused_train(x, residual, weight, bias, buffers.running_mean, buffers.running_var, buffers.num_batches_tracked,
                  momentum, eps, relu);
  auto [new_mean, new_var, new_count] = buffers.or_empty(mean);
  return {y, mean, invstd, relu_bounds, new_mean, new_var, new_count};
}

FourTensors fused_eval(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                       const OptionalTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var,
                       double eps, bool relu) {
  return results_of(call_eval(x, weight, bias, running_mean, running_var, eps, {.residual = residual, .relu = relu}));
}

ThreeTensors relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                           const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& relu_bounds,
                           bool training, bool need_input, bool need_weight, bool need_bias) {
  return call_backward(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias, relu_bounds);
}

}  // namespace

FourTensors batch_norm_fused_train(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps, bool relu) {
  static const auto op = find_op<decltype(fused_train)>("bnkernels::batch_norm_fused_train");
  return op.call(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, relu);
}

FourTensors batch_norm_fused_eval(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const at::Tensor& running_mean,
                                  const at::Tensor& running_var, double eps, bool relu) {
  static const auto op = find_op<decltype(fused_eval)>("bnkernels::batch_norm_fused_eval");
  return op.call(x, residual, weight, bias, running_mean, running_var, eps, relu);
}

ThreeTensors batch_norm_relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                      const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& relu_bounds,
                                      bool training, bool need_input, bool need_weight, bool need_bias) {
  static const auto op = find_op<decltype(relu_backward)>("bnkernels::batch_norm_relu_backward");
  return op.call(grad, x, weight, mean, invstd, relu_bounds, training, need_input, need_weight, need_bias);
}

TORCH_LIBRARY_FRAGMENT(bnkernels, library) {
  const std::vector<at::Tag> tags = op_tags();
  library.def(
      "batch_norm_fused_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, bool relu) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds)",
      tags);
  library.def(
      "batch_norm_fused_train_functional(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor? running_mean, Tensor? running_var, Tensor? num_batches_tracked, float? momentum, float eps, bool relu) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds, Tensor running_mean_out, Tensor running_var_out, "
      "Tensor num_batches_tracked_out)",
      tags);
  library.def(
      "batch_norm_fused_eval(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor invstd, Tensor relu_bounds)",
      tags);
  library.def(
      "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "Tensor relu_bounds, bool training, bool need_input, bool need_weight, bool need_bias) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
      tags);
}

namespace {

void register_fused_kernels(torch::Library& library) {
  library.impl("batch_norm_fused_train", TORCH_FN(fused_train));
  library.impl("batch_norm_fused_train_functional", TORCH_FN(fused_train_functional));
  library.impl("batch_norm_fused_eval", TORCH_FN(fused_eval));
  library.impl("batch_norm_relu_backward", TORCH_FN(relu_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(bnkernels, CPU, library) { register_fused_kernels(library); }
TORCH_LIBRARY_IMPL(bnkernels, CUDA, library) { register_fused_kernels(library); }

}  // namespace bnk

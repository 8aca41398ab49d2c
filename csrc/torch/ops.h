// The ops, called from C++ through torch's dispatcher, so that whatever stands before the kernels (fake tensors,
// torch.func transforms, dispatch modes, the profiler) sees the call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace bnk {

using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ThreeTensors batch_norm_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps);

ThreeTensors batch_norm_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const at::Tensor& running_mean, const at::Tensor& running_var, double eps);

// Gradients that are not needed come as tensors of size 0.
ThreeTensors batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                                 bool need_weight, bool need_bias);

// The same with y = relu(batch_norm(x) + residual), each part if it is there. The fourth result is the forward's
// relu_bounds (ops_calls.h), or a tensor of size 0.
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FourTensors batch_norm_fused_train(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps, bool relu);

FourTensors batch_norm_fused_eval(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const at::Tensor& running_mean,
                                  const at::Tensor& running_var, double eps, bool relu);

ThreeTensors batch_norm_relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                      const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& relu_bounds,
                                      bool training, bool need_input, bool need_weight, bool need_bias);

}  // namespace bnk

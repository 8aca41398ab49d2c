// The kernels of the registered ops. They check arguments, allocate results and run on the device of x.
//
// Shapes: x, residual, grad (N, C, *); weight, bias, running_mean, running_var, mean, invstd (C,). See the README for
// the dtypes. Call the ops through torch's dispatcher (bindings.cpp), so that fake tensors, torch.func, dispatch modes
// and the profiler see the calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace bnk {

using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Returns (y, mean, invstd, relu_bounds) of y = relu(batch_norm(x) + residual), where the residual and the ReLU are
// optional. relu_bounds (2, C), of mean's dtype: the least and the greatest x of each channel with y > 0. They are
// computed for a ReLU without a residual and are of size 0 otherwise. Updates the running statistics and the batch
// counter, if given.
FourTensors batch_norm_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                             const OptionalTensor& residual, bool relu);

FourTensors batch_norm_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                            const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                            const OptionalTensor& residual, bool relu);

// Returns (grad_x, grad_weight, grad_bias); gradients that are not needed are of size 0. relu_bounds: as returned by a
// forward with a ReLU; grad is then the gradient of the ReLU's output.
ThreeTensors batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                                 bool need_weight, bool need_bias, const OptionalTensor& relu_bounds);

}  // namespace bnk

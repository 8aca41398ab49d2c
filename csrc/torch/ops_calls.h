// What the ops do, plain and fused: arguments checked, results allocated, the backend chosen.
//
// Shapes: x (N, C, *); weight, bias, running_mean, running_var, mean, invstd (C,). See README for the dtypes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops.h"

namespace bnk {

// y = relu(batch_norm(x) + residual), each part if it is there.
struct EpilogueTensors {
  OptionalTensor residual = std::nullopt;  // of x's shape and dtype
  bool relu = false;
};

struct Normalized {
  at::Tensor y, mean, invstd;
  at::Tensor relu_bounds;  // (2, C), of mean's dtype: the least and the greatest x whose y is positive. With relu and
                           // without a residual; else undefined
};

Normalized call_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                      const EpilogueTensors& epilogue = {});

Normalized call_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                     const EpilogueTensors& epilogue = {});

// relu_bounds: that of the forward, if it had one; grad is then that of the relu's result.
ThreeTensors call_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                           const at::Tensor& mean, const at::Tensor& invstd, bool training, bool need_input,
                           bool need_weight, bool need_bias, const OptionalTensor& relu_bounds = std::nullopt);

}  // namespace bnk

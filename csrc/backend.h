// The choice of the backend: the CPU's, or the CUDA kernels on the input's device and its current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include "plan.h"
#include "problem.h"

namespace bnk {

// `x` says which device, and is where scratch memory is allocated beside. CUDA work is enqueued, not waited for.
void run_forward_train(const ForwardTrainArgs& args, const at::Tensor& x);
void run_forward_eval(const ForwardEvalArgs& args, const at::Tensor& x);
void run_backward(const BackwardArgs& args, const at::Tensor& x);

// What plans are made from for a CUDA device. Raises where CUDA is not built, or has no such device.
DeviceLimits device_limits(int device);

}  // namespace bnk

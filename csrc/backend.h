// The choice of the backend: the CPU's, or the CUDA kernels on the input's device and its current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include "problem.h"

namespace bnk {

// `x` says which device, and is where scratch memory is allocated beside. CUDA work is enqueued, not waited for.
void run_forward_train(const ForwardTrainArgs& args, const at::Tensor& x);
void run_forward_eval(const ForwardEvalArgs& args, const at::Tensor& x);
void run_backward(const BackwardArgs& args, const at::Tensor& x);

}  // namespace bnk

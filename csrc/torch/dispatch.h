// The choice of the backend: the CPU's, or the CUDA kernels on the input's device and its current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../core/problem.h"
#include "../core/problem_sync.h"
#include "../plan/plan.h"

namespace bnk {

// `x` says which device, and is where scratch memory is allocated beside. CUDA work is enqueued, not waited for.
void run_forward_train(const ForwardTrainArgs& args, const at::Tensor& x);
void run_forward_eval(const ForwardEvalArgs& args, const at::Tensor& x);
void run_backward(const BackwardArgs& args, const at::Tensor& x);

// The steps of a batch on several ranks. `beside`: a tensor on the device.
void run_statistics(const StatisticsArgs& args, const at::Tensor& beside);
void run_combine_statistics(const CombineStatisticsArgs& args, const at::Tensor& beside);
void run_normalize(const NormalizeArgs& args, const at::Tensor& beside);
void run_grad_sums(const GradSumsArgs& args, const at::Tensor& beside);
void run_grad_input(const GradInputArgs& args, const at::Tensor& beside);

// What plans are made from for a CUDA device. Raises where CUDA is not built, or has no such device.
DeviceLimits device_limits(int device);

// The barrier words of a CUDA device, in use or not, for tests: views of shape (workspaces, kBarrierWords), int32.
std::vector<at::Tensor> barrier_workspace(int device);

}  // namespace bnk
